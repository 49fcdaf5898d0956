"""Classes of several names that mean the same, and what becomes of them: one class in training, or one sum at the end.

`merge`: the split gives every row the first name, the model knows that class alone, and a submission parts
its probability equally among the names. `sum`: the model knows all names, and in a submission each of them
gets the sum of their probabilities. Either way rows are brought to sum 1, as the competition's metric does.

Equal parts, rather than the whole for each name, because that scores better wherever the names are equally
frequent: of a probability s the whole costs log(1 + s) more by its renormalisation, the part s·log 2 in the
mean of a calibrated model, which is never more (log(1 + s) is concave and meets s·log 2 at 0 and 1). The
whole for the first name would cost 34.5 nats for every row that carries the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

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
        return {other: first for first, *others in self._used("merge") for other in others}

    def columns(self, classes: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
        """What turns probabilities of `classes` [N, C] into those of the columns `wanted` [N, W]: a matrix [C, W].

        A column of a class that there is not is all 0, and so is the row of a class without any column.
        """
        matrix = np.zeros((len(classes), len(wanted)))
        place = {name: code for code, name in enumerate(classes)}
        summed = {name: group for group in self._used("sum") for name in group}
        parts = {name: (group[0], 1 / len(group)) for group in self._used("merge") for name in group}
        for column, name in enumerate(wanted):
            source, share = parts.get(name, (name, 1.0))
            for each in summed.get(name, (source,)):
                if each in place:
                    matrix[place[each], column] = share
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
        classes = tuple(dict.fromkeys(self.merge_labels(table.classes)))
        place = {name: code for code, name in enumerate(classes)}
        total = np.zeros((len(classes), len(table)))
        for name, column in zip(table.classes, table.log_probs.T, strict=True):
            total[place[self.merged.get(name, name)]] += np.exp(column.astype(np.float64))
        log_probs = np.log(np.maximum(total.T, np.finfo(np.float64).tiny)).astype(np.float32)
        labels = None if table.labels is None else np.array(self.merge_labels(table.labels), dtype=object)
        return replace(table, classes=classes, log_probs=log_probs, labels=labels)

    def merge_rows(self, rows: Rows) -> Rows:
        """Training rows with merged names as one class; a DataError for a name that no row carries."""
        if not self.merged:
            return rows
        self.check(rows.classes, "the training rows")
        classes = tuple(sorted(set(self.merge_labels(rows.classes))))
        if len(classes) < 2:
            raise DataError("data.same_classes leaves a single class; at least two are needed")
        place = {name: code for code, name in enumerate(classes)}
        codes = np.array([place[name] for name in self.merge_labels(rows.classes)], np.int32)[rows.codes]
        return replace(rows, codes=codes, classes=classes)

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

    def _used(self, policy: str) -> Sequence[Sequence[str]]:
        return self.named if self.policy == policy else ()
