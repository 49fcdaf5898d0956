"""Classes of several names that mean the same, and what becomes of them: one class in training, or one sum at the end.

`merge`: the split gives every row the first name, the model knows that class alone, and a submission parts
its probability equally among the names. `sum`: the model knows all names, and in a submission each of them
gets the sum of their probabilities. Either way rows are brought to sum 1, as the competition's metric does.

Equal parts score better than the whole for each name wherever the names are equally frequent: the whole costs
log(1 + s) more by its renormalisation, the part s·log 2 in the mean, which is never more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from fivefold.choose import did_you_mean
from fivefold.contract.spelling import plain_name
from fivefold.data.adapters import Rows
from fivefold.errors import DataError
from fivefold.predictions import Predictions


@dataclass(frozen=True)
class SameClasses:
    """Groups of names that mean the same, and the policy: none, merge or sum. A name is in one group at most."""

    groups: Sequence[Sequence[str]] = ()
    policy: str = "none"

    @cached_property
    def named(self) -> tuple[tuple[str, ...], ...]:
        """The groups, their names as the split has them (NFC, without the blanks around them)."""
        return tuple(tuple(plain_name(name) for name in group) for group in self.groups)

    @cached_property
    def merged(self) -> dict[str, str]:
        """The name that stands for each other one, where they are merged; empty under another policy."""
        return {other: first for first, *others in self.named for other in others if self.policy == "merge"}

    def columns(self, classes: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
        """What turns probabilities of `classes` [N, C] into those of the columns `wanted` [N, W]: a matrix [C, W].

        A column of a class that there is not is all 0, and so is the row of a class without any column.
        """
        matrix = np.zeros((len(classes), len(wanted)))
        place = {name: code for code, name in enumerate(classes)}
        group_of = {name: group for group in self.named for name in group if self.policy != "none"}
        for column, name in enumerate(wanted):
            group = group_of.get(name, (name,))
            sources, share = (group[:1], 1 / len(group)) if self.policy == "merge" else (group, 1.0)
            matrix[[place[source] for source in sources if source in place], column] = share
        return matrix

    def names(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The columns that a submission of a model of `classes` has: all names of merged ones, sorted."""
        there = set(classes)
        return tuple(sorted({*classes, *(other for other, first in self.merged.items() if first in there)}))

    def merge_labels(self, labels: Sequence[str]) -> list[str]:
        """Labels with merged names replaced by the one that stands for them."""
        return [self.merged.get(label, label) for label in labels]

    def merge_table(self, table: Predictions) -> Predictions:
        """`table` with the probabilities of merged names in one column, and its labels merged."""
        if not self.merged.keys() & {*table.classes, *(table.labels if table.labels is not None else ())}:
            return table
        codes, classes = pd.factorize(np.array(self.merge_labels(table.classes), object))
        total = np.exp(table.log_probs.astype(np.float64)) @ np.eye(len(classes))[codes]
        log_probs = np.log(np.maximum(total, np.finfo(np.float64).tiny)).astype(np.float32)
        labels = None if table.labels is None else np.array(self.merge_labels(table.labels), dtype=object)
        return replace(table, classes=tuple(classes), log_probs=log_probs, labels=labels)

    def merge_rows(self, rows: Rows) -> Rows:
        """Training rows with merged names as one class; a DataError for a name that no row carries."""
        if not self.merged:
            return rows
        self.check(rows.classes, "the training rows")
        codes, classes = pd.factorize(np.array(self.merge_labels(rows.classes), object), sort=True)
        if len(classes) < 2:
            raise DataError("data.same_classes leaves a single class; at least two are needed")
        return replace(rows, codes=codes.astype(np.int32)[rows.codes], classes=tuple(classes))

    def check(self, classes: Sequence[str], whose: str) -> None:
        """Raises a DataError for a name in a group that is none of `classes`, unless the policy is none."""
        for name in (name for group in self.named for name in group if self.policy != "none"):
            if name not in classes:
                raise DataError(
                    f"data.same_classes names {name!r}, which is no class of {whose}{did_you_mean(name, classes)}"
                )

    def check_model(self, classes: Sequence[str]) -> None:
        """Raises a DataError unless models of `classes` were made under this policy."""
        if self.policy == "sum":
            self.check(classes, "the models")
        unmerged = sorted(self.merged.keys() & set(classes))
        if unmerged:
            raise DataError(
                f"data.same_class=merge, but the models know {unmerged[0]!r}, which is merged into "
                f"{self.merged[unmerged[0]]!r}: split and train with merge, or take data.same_class=sum"
            )
