"""Ground truth: read true classes from a CSV, and score predictions and answers against them."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from fivefold.contract.filenames import GROUND_TRUTH_NAMES, normalize_class_name, pick_ground_truth_file
from fivefold.csv_tables import (
    CLASS_NAMES,
    ID_NAMES,
    CsvFile,
    check_not_empty,
    check_same_ids,
    check_unique,
    is_index,
    normalize_names,
    open_csv,
)
from fivefold.errors import DataError, MissingInputError
from fivefold.log import log
from fivefold.predictions import Predictions, preview


def find_ground_truth_file(where: Path) -> Path:
    """Return the ground-truth CSV: `where` itself, or gt.csv, ground_truth.csv (in any case) or the only CSV in that folder."""
    if where.is_file():
        return where
    tables = [path.name for path in sorted(where.glob("*.[cC][sS][vV]")) if path.is_file()]
    if name := pick_ground_truth_file(tables) or (tables[0] if len(tables) == 1 else ""):
        return where / name
    listed = ", ".join(tables) or "no CSV"
    raise MissingInputError(
        f"no {' or '.join(GROUND_TRUTH_NAMES)} in {where} (found: {listed}); rename the ground truth to gt.csv"
    )


def read_ground_truth(path: Path, id_column: str = "", ids: Collection[str] = ()) -> dict[str, str]:
    """Read class names by row id.

    The id column is `id_column`, else id, else the first named column; if it does not contain exactly the `ids`,
    another column that does. The class column is the first of CLASS_NAMES in the table, else the only other column.
    Raise a DataError for an empty table, a duplicate id, a row without a class, or an ambiguous class column.
    """
    table = open_csv(path)
    if len(table.columns) < 2:
        raise DataError(f"{path} has {len(table.columns)} column; a ground truth needs an id column and a class column")
    frame, plain = table.read(), dict(zip(table.columns, table.normalized_columns, strict=True))
    known, expected = [name for name in (normalize_class_name(id_column).lower(), *ID_NAMES) if name], set(ids)
    columns = [name for name in frame if plain[name] not in CLASS_NAMES] or list(frame)[:1]
    columns.sort(
        key=lambda name: (known.index(plain[name]) if plain[name] in known else len(known), is_index(plain[name]))
    )
    row_id = next((name for name in columns if expected and set(frame[name]) == expected), columns[0])
    label, *others = _class_columns(table, row_id)
    unused = f" (not {', '.join(map(repr, others))})" if others else ""
    log.info("%s: id column %r, class column %r%s", path, row_id, label, unused)
    check_unique(frame[row_id], path)
    check_not_empty(frame[label], "class", path)
    return dict(zip(frame[row_id], normalize_names(frame[label]), strict=True))


def _class_columns(table: CsvFile, row_id: str) -> list[str]:
    """Return all columns with class-like names, best first; if there are none, the only other column."""
    plain = dict(zip(table.normalized_columns, table.columns, strict=True))
    if named := [plain[name] for name in CLASS_NAMES if name in plain and plain[name] != row_id]:
        return named
    others = [name for name in table.columns if name != row_id]
    others = [name for name in others if not is_index(normalize_class_name(name).lower())] or others
    if len(others) > 1:
        raise DataError(
            f"{table}: it is unclear which column is the class: {', '.join(map(repr, others))}; "
            f"rename it to {' or '.join(CLASS_NAMES[:2])}"
        )
    return others


def add_labels(table: Predictions, truth: dict[str, str], where: Path) -> Predictions:
    """Return `table` with labels; raise a DataError if ids differ or a true class is unknown to the table."""
    check_same_ids(truth, str(where), table.ids, "the predictions")
    if unknown := sorted(set(truth.values()) - set(table.classes)):
        raise DataError(
            f"{where}: unknown classes {preview(unknown)}; the model's classes are {preview(table.classes)}"
        )
    return replace(table, labels=np.array([truth[name] for name in table.ids], dtype=object))


def score_labels(answers: dict[str, str], truth: dict[str, str], where: Path) -> dict[str, float | int]:
    """Return `accuracy` and `f1_macro` (over the classes that occur as truth or answer) of `n` rows, and `n`.

    Raise a DataError unless answers and truth have the same ids.
    """
    from sklearn.metrics import accuracy_score, f1_score

    check_same_ids(truth, str(where), answers, "the answers")
    right, guesses = list(truth.values()), [answers[name] for name in truth]
    f1 = f1_score(right, guesses, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(right, guesses)), "f1_macro": float(f1), "n": len(right)}
