"""The log loss of a submission file, by the rules of the competition that scores it (Dacon 236493)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fivefold.contract.spelling import plain_name
from fivefold.errors import DataError
from fivefold.evaluation.metrics import competition_logloss
from fivefold.evaluation.truth import read_cells
from fivefold.predictions import sample


def submission_logloss(path: Path, truth: Mapping[str, str]) -> float:
    """The log loss of the file at `path` against the class names `truth` by id, in nats.

    The first column is the id, every other one a class. Both tables are sorted by id; rows are brought to
    sum 1 and clipped to [1e-15, 1 - 1e-15]. Raises a DataError for another number of rows, other ids, no
    column of a true class, NaN, values outside [0, 1], or a row of zeros.
    """
    header, rows = read_cells(path)
    classes = [plain_name(name) for name in header[1:]]
    rows = sorted(rows, key=lambda row: row[0])
    ids = sorted(truth)
    if len(rows) != len(ids):
        raise DataError(f"{path} has {len(rows)} rows, the truth {len(ids)}")
    other = [row[0] for row, name in zip(rows, ids, strict=True) if row[0] != name]
    if other:
        raise DataError(f"{path}: ids are not those of the truth: {sample(sorted(set(other) - set(ids)) or other)}")
    missing = sorted(set(truth.values()) - set(classes))
    if missing:
        raise DataError(f"{path} has no column of {len(missing)} true classes: {sample(missing)}")
    probs = _values(path, [row[1:] for row in rows])
    place = {name: code for code, name in enumerate(classes)}
    return competition_logloss(probs, np.array([place[truth[name]] for name in ids]))


def _values(path: Path, cells: list[list[str]]) -> np.ndarray:
    try:
        probs = np.array([[cell or "nan" for cell in row] for row in cells], dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: a cell holds what is no number: {error}") from error
    if np.isnan(probs).any():
        raise DataError(f"{path} holds NaN in {np.isnan(probs).any(axis=1).sum()} rows")
    outside = (probs < 0) | (probs > 1)
    if outside.any():
        raise DataError(f"{path} holds {probs[outside][0]:g}, outside [0, 1]")
    if (probs.sum(axis=1) == 0).any():
        raise DataError(f"{path}: {(probs.sum(axis=1) == 0).sum()} rows hold zeros alone")
    return probs
