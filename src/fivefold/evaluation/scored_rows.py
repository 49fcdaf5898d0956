"""The scored rows of an evaluation, and its CSV tables: per class, confusion matrix, mistakes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from fivefold.contract.files import atomic
from fivefold.errors import DataError
from fivefold.evaluation import metrics
from fivefold.predictions import Predictions, preview

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
PER_CLASS = ("class", "precision", "recall", "f1", "support", "predicted")


@dataclass(frozen=True)
class ScoredRows:
    """Predictions with their true classes, and a description of the models and rows.

    `name` is "test", "holdout" or "oof"; `subject` describes the models and `rows` the rows. `paths` maps a row id to its
    image, `groups` to its group (a person, a product), if known.
    """

    name: str
    subject: str
    rows: str
    table: Predictions
    paths: Mapping[str, str]
    groups: Mapping[str, str | None] = field(default_factory=dict)

    @cached_property
    def codes(self) -> np.ndarray:
        """True class indices [N]."""
        return self.table.codes()

    @cached_property
    def guesses(self) -> np.ndarray:
        """Predicted class indices [N]."""
        return metrics.predicted_classes(self.table.log_probs)

    @cached_property
    def confusion(self) -> np.ndarray:
        """Counts [C, C], true class by row, predicted class by column."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.codes, self.guesses, labels=range(len(self.table.classes)))

    def figures(self, top_k: int, bins: int) -> dict[str, float | int | str]:
        """Return `subject` and `rows`, then all scores."""
        scores = metrics.full_report(self.table.log_probs, self.codes, top_k, bins)
        return {"what": self.subject, "rows": self.rows, **scores}

    def per_class(self) -> pd.DataFrame:
        """Return per `class`: `precision`, `recall`, `f1` in [0, 1] (0 if undefined), and the counts `support` and `predicted`."""
        from sklearn.metrics import precision_recall_fscore_support

        labels = range(len(self.table.classes))
        scores = precision_recall_fscore_support(self.codes, self.guesses, labels=labels, zero_division=0)
        columns = self.table.classes, *scores, np.bincount(self.guesses, minlength=len(labels))
        return pd.DataFrame(dict(zip(PER_CLASS, columns, strict=True)))

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the accuracy for the effective number of rows, given the `groups`."""
        right = self.guesses == self.codes
        clusters = [self.groups.get(name) or f"\0{name}" for name in self.table.ids]
        rows = metrics.effective_rows(right, np.unique(clusters, return_inverse=True)[1])
        return metrics.wilson_interval(float(right.mean()), rows)

    def mistakes(self) -> pd.DataFrame:
        """Return the rows with a wrong predicted class, the most confident first, ties by id.

        Columns: `id`, `path` ("" if unknown), `true_class`, `predicted_class`, and its `confidence` in [0, 1].
        """
        wrong = np.flatnonzero(self.guesses != self.codes)
        log_probs = self.table.log_probs[wrong, self.guesses[wrong]].astype(np.float64)
        order = np.lexsort((self.table.ids[wrong].astype(str), -log_probs))
        rows, classes = wrong[order], np.array(self.table.classes, dtype=object)
        columns = {
            "id": self.table.ids[rows],
            "path": [self.paths.get(name, "") for name in self.table.ids[rows]],
            "true_class": classes[self.codes[rows]],
            "predicted_class": classes[self.guesses[rows]],
            "confidence": np.minimum(np.exp(log_probs[order]), 1.0),
        }
        return pd.DataFrame(columns)


def concat_tables(tables: Sequence[Predictions]) -> Predictions:
    """Concatenate the rows of all tables, with classes sorted by name; raise a DataError for other classes or missing labels."""
    classes = tuple(sorted(tables[0].classes))
    unlabelled = [table.system for table in tables if table.labels is None]
    if unlabelled:
        raise DataError(f"predictions of {preview(unlabelled)} have no labels, so they cannot be scored")
    return Predictions(
        ids=np.concatenate([table.ids for table in tables]),
        fold=np.concatenate([table.fold for table in tables]),
        system=tables[0].system,
        classes=classes,
        log_probs=np.concatenate([table.with_classes(classes).log_probs for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
    )


def confused_pairs(scored: ScoredRows, limit: int = 12) -> list[tuple[str, str, int, float]]:
    """Return the most frequent confusions: true class, predicted class, rows, share of the true class."""
    off = scored.confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:limit]
    support, classes = scored.confusion.sum(axis=1), scored.table.classes
    cells = [divmod(int(cell), len(classes)) for cell in order if off.flat[cell]]
    return [(classes[t], classes[p], int(off[t, p]), float(off[t, p] / support[t])) for t, p in cells]


def write_confusion(path: Path, scored: ScoredRows) -> Path:
    """Write counts with true classes by row and predicted classes by column; return the path."""
    frame = pd.DataFrame(scored.confusion)
    frame.insert(0, "true_class", scored.table.classes)
    return write_csv(path, frame, ["true_class", *scored.table.classes])


def write_csv(path: Path, frame: pd.DataFrame, header: Sequence[str] = (), digits: str = "%.6f") -> Path:
    """Write a UTF-8 CSV atomically, with cells escaped that a spreadsheet would run as a formula; return its path.

    `header`: column names that replace the frame's. `digits`: the format of floats.
    """
    frame = frame.copy(deep=False)
    for name in frame.select_dtypes(exclude="number"):
        frame[name] = frame[name].map(escape_formula)
    header = [escape_formula(name) for name in header or frame.columns]
    with atomic(path) as temporary:
        frame.to_csv(temporary, header=header, index=False, float_format=digits, lineterminator="\n")
    return path


def escape_formula(text: str) -> str:
    """Prefix a text that a spreadsheet would run as a formula with a quote; a number such as -5 stays unchanged."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) and not NUMBER.fullmatch(text) else text
