"""The truth of rows, as a CSV has it, and how predictions and answers fare against it."""

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from fivefold.contract.spelling import TRUTHS, plain_name, truth_among
from fivefold.csv_tables import (
    CLASS_NAMES,
    ID_NAMES,
    CsvFile,
    check_filled,
    check_same_ids,
    check_unique,
    is_index,
    open_csv,
    plain_names,
)
from fivefold.errors import DataError, MissingInputError
from fivefold.predictions import Predictions, sample

log = logging.getLogger("fivefold")


def truth_file(where: Path) -> Path:
    """The CSV of the truth: `where` itself, or in that folder gt.csv, ground_truth.csv (in any case), or the only CSV."""
    if where.is_file():
        return where
    found = [path for path in sorted(where.glob("*.[cC][sS][vV]")) if path.is_file()]
    if name := truth_among(path.name for path in found):
        return where / name
    if len(found) == 1:
        return found[0]
    listed = ", ".join(path.name for path in found) or "no CSV"
    raise MissingInputError(f"no {' or '.join(TRUTHS)} in {where} (found: {listed}); name the truth gt.csv")


def read_truth(path: Path, id_column: str = "", ids: Collection[str] = ()) -> dict[str, str]:
    """Class names by row id.

    Ids are the column called `id_column`, else id, else the first one with a name; where it has not the `ids`,
    any that has them. The class is the first of CLASS_NAMES that is there, else the one other column.
    Raises a DataError for an empty table, an id that stands twice, a row without a class, or several columns
    that could be the class.
    """
    table = open_csv(path)
    if len(table.columns) < 2:
        raise DataError(f"{path} has {len(table.columns)} column; the truth needs an id and a class")
    frame, plain = table.read(), dict(zip(table.columns, table.plain_columns, strict=True))
    known, wanted = [name for name in (plain_name(id_column).lower(), *ID_NAMES) if name], set(ids)
    columns = [name for name in frame if plain[name] not in CLASS_NAMES] or list(frame)[:1]
    columns.sort(
        key=lambda name: (known.index(plain[name]) if plain[name] in known else len(known), is_index(plain[name]))
    )
    row_id = next((name for name in columns if wanted and set(frame[name]) == wanted), columns[0])
    label, *others = _class_columns(table, row_id)
    unused = f" (not {', '.join(map(repr, others))})" if others else ""
    log.info("%s: ids are its column %r, classes %r%s", path, row_id, label, unused)
    check_unique(frame[row_id], path)
    check_filled(frame[label], "class", path)
    return dict(zip(frame[row_id], plain_names(frame[label]), strict=True))


def _class_columns(table: CsvFile, row_id: str) -> list[str]:
    """All columns called like classes, the best first; the one other column where none is."""
    plain = dict(zip(table.plain_columns, table.columns, strict=True))
    if called := [plain[name] for name in CLASS_NAMES if name in plain and plain[name] != row_id]:
        return called
    rest = [name for name in table.columns if name != row_id]
    rest = [name for name in rest if not is_index(plain_name(name).lower())] or rest
    if len(rest) > 1:
        raise DataError(
            f"{table} does not say which column is the class: {', '.join(map(repr, rest))}; "
            f"call it {', '.join(CLASS_NAMES[:2])} or the like"
        )
    return rest


def with_truth(table: Predictions, truth: dict[str, str], where: Path) -> Predictions:
    """`table` with labels; a DataError unless ids are the same on both sides and every class is known."""
    ids = [str(name) for name in table.ids]
    check_same_ids(truth, str(where), ids, "the predictions")
    unknown = sorted(set(truth.values()) - set(table.classes))
    if unknown:
        raise DataError(
            f"{where}: classes that the model does not know: {sample(unknown)}; it knows {sample(table.classes)}"
        )
    return replace(table, labels=np.array([truth[name] for name in ids], dtype=object))


def score_answers(answers: dict[str, str], truth: dict[str, str], where: Path) -> dict[str, float | int]:
    """`accuracy` and `f1_macro` (over the classes that occur as truth or as answer) of `n` rows, and `n`.

    Raises a DataError unless answers and truth are of the same ids.
    """
    from sklearn.metrics import accuracy_score, f1_score

    check_same_ids(truth, str(where), answers, "the answers")
    right, guesses = list(truth.values()), [answers[name] for name in truth]
    f1 = f1_score(right, guesses, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(right, guesses)), "f1_macro": float(f1), "n": len(right)}
