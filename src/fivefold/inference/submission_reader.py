"""Read submission files of any origin as predictions, matched by id and class name, never by position. No torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from fivefold.contract.filenames import normalize_class_name
from fivefold.contract.stage_specs import PREDICTIONS
from fivefold.csv_tables import (
    PATH_NAMES,
    CsvFile,
    check_not_empty,
    check_same_ids,
    check_unique,
    is_number,
    normalize_names,
    open_csv,
)
from fivefold.data.class_aliases import ClassAliases
from fivefold.data.readers.eval_images import SampleSubmission
from fivefold.errors import DataError
from fivefold.evaluation.metrics import FLOOR
from fivefold.inference.submission import NO_ALIASES, AnswerFormat, detect_format, match_columns, match_name
from fivefold.log import log
from fivefold.predictions import Predictions, preview, read, read_system

SUM_TOLERANCE = 0.1
"""Fivefold warns if a row's sum differs from 1, or relatively from 100, by more than this."""
PREFIX = "output_"
"""The usual file name is output_<model>.csv; the system's name is the part after the prefix."""


def system_name(path: Path) -> str:
    """Return the system's name of a file: `eva` for output_eva.csv; the table `predictions.parquet` contains its name."""
    if path.name == PREDICTIONS:
        return read_system(path) or path.parent.name
    return path.stem.removeprefix(PREFIX) or path.stem


def has_one_column(path: Path) -> bool:
    """Return whether a file has a single answer column instead of one probability column per class."""
    return len(_answer_columns(open_csv(path))) < 2


def has_labels_only(path: Path) -> bool:
    """Return whether a file has a single column of predicted classes, by name or number, and no probabilities."""
    table = open_csv(path)
    columns = _answer_columns(table)
    return len(columns) < 2 and not any(_are_shares(table.read([name])[name]) for name in columns)


def read_submission(
    path: Path,
    ids: Collection[str] | None = None,
    classes: Sequence[str] = (),
    same: ClassAliases = NO_ALIASES,
    all_ids: bool = True,
    *,
    likely: Sequence[str] = (),
    answer: str = "auto",
    positive: str = "",
) -> Predictions:
    """Read a file of ids and one probability column per class, or of ids and a single answer column, as predictions.

    Answers are predicted classes, by name or number, or probabilities of one class. `detect_format` decides by the values, the
    classes (if there are none, the `likely` ones for numeric answers), and the settings `answer` and `positive`.

    The ids are the first column, or the column of image paths that has exactly the `ids`; one must, unless `all_ids` is
    false. Probabilities are normalised to sum 1 and clipped to [1e-15, 1], as competitions do. The file must have exactly
    the `classes` (of the models; merged names are summed) if they are passed. Raise a DataError with the path and the
    invalid ids, rows, classes or columns. A .parquet file is a table of predictions.
    """
    if is_table(path):
        return _read_table(path, ids if all_ids else None, classes, same)
    table, model_classes = open_csv(path), set(same.names(classes))
    if len(table.columns) < 2:
        raise DataError(f"{path} is not a submission: it needs an id column, class columns and rows")
    frame = table.read()
    named = [name for name, plain in zip(table.columns, table.normalized_columns, strict=True) if plain in PATH_NAMES]
    paths = [n for n in named if normalize_class_name(n) not in model_classes and not is_number(frame[n].iat[0])]
    first, expected = frame.columns[0], set() if ids is None else set(ids)
    row_id = next((name for name in (first, *paths) if set(frame[name]) == expected), first)
    check_unique(frame[row_id], path)
    if ids is not None and all_ids:
        check_same_ids(frame[row_id], str(path), ids, "the test table")
    cells = frame.drop(columns={first, row_id, *paths}).rename(columns=normalize_class_name)
    if cells.columns.empty or cells.columns.has_duplicates:
        raise DataError(f"{path} needs class columns without duplicates; its columns are {', '.join(table.columns)}")
    if len(cells.columns) == 1 and (len(model_classes) < 3 or not match_name(cells.columns[0], sorted(model_classes))):
        columns, shares = _read_answers(table, cells.iloc[:, 0], sorted(model_classes), likely, answer, positive)
    else:
        columns, shares = _read_probabilities(table, cells, model_classes)
    predictions = Predictions(
        ids=frame[row_id].to_numpy(object),
        fold=np.full(len(frame), -1, np.int16),
        system=system_name(path),
        classes=tuple(columns),
        log_probs=np.log(shares).astype(np.float32),
    )
    predictions = same.merge_table(predictions)
    return predictions.with_classes(classes or sorted(predictions.classes))


def is_table(path: Path) -> bool:
    """Return whether a file is a table of predictions and not a CSV, by its name."""
    return path.suffix.lower() == ".parquet"


def _read_table(path: Path, ids: Collection[str] | None, classes: Sequence[str], same: ClassAliases) -> Predictions:
    table = same.merge_table(replace(read(path), system=system_name(path), labels=None))
    if ids is not None:
        check_same_ids(table.ids, str(path), ids, "the test table")
    try:
        return table.with_classes(classes or sorted(table.classes))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def contains_labels(table: Predictions) -> bool:
    """Return whether each row has all its probability on one class, as in a file of predicted classes."""
    if len(table.classes) < 2:
        return True
    return bool((np.partition(table.log_probs, -2, axis=1)[:, -2] < np.log(2 * FLOOR)).all())


def _read_probabilities(
    table: CsvFile, cells: pd.DataFrame, classes: Collection[str]
) -> tuple[Sequence[str], np.ndarray]:
    """Return the classes and their probabilities [N, C], each row normalised to sum 1 and clipped to [FLOOR, 1]."""
    columns = match_columns(list(cells), sorted(classes), table) if classes else list(cells)
    probs = table.numbers(cells)
    sums = probs.sum(axis=1)
    bad = np.flatnonzero(~((probs >= 0) & (probs < np.inf)).all(axis=1) | ~((sums > 0) & (sums < np.inf)))
    if len(bad):
        raise DataError(
            f"{table}: {len(bad)} rows have invalid probabilities (NaN, infinite, negative or all 0), "
            f"the first in row {bad[0] + 1} below the header"
        )
    far = np.flatnonzero(np.minimum(np.abs(sums - 1), np.abs(sums / 100 - 1)) > SUM_TOLERANCE)
    if len(far):
        words = "rows sum neither to 1 nor to 100, the first in row"
        row, total = far[0] + 1, sums[far[0]]
        log.warning(
            "%s: %d %s %d below the header (to %g); all are divided by their sum", table, len(far), words, row, total
        )
    return columns, _normalise(probs)


def _read_answers(
    table: CsvFile, cells: pd.Series, classes: Sequence[str], likely: Sequence[str], answer: str, positive: str
) -> tuple[list[str], np.ndarray]:
    """Return the classes and their probabilities [N, C] from a single column: 1 for a row's class, or one class's probability."""
    check_not_empty(cells, "class", table)
    labels = normalize_names(cells)
    if not classes and (_are_shares(cells) or (_are_numbers(cells) and not all(map(is_number, likely)))):
        classes = sorted(likely)
    if not classes and _are_shares(cells):
        raise DataError(
            f"{table}: column {cells.name!r} holds probabilities of one class, but the names of the two classes are unknown; "
            "use one probability column per class"
        )
    known = classes or sorted(labels.unique())
    form = _form(table, cells, known, answer, positive) if classes else None
    if form and form.kind == "probability":
        shares = _numbers(cells)
        bad = np.flatnonzero(~((shares >= 0) & (shares <= 1)))
        if len(bad) or len(known) != 2:
            problem = f"row {bad[0] + 1} holds {cells.iat[bad[0]]!r}" if len(bad) else f"there are {len(known)} classes"
            raise DataError(f"{table}: the column should hold the probability of {form.names[0]!r}, but {problem}")
        return list(known), _normalise(np.where(np.array(known) == form.names[0], shares[:, None], 1 - shares[:, None]))
    if form:
        written = {cell: name for name, cell in form.cells.items()}
        labels = labels.map(lambda c: written.get(c) or _same_number(c, written) or match_name(c, known) or c)
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise DataError(f"{table}: predicted classes that are not classes of the models: {preview(unknown)}")
    return list(known), _normalise(np.eye(len(known))[pd.Index(known).get_indexer(labels)])


def _form(table: CsvFile, cells: pd.Series, classes: Sequence[str], answer: str, positive: str) -> AnswerFormat:
    """Return the format of a file's cells; whole numbers for two numeric classes are class names, which is never ambiguous."""
    column = normalize_class_name(str(cells.name))
    form = SampleSubmission(table.columns[0], (column,), cells.to_numpy(object), values=tuple(cells.unique()))
    whole = _are_numbers(cells) and not _are_shares(cells) and len(classes) == 2 and all(map(is_number, classes))
    answer = "class" if whole and answer == "auto" else answer
    try:
        return detect_format(replace(form, answer=answer, positive=positive), classes)
    except DataError as error:
        raise DataError(f"{table}: {error}") from error


def _answer_columns(table: CsvFile) -> list[str]:
    return [
        name
        for name, plain in zip(table.columns[1:], table.normalized_columns[1:], strict=True)
        if plain not in PATH_NAMES
    ]


def _numbers(cells: pd.Series) -> np.ndarray:
    """Return the cells as float64 [N], NaN for cells that are not numbers; a comma is a decimal comma."""
    return pd.to_numeric(cells.str.replace(",", ".", regex=False), errors="coerce").to_numpy(np.float64)


def _are_numbers(cells: pd.Series) -> bool:
    return bool(np.isfinite(_numbers(cells)).all())


def _are_shares(cells: pd.Series) -> bool:
    """Return whether all cells are numbers from 0 to 1, and some lie between."""
    numbers = _numbers(cells)
    return bool(((numbers >= 0) & (numbers <= 1)).all() and (numbers % 1 != 0).any())


def _same_number(cell: str, written: Mapping[str, str]) -> str:
    """Return the class of the only cell in `written` that is the same number, as 0 and 0.0; "" for none."""
    numbers = {text: float(text) for text in (cell, *written) if is_number(text)}
    names = [name for text, name in written.items() if text in numbers and numbers[text] == numbers.get(cell)]
    return names[0] if len(names) == 1 else ""


def _normalise(probs: np.ndarray) -> np.ndarray:
    """Normalise each row of `probs` [N, C] to sum 1 and clip it to [FLOOR, 1]."""
    probs = np.clip(probs / probs.sum(axis=1, keepdims=True), FLOOR, 1)
    return probs / probs.sum(axis=1, keepdims=True)
