"""Submission files of any origin as predictions, matched by id and by class name, never by position. No torch."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from fivefold.contract.spelling import plain_name
from fivefold.contract.stages import PREDICTIONS
from fivefold.data.same_classes import SameClasses
from fivefold.data.tables import PATH_NAMES
from fivefold.errors import DataError
from fivefold.evaluation.metrics import FLOOR
from fivefold.evaluation.truth import LABEL_COLUMNS, is_number, read_cells, refuse_repeated, shares
from fivefold.predictions import Predictions, read, read_system, sample

PREFIX = "output_"
"""Files are called output_<model>.csv by custom: their system's name is what follows."""


def system_name(path: Path) -> str:
    """What an ensemble calls the system that a file speaks for: `eva` for output_eva.csv; a table under its usual name says it."""
    if path.name == PREDICTIONS:
        return read_system(path) or path.parent.name
    return path.stem.removeprefix(PREFIX) or path.stem


def names_classes_alone(path: Path) -> bool:
    """Whether a file has one column of predicted classes, rather than one of probabilities a class."""
    return len([name for name in read_cells(path, 1)[0][1:] if plain_name(name).lower() not in PATH_NAMES]) < 2


def has_ids(path: Path, ids: Collection[str]) -> bool:
    """Whether the first column of a file, or one of its columns of image paths, holds exactly these ids."""
    header, rows = read_cells(path)
    paths = [at for at, name in enumerate(header) if plain_name(name).lower() in PATH_NAMES]
    return _place_of(rows, [0, *paths], set(ids)) is not None


def read_submitted(
    path: Path, ids: Collection[str] | None = None, classes: Sequence[str] = (), same: SameClasses | None = None
) -> Predictions:
    """A file of ids and a column of probabilities a class, or of ids and predicted classes, as predictions.

    The ids are the first column, or that of image paths where it has the `ids`. Probabilities are brought
    to sum 1 and clipped to [1e-15, 1] as competitions do, so that a file of classes alone says 1 and 1e-15.
    With `classes` given (those of the models; merged names are added up) these and no others must be there;
    otherwise they are the file's. Raises a DataError with the path and the names of ids (missing or further
    ones, or twice), rows (no finite probability), classes and columns that do not fit. A .parquet is a table of predictions.
    """
    if is_table(path):
        return _of_table(path, ids, classes, same or SameClasses())
    header, rows = read_cells(path)
    names, wanted = [plain_name(name) for name in header], set((same or SameClasses()).names(classes))
    refuse_repeated(names, f"{path}: columns stand twice")
    if not rows or len(names) < 2:
        raise DataError(f"{path} is no submission: an id column, class columns and rows are needed")
    paths = [at for at, name in enumerate(names) if _holds_paths(name, rows[0][at], wanted)]
    place = _id_column(path, rows, paths, ids)
    kept = [at for at in range(len(names)) if at not in {0, place, *paths}]
    if not kept:
        raise DataError(f"{path} has no column of classes, only {', '.join(names)}")
    by_label = len(kept) == 1 and names[kept[0]] not in wanted
    read = _of_labels if by_label else _of_probabilities
    columns, probs = read(path, [names[at] for at in kept], [[row[at] for at in kept] for row in rows], wanted)
    found = Predictions(
        ids=np.array([row[place] for row in rows], dtype=object),
        fold=np.full(len(rows), -1, np.int16),
        system=system_name(path),
        classes=tuple(columns),
        log_probs=np.log(shares(probs, path)).astype(np.float32),
    )
    found = same.merge_table(found) if same else found
    return found.with_classes(classes) if classes else found.with_classes(sorted(columns))


def is_table(path: Path) -> bool:
    """Whether a file is a table of predictions, by its name, and no CSV."""
    return path.suffix.lower() == ".parquet"


def _of_table(path: Path, ids: Collection[str] | None, classes: Sequence[str], same: SameClasses) -> Predictions:
    found = same.merge_table(replace(read(path), system=system_name(path), labels=None))
    there, wanted = set(found.ids), set(found.ids if ids is None else ids)
    if there != wanted:
        _refuse_other_rows(path, sorted(wanted - there), sorted(there - wanted), len(wanted), len(there))
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


def _id_column(path: Path, rows: list[list[str]], paths: list[int], ids: Collection[str] | None) -> int:
    """The place of the column whose values are `ids`: the first, or that of image paths; the first where ids are None."""
    wanted = None if ids is None else set(ids)
    at = 0 if wanted is None else _place_of(rows, [0, *paths], wanted)
    there = [row[at or 0] for row in rows]
    refuse_repeated(there, f"{path}: ids stand twice")
    if wanted is None or at is not None:
        return at or 0
    _refuse_other_rows(path, sorted(wanted - set(there)), sorted(set(there) - wanted), len(wanted), len(there))


def _refuse_other_rows(path: Path, missing: list[str], extra: list[str], wanted: int, there: int) -> NoReturn:
    parts = [f"{len(missing)} of the {wanted} test ids are not in it ({sample(missing)})"] if missing else []
    parts += [f"{len(extra)} of its {there} ids are not in the test table ({sample(extra)})"] if extra else []
    raise DataError(f"{path} speaks of other rows: {'; '.join(parts)}")


def _place_of(rows: list[list[str]], places: Sequence[int], wanted: set[str]) -> int | None:
    """The first of the places whose column holds exactly what is wanted, each once; None where none does."""
    return next((at for at in places if len(rows) == len(wanted) and {row[at] for row in rows} == wanted), None)


def _of_probabilities(
    path: Path, names: list[str], cells: list[list[str]], wanted: Collection[str]
) -> tuple[list[str], np.ndarray]:
    if wanted and set(names) != set(wanted):
        missing, other = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
        parts = [f"no column of {sample(missing)}"] if missing else []
        parts += [f"columns that are no class of the models: {sample(other)}"] if other else []
        raise DataError(f"{path}: {'; '.join(parts)}")
    try:
        probs = np.array(cells, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: a cell holds what is no number: {error}") from error
    bad = np.flatnonzero(~((probs >= 0) & (probs < np.inf)).all(axis=1) | (probs.sum(axis=1) == 0))
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} rows hold no probabilities (NaN, infinite, negative or all 0), the first in line {bad[0] + 2}"
        )
    return names, probs


def _of_labels(
    path: Path, names: list[str], cells: list[list[str]], wanted: Collection[str]
) -> tuple[list[str], np.ndarray]:
    if names[0].lower() not in (*LABEL_COLUMNS, "predicted_class", "prediction"):
        raise DataError(
            f"{path}: the column {names[0]!r} is no class of the models, nor called {', '.join(LABEL_COLUMNS)}"
        )
    labels = [plain_name(row[0]) for row in cells]
    columns = sorted(wanted or set(labels))
    place = {name: code for code, name in enumerate(columns)}
    unknown = sorted({label for label in labels if label not in place})
    if unknown:
        raise DataError(f"{path}: predicted classes that the models do not know: {sample(unknown)}")
    return columns, np.eye(len(columns))[[place[label] for label in labels]]
