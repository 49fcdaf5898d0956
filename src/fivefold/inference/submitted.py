"""Submission files of any origin as predictions, matched by id and by class name, never by position. No torch."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from fivefold.contract.spelling import plain_name
from fivefold.contract.stages import PREDICTIONS
from fivefold.csv_tables import (
    PATH_NAMES,
    CsvFile,
    check_filled,
    check_same_ids,
    check_unique,
    is_number,
    open_csv,
    plain_names,
)
from fivefold.data.evals import Submission
from fivefold.data.same_classes import SameClasses
from fivefold.errors import DataError
from fivefold.evaluation.metrics import FLOOR
from fivefold.inference.answers import Form, form_of, match
from fivefold.predictions import Predictions, read, read_system, sample

log = logging.getLogger("fivefold")

FAR = 0.1
"""How far a row's sum may be from 1, or as a share from 100, before it is told."""
PREFIX = "output_"
"""Files are called output_<model>.csv by custom: their system's name is what follows."""


def system_name(path: Path) -> str:
    """What an ensemble calls the system that a file speaks for: `eva` for output_eva.csv; a table under its usual name says it."""
    if path.name == PREDICTIONS:
        return read_system(path) or path.parent.name
    return path.stem.removeprefix(PREFIX) or path.stem


def has_one_column(path: Path) -> bool:
    """Whether a file has one column of answers, rather than one of probabilities a class."""
    return len(_answer_columns(open_csv(path))) < 2


def names_classes_alone(path: Path) -> bool:
    """Whether a file has one column of predicted classes, by name or number, and no probability."""
    table = open_csv(path)
    columns = _answer_columns(table)
    return len(columns) < 2 and not (columns and _are_shares(table.read(columns)[columns[0]]))


def read_submitted(
    path: Path,
    ids: Collection[str] | None = None,
    classes: Sequence[str] = (),
    same: SameClasses | None = None,
    all_ids: bool = True,
    *,
    likely: Sequence[str] = (),
    answer: str = "auto",
    positive: str = "",
) -> Predictions:
    """A file of ids and a column of probabilities a class, or of ids and one column of answers, as predictions.

    Answers are predicted classes, by name or number, or probabilities of one class, as `form_of` says of the values, the
    classes (without any the `likely` ones, where they are numbers), and the settings `answer` and `positive`.

    The ids are the first column, or that of image paths where it has the `ids`; unless `all_ids` is false,
    one of them must have these and no others. Probabilities are brought
    to sum 1 and clipped to [1e-15, 1] as competitions do, so that a file of classes alone says 1 and 1e-15.
    With `classes` given (those of the models; merged names are added up) these and no others must be there;
    otherwise they are the file's. Raises a DataError with the path and the names of ids (missing or further
    ones, or twice), rows (no finite probability), classes and columns that do not fit. A .parquet is a table of predictions.
    """
    same = same or SameClasses()
    if is_table(path):
        return _of_table(path, ids if all_ids else None, classes, same)
    table, wanted = open_csv(path), set(same.names(classes))
    if len(table.columns) < 2:
        raise DataError(f"{path} is no submission: an id column, class columns and rows are needed")
    frame = table.read()
    paths = [name for name in frame if _holds_paths(plain_name(name), frame[name].iat[0], wanted)]
    row_id = _id_column(path, frame, paths, ids, all_ids)
    cells = frame.drop(columns={frame.columns[0], row_id, *paths}).rename(columns=plain_name)
    if cells.columns.empty or cells.columns.has_duplicates:
        raise DataError(f"{path} has no columns of classes, each once, but {', '.join(table.columns)}")
    if len(cells.columns) == 1 and (len(wanted) < 3 or not match(cells.columns[0], sorted(wanted))):
        columns, shares = _of_answers(table, cells.iloc[:, 0], sorted(wanted), likely, answer, positive)
    else:
        columns, shares = _of_probabilities(table, cells, wanted)
    found = Predictions(
        ids=frame[row_id].to_numpy(object),
        fold=np.full(len(frame), -1, np.int16),
        system=system_name(path),
        classes=tuple(columns),
        log_probs=np.log(shares).astype(np.float32),
    )
    found = same.merge_table(found)
    return found.with_classes(classes or sorted(found.classes))


def is_table(path: Path) -> bool:
    """Whether a file is a table of predictions, by its name, and no CSV."""
    return path.suffix.lower() == ".parquet"


def _of_table(path: Path, ids: Collection[str] | None, classes: Sequence[str], same: SameClasses) -> Predictions:
    found = same.merge_table(replace(read(path), system=system_name(path), labels=None))
    if ids is not None:
        check_same_ids(found.ids, str(path), ids, "the test table")
    try:
        return found.with_classes(classes or sorted(found.classes))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def holds_labels(table: Predictions) -> bool:
    """Whether a file's rows say one class each and nothing of the others, as those of a file of classes alone do."""
    if len(table.classes) < 2:
        return True
    return bool((np.partition(table.log_probs, -2, axis=1)[:, -2] < np.log(2 * FLOOR)).all())


def _holds_paths(name: str, cell: str, wanted: Collection[str]) -> bool:
    return name.lower() in PATH_NAMES and name not in wanted and not is_number(cell)


def _id_column(
    path: Path, frame: pd.DataFrame, paths: Sequence[str], ids: Collection[str] | None, all_ids: bool
) -> str:
    """The first column whose values are `ids`, of the first one and those of `paths`; the first one where none is."""
    first, wanted = str(frame.columns[0]), set() if ids is None else set(ids)
    row_id = next((name for name in (first, *paths) if set(frame[name]) == wanted), first)
    check_unique(frame[row_id], path)
    if ids is not None and all_ids:
        check_same_ids(frame[row_id], str(path), ids, "the test table")
    return row_id


def _of_probabilities(table: CsvFile, cells: pd.DataFrame, wanted: Collection[str]) -> tuple[list[str], np.ndarray]:
    """The classes and their probabilities [N, C], each row brought to sum 1 and clipped to [FLOOR, 1]."""
    columns = [match(name, sorted(wanted)) or name for name in cells.columns]
    columns = columns if len(set(columns)) == len(columns) else cells.columns.tolist()
    if wanted and set(columns) != set(wanted):
        missing, other = sorted(set(wanted) - set(columns)), sorted(set(columns) - set(wanted))
        parts = [f"no column of {sample(missing)}"] if missing else []
        parts += [f"columns that are no class of the models: {sample(other)}"] if other else []
        raise DataError(f"{table}: {'; '.join(parts)}")
    probs = table.numbers(cells)
    sums = probs.sum(axis=1)
    bad = np.flatnonzero(~((probs >= 0) & (probs < np.inf)).all(axis=1) | ~((sums > 0) & (sums < np.inf)))
    if len(bad):
        raise DataError(
            f"{table}: {len(bad)} rows hold no probabilities (NaN, infinite, negative or all 0), "
            f"the first in row {bad[0] + 1} below the header"
        )
    far = np.flatnonzero(np.minimum(np.abs(sums - 1), np.abs(sums / 100 - 1)) > FAR)
    if len(far):
        log.warning(
            "%s: %d rows sum neither to 1 nor to 100, the first in row %d below the header (to %g); "
            "each is divided by its sum",
            table,
            len(far),
            far[0] + 1,
            sums[far[0]],
        )
    return columns, _shares(probs)


def _of_answers(
    table: CsvFile, cells: pd.Series, wanted: Sequence[str], likely: Sequence[str], answer: str, positive: str
) -> tuple[list[str], np.ndarray]:
    """The classes and their probabilities [N, C] by one column: 1 for the class that a row names, or that of one class."""
    check_filled(cells, "class", table)
    labels = plain_names(cells)
    if not wanted and (_are_shares(cells) or (_are_numbers(cells) and not all(map(is_number, likely)))):
        wanted = sorted(likely)
    if not wanted and _are_shares(cells):
        raise DataError(
            f"{table}: column {cells.name!r} holds probabilities of one class, and nothing here names the two classes; "
            "give a column of probabilities a class"
        )
    known = wanted or sorted(labels.unique())
    form = _form(table, cells, known, answer, positive) if wanted else None
    if form and form.kind == "probability":
        shares = _numbers(cells)
        bad = np.flatnonzero(~((shares >= 0) & (shares <= 1)))
        if len(bad) or len(known) != 2:
            where = (
                f"{cells.iat[bad[0]]!r} in row {bad[0] + 1} below the header" if len(bad) else f"{len(known)} classes"
            )
            raise DataError(f"{table}: a column of the probability of {form.names[0]!r}, but {where}")
        return list(known), _shares(np.where(np.array(known) == form.names[0], shares[:, None], 1 - shares[:, None]))
    if form:
        written = {cell: name for name, cell in form.cells.items()}
        labels = labels.map(lambda cell: written.get(cell) or _same_number(cell, written) or match(cell, known) or cell)
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise DataError(f"{table}: predicted classes that the models do not know: {sample(unknown)}")
    return list(known), _shares(np.eye(len(known))[pd.Index(known).get_indexer(labels)])


def _form(table: CsvFile, cells: pd.Series, classes: Sequence[str], answer: str, positive: str) -> Form:
    """What the cells of a file say; whole numbers of two classes are either class, so nothing is asked for these."""
    column = plain_name(str(cells.name))
    form = Submission(table.columns[0], (column,), cells.to_numpy(object), values=tuple(cells.unique()))
    whole = _are_numbers(cells) and not _are_shares(cells) and len(classes) == 2 and all(map(is_number, classes))
    try:
        return form_of(
            replace(form, answer="class" if whole and answer == "auto" else answer, positive=positive), classes
        )
    except DataError as error:
        raise DataError(f"{table}: {error}") from error


def _answer_columns(table: CsvFile) -> list[str]:
    return [
        name for name, plain in zip(table.columns[1:], table.plain_columns[1:], strict=True) if plain not in PATH_NAMES
    ]


def _numbers(cells: pd.Series) -> np.ndarray:
    """The cells as float64 [N], NaN for what is no number; a comma is a decimal comma."""
    return pd.to_numeric(cells.str.replace(",", ".", regex=False), errors="coerce").to_numpy(np.float64)


def _are_numbers(cells: pd.Series) -> bool:
    return bool(np.isfinite(_numbers(cells)).all())


def _are_shares(cells: pd.Series) -> bool:
    """Whether all cells are numbers from 0 to 1, and some are neither."""
    numbers = _numbers(cells)
    return bool(((numbers >= 0) & (numbers <= 1)).all() and (numbers % 1 != 0).any())


def _same_number(cell: str, written: Mapping[str, str]) -> str:
    """The class of the one cell among `written` that is the same number, as 0 is 0.0; "" for none."""
    found = [
        name for each, name in written.items() if is_number(each) and is_number(cell) and float(each) == float(cell)
    ]
    return found[0] if len(found) == 1 else ""


def _shares(probs: np.ndarray) -> np.ndarray:
    """Each row of `probs` [N, C] brought to sum 1 and clipped to [FLOOR, 1]."""
    probs = np.clip(probs / probs.sum(axis=1, keepdims=True), FLOOR, 1)
    return probs / probs.sum(axis=1, keepdims=True)
