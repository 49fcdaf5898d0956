"""Class names that mean the same (`data.class_aliases`): merged for training, or summed in the submission.

`merge`: the split replaces each name by the first of its group, the model has only that class, and a submission divides
its probability equally among the names. `sum`: the model has all names, and in a submission each of them
gets the sum of their probabilities. In both cases rows are normalized to sum 1, as the competition's metric does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from fivefold.config.schema import Data
from fivefold.contract.filenames import normalize_class_name
from fivefold.data.readers.training_rows import LabelledImages
from fivefold.errors import DataError
from fivefold.lookup import did_you_mean
from fivefold.predictions import Predictions


@dataclass(frozen=True)
class ClassAliases:
    """Groups of names that mean the same, and the policy: none, merge or sum. A name is in at most one group."""

    groups: Sequence[Sequence[str]] = ()
    policy: str = "none"

    @cached_property
    def group_of(self) -> dict[str, tuple[str, ...]]:
        """Map each name to its group, with names as the split normalizes them; empty under the policy none."""
        groups = [tuple(map(normalize_class_name, group)) for group in self.groups if self.policy != "none"]
        return {name: group for group in groups for name in group}

    @cached_property
    def canonical_names(self) -> dict[str, str]:
        """Map each merged name to the one that replaces it; empty under another policy than merge."""
        merged = self.group_of if self.policy == "merge" else {}
        return {name: group[0] for name, group in merged.items() if name != group[0]}

    def columns(self, classes: Sequence[str], target_columns: Sequence[str]) -> np.ndarray:
        """Return the matrix [C, W] that maps probabilities of `classes` [N, C] to those of the columns `target_columns` [N, W].

        The column of an unknown class is all 0, and so is the row of a class without a column.
        """
        matrix = np.zeros((len(classes), len(target_columns)))
        index = {name: code for code, name in enumerate(classes)}
        for column, name in enumerate(target_columns):
            group = self.group_of.get(name, (name,))
            sources, share = (group[:1], 1 / len(group)) if self.policy == "merge" else (group, 1.0)
            matrix[[index[source] for source in sources if source in index], column] = share
        return matrix

    def names(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return the columns of a submission by a model of `classes`: all names including merged ones, sorted."""
        return tuple(sorted({*classes, *(other for other, first in self.canonical_names.items() if first in classes)}))

    def merge_labels(self, labels: Sequence[str]) -> list[str]:
        """Return the labels with merged names replaced."""
        return [self.canonical_names.get(label, label) for label in labels]

    def merge_table(self, table: Predictions) -> Predictions:
        """Return `table` with the probabilities of merged names in one column, and with merged labels."""
        if not self.canonical_names.keys() & {*table.classes, *(table.labels if table.labels is not None else ())}:
            return table
        codes, classes = pd.factorize(np.array(self.merge_labels(table.classes), object))
        total = np.exp(table.log_probs.astype(np.float64)) @ np.eye(len(classes))[codes]
        log_probs = np.log(np.maximum(total, np.finfo(np.float64).tiny)).astype(np.float32)
        labels = None if table.labels is None else np.array(self.merge_labels(table.labels), dtype=object)
        return replace(table, classes=tuple(classes), log_probs=log_probs, labels=labels)

    def merge_rows(self, rows: LabelledImages) -> LabelledImages:
        """Return training rows with merged names as one class; raise a DataError for a name that no row has."""
        if not self.canonical_names:
            return rows
        self.check(rows.classes, "the training rows")
        codes, classes = pd.factorize(np.array(self.merge_labels(rows.classes), object), sort=True)
        if len(classes) < 2:
            raise DataError("data.class_aliases leaves a single class; at least two are needed")
        return replace(rows, codes=codes.astype(np.int32)[rows.codes], classes=tuple(classes))

    def check(self, classes: Sequence[str], owner: str) -> None:
        """Raise a DataError for a name in a group that is not one of `classes`, unless the policy is none."""
        for name in self.group_of:
            if name not in classes:
                hint = did_you_mean(name, classes)
                raise DataError(f"data.class_aliases names {name!r}, which is not a class of {owner}{hint}")

    @classmethod
    def of(cls, data: Data) -> "ClassAliases":
        """Return the aliases of the settings in `[data]`."""
        return cls(data.class_aliases, data.alias_policy)

    def check_model(self, classes: Sequence[str]) -> None:
        """Raise a DataError unless models of `classes` were trained under this policy."""
        if self.policy == "sum":
            self.check(classes, "the models")
        unmerged = sorted(self.canonical_names.keys() & set(classes))
        if unmerged:
            raise DataError(
                f"data.alias_policy=merge, but the models have the class {unmerged[0]!r}, which is merged into "
                f"{self.canonical_names[unmerged[0]]!r}: split and train with merge, or set data.alias_policy=sum"
            )
