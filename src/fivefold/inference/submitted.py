"""Submission files of any origin as predictions, matched by id and by class name, never by position. No torch."""

import logging
from collections.abc import Collection, Sequence
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
from fivefold.data.same_classes import SameClasses
from fivefold.errors import DataError
from fivefold.evaluation.metrics import FLOOR
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


def names_classes_alone(path: Path) -> bool:
    """Whether a file has one column of predicted classes, rather than one of probabilities a class."""
    return len([name for name in open_csv(path).plain_columns[1:] if name not in PATH_NAMES]) < 2


def read_submitted(
    path: Path,
    ids: Collection[str] | None = None,
    classes: Sequence[str] = (),
    same: SameClasses | None = None,
    all_ids: bool = True,
) -> Predictions:
    """A file of ids and a column of probabilities a class, or of ids and predicted classes, as predictions.

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
    by_label = len(cells.columns) == 1 and cells.columns[0] not in wanted
    columns, shares = (_of_labels if by_label else _of_probabilities)(table, cells, wanted)
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
    columns = cells.columns.tolist()
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


def _of_labels(table: CsvFile, cells: pd.DataFrame, wanted: Collection[str]) -> tuple[list[str], np.ndarray]:
    """The classes, and 1 for the one that each row names and FLOOR for the others [N, C]."""
    check_filled(cells.iloc[:, 0], "class", table)
    labels = plain_names(cells.iloc[:, 0])
    columns = sorted(wanted or labels.unique())
    unknown = sorted(set(labels) - set(columns))
    if unknown:
        raise DataError(f"{table}: predicted classes that the models do not know: {sample(unknown)}")
    return columns, _shares(np.eye(len(columns))[pd.Index(columns).get_indexer(labels)])


def _shares(probs: np.ndarray) -> np.ndarray:
    """Each row of `probs` [N, C] brought to sum 1 and clipped to [FLOOR, 1]."""
    probs = np.clip(probs / probs.sum(axis=1, keepdims=True), FLOOR, 1)
    return probs / probs.sum(axis=1, keepdims=True)
