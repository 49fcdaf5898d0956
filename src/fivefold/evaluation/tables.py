"""The scored rows of an evaluation, and the tables that people open: per class, confusions, mistakes."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fivefold.errors import DataError
from fivefold.evaluation import metrics
from fivefold.predictions import Predictions, sample

WRONG_COLUMNS = ("id", "path", "true_class", "predicted_class", "confidence")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Mistake:
    """A row whose predicted class is not the true one, and the probability of that prediction."""

    id: str
    path: str
    true_class: str
    predicted_class: str
    confidence: float


@dataclass(frozen=True)
class Scored:
    """Predictions with their truth, and which models and rows they speak of.

    `name` is "test", "holdout" or "oof"; `what` says the models and `rows` the rows in words;
    `paths` gives the image of a row id, where it is known.
    """

    name: str
    what: str
    rows: str
    table: Predictions
    paths: Mapping[str, str]

    @cached_property
    def codes(self) -> np.ndarray:
        """True class indices [N]."""
        return self.table.codes()

    @cached_property
    def confusion(self) -> np.ndarray:
        """Counts [C, C], true class by row."""
        return metrics.confusion_matrix(self.table.log_probs, self.codes)

    def figures(self, top_k: int, bins: int) -> dict[str, float | int | str]:
        """All scores, after `what` and `rows`."""
        return {
            "what": self.what,
            "rows": self.rows,
            **metrics.full_report(self.table.log_probs, self.codes, top_k, bins),
        }

    def mistakes(self, most: int | None = None) -> list[Mistake]:
        """The mistakes, the most confident first, at most `most`; equal ones by id."""
        guesses = metrics.predicted(self.table.log_probs)
        wrong = np.flatnonzero(guesses != self.codes)
        sure = self.table.log_probs[wrong, guesses[wrong]].astype(np.float64)
        order = wrong[np.lexsort((self.table.ids[wrong].astype(str), -sure))][:most]
        return [self._mistake(int(row), int(guesses[row])) for row in order]

    def _mistake(self, row: int, guess: int) -> Mistake:
        name, classes = str(self.table.ids[row]), self.table.classes
        sure = min(float(np.exp(self.table.log_probs[row, guess])), 1.0)
        return Mistake(name, self.paths.get(name, ""), classes[self.codes[row]], classes[guess], sure)


def stacked(tables: Sequence[Predictions]) -> Predictions:
    """The rows of all tables under one another, classes sorted by name.

    Raises a DataError when they know different classes or one has no labels.
    """
    classes = tuple(sorted(tables[0].classes))
    unlabelled = [table.system for table in tables if table.labels is None]
    if unlabelled:
        raise DataError(f"predictions of {sample(unlabelled)} carry no labels, so they cannot be scored")
    return Predictions(
        ids=np.concatenate([table.ids for table in tables]),
        fold=np.concatenate([table.fold for table in tables]),
        system=tables[0].system,
        classes=classes,
        log_probs=np.concatenate([table.with_classes(classes).log_probs for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
    )


def confused_pairs(scored: Scored, most: int = 12) -> list[tuple[str, str, int, float]]:
    """The most frequent confusions: true class, predicted class, rows, share of the true class."""
    off = scored.confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    support, classes = scored.confusion.sum(axis=1), scored.table.classes
    cells = [divmod(int(cell), len(classes)) for cell in order if off.flat[cell]]
    return [(classes[t], classes[p], int(off[t, p]), float(off[t, p] / support[t])) for t, p in cells]


def write_per_class(path: Path, scored: Scored) -> None:
    table = metrics.per_class_table(scored.table.log_probs, scored.codes)
    header = ("class", "precision", "recall", "f1", "support", "predicted")
    columns = [[f"{value:.6f}" for value in table[name]] for name in header[1:4]]
    columns += [table[name].tolist() for name in header[4:]]
    write_csv(path, header, zip(scored.table.classes, *columns, strict=True))


def write_confusion(path: Path, scored: Scored) -> None:
    """True classes by row, predicted ones by column, counts."""
    names = scored.table.classes
    rows = ((name, *counts) for name, counts in zip(names, scored.confusion.tolist(), strict=True))
    write_csv(path, ("true_class", *names), rows)


def write_mistakes(path: Path, mistakes: Iterable[Mistake]) -> None:
    rows = ((m.id, m.path, m.true_class, m.predicted_class, f"{m.confidence:.6f}") for m in mistakes)
    write_csv(path, WRONG_COLUMNS, rows)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV in UTF-8, in which no cell is a formula to a spreadsheet."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([harmless(cell) for cell in header])
        writer.writerows([harmless(cell) for cell in row] for row in rows)


def harmless(cell: object) -> object:
    """`cell`, with a quote before text that a spreadsheet would run as a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
