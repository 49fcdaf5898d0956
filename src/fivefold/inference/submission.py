"""Submission files: the columns of the sample, to the letter and in its order. No torch."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fivefold.errors import DataError
from fivefold.predictions import Predictions, sample


def write_submission(
    path: Path, table: Predictions, id_column: str, columns: Sequence[str], ids: Sequence[str], marked: bool = False
) -> None:
    """Writes `id_column` and `columns` for the rows of `ids`, in that order; `marked`: behind a byte-order mark.

    Columns that are the classes get probabilities; a single column that is no class gets the
    predicted class. Raises a DataError that names ids or classes which do not fit.
    """
    rows = table.in_order(ids)
    if len(ids) != len(table):
        extra = sorted(set(table.ids) - set(ids))
        raise DataError(f"the sample submission lacks {len(extra)} ids of the test table: {sample(extra)}")
    values = _labels(rows) if _wants_labels(columns, table.classes) else _probabilities(rows, columns)
    with open(path, "w", encoding="utf-8-sig" if marked else "utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([id_column, *columns])
        writer.writerows([name, *row] for name, row in zip(rows.ids, values, strict=True))


def _wants_labels(columns: Sequence[str], classes: Sequence[str]) -> bool:
    return len(columns) == 1 and columns[0] not in classes


def _labels(table: Predictions) -> list[list[str]]:
    return [[table.classes[code]] for code in table.log_probs.argmax(axis=1)]


def _probabilities(table: Predictions, columns: Sequence[str]) -> list[list[str]]:
    missing, extra = set(columns) - set(table.classes), set(table.classes) - set(columns)
    if missing or extra:
        raise DataError(
            f"the sample submission's columns are not the models' classes: {sample(sorted(missing))} unknown to the models"
            f", {sample(sorted(extra))} without a column"
        )
    probabilities = np.exp(table.with_classes(columns).log_probs.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return [[f"{value:.9g}" for value in row] for row in probabilities]
