"""Submission files: the columns of the sample, to the letter and in its order. No torch."""

import codecs
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from fivefold.data.evals import Submission
from fivefold.data.same_classes import SameClasses
from fivefold.errors import DataError
from fivefold.inference.figures import lines
from fivefold.predictions import Predictions, sample

AS_NAMED = SameClasses()


def write_submission(path: Path, table: Predictions, wanted: Submission, same: SameClasses = AS_NAMED) -> None:
    """Writes the rows and columns that are `wanted`, in that order, as its header and its ends of lines are.

    Columns that are the classes get probabilities, classes that mean the `same` by their policy; a single column
    that is no class gets the predicted class. Raises a DataError that names ids or classes which do not fit.
    """
    rows = table.in_order(wanted.ids)
    if len(wanted.ids) != len(table):
        extra = sorted(set(table.ids) - set(wanted.ids))
        raise DataError(f"the sample submission lacks {len(extra)} ids of the test table: {sample(extra)}")
    check_columns(wanted.classes, table.classes, same)
    labels = wants_labels(wanted.classes, same.names(table.classes))
    values = _labels(rows, same) if labels else _texts(_probabilities(rows, wanted.classes, same))
    with open(path, "w", encoding="utf-8-sig" if wanted.marked else "utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=wanted.end)
        writer.writerow(wanted.header)
        for number, (name, row) in enumerate(zip(rows.ids, values, strict=True)):
            writer.writerow([*([number] if wanted.numbered else []), name, *row])


class SubmissionWriter:
    """A submission that is written a block of rows at a time, its probabilities with seven digits, as 1.234567e-02.

    Columns as `write_submission` has them, checked before; no classes mean the same. Rows are numbered beside labels alone.
    """

    def __init__(self, file: IO[bytes], wanted: Submission, classes: Sequence[str]) -> None:
        self.file, self.classes, self.rows = file, classes, 0
        self.numbered, self.end = bool(wanted.numbered), wanted.end
        self.labels = wants_labels(wanted.classes, classes)
        place = {name: code for code, name in enumerate(classes)}
        codes = [] if self.labels else [place[name] for name in wanted.classes]
        self.order = slice(None) if codes == list(range(len(classes))) else codes  # a slice copies nothing
        file.write((codecs.BOM_UTF8 if wanted.marked else b"") + _csv([wanted.header], self.end))

    def write(self, ids: pa.Array, log_probs: np.ndarray) -> None:
        """The rows of `ids` [n], texts, with log_probs [C, n], class by class."""
        if not self.labels:
            self.file.writelines(lines(ids, log_probs[self.order].T, self.end.encode()))
            return
        names = [self.classes[code] for code in np.argmax(log_probs, axis=0)]
        numbers, texts = range(self.rows, self.rows + len(ids)), ids.to_pylist()
        rows = zip(numbers, texts, names, strict=True) if self.numbered else zip(texts, names, strict=True)
        self.file.write(_csv(rows, self.end))
        self.rows += len(ids)


def _csv(rows: Iterable[Sequence[object]], end: str) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows(rows)
    return text.getvalue().encode()


def check_columns(columns: Sequence[str], classes: Sequence[str], same: SameClasses = AS_NAMED) -> None:
    """Raises a DataError, with the names, for columns that are no class of the models, and for classes without a column."""
    if wants_labels(columns, same.names(classes)):
        return
    matrix = same.columns(classes, columns)
    unknown = [name for name, used in zip(columns, matrix.any(axis=0), strict=True) if not used]
    without = [name for name, used in zip(classes, matrix.any(axis=1), strict=True) if not used]
    without += sorted(set(same.names(classes)) - {*classes, *columns})
    if unknown or without:
        parts = [f"{sample(sorted(unknown))} unknown to the models"] if unknown else []
        parts += [f"{sample(sorted(without))} without a column"] if without else []
        raise DataError(
            f"the sample submission's columns are not the models' classes: {', '.join(parts)}; behind its first column, "
            "of the ids, a sample has one column a class, or a single one for the predicted class"
        )


def wants_labels(columns: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether `columns` are those of a submission of labels: one, which is no class."""
    return len(columns) == 1 and columns[0] not in classes


def _labels(table: Predictions, same: SameClasses) -> list[list[str]]:
    """The predicted class of each row: of summed classes, by their sum, the most probable name."""
    probabilities = _probabilities(table, table.classes, same) if same.policy == "sum" else np.exp(table.log_probs)
    best = probabilities.max(axis=1, keepdims=True)
    # Names of one sum are tied: their own probabilities part them.
    codes = np.where(probabilities >= best * (1 - 1e-12), table.log_probs, -np.inf).argmax(axis=1)
    return [[table.classes[code]] for code in codes]


def _probabilities(table: Predictions, columns: Sequence[str], same: SameClasses) -> np.ndarray:
    """Probabilities of the `columns` [N, W], each row brought to sum 1."""
    probabilities = np.exp(table.log_probs.astype(np.float64)) @ same.columns(table.classes, columns)
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def _texts(probabilities: np.ndarray) -> list[list[str]]:
    return [[f"{value:.9g}" for value in row] for row in probabilities]
