"""The truth of test rows, and predictions that come as a competition's submission: CSVs to checked tables."""

import csv
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from fivefold.contract.spelling import TRUTHS, plain_name, truth_among
from fivefold.errors import DataError, MissingInputError
from fivefold.evaluation.metrics import FLOOR
from fivefold.predictions import Predictions, sample

log = logging.getLogger("fivefold")

LABEL_COLUMNS = ("target", "label", "class_name", "class", "category", "ans", "answer")
"""The names of a column of classes, the first one that is there goes: as training tables have them, then of answers."""
ID_COLUMNS = ("id", "imageid", "image_id")
FAR = 0.1
"""How far a row's sum may be from 1, or as a share from 100, before it is told."""


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
    any that has them. The class is the first of LABEL_COLUMNS that is there, else the one other column.
    Raises a DataError for an empty table, an id that stands twice, a row without a class, or several columns
    that could be the class.
    """
    header, rows = read_cells(path)
    if len(header) < 2:
        raise DataError(f"{path} has {len(header)} column; the truth needs an id and a class")
    if not rows:
        raise DataError(f"{path} holds no rows, only {','.join(header)}")
    at_id = _id_place(_plain(header), rows, id_column, ids)
    place, *others = _label_places(path, header, at_id)
    unused = f" (not {', '.join(repr(header[at]) for at in others)})" if others else ""
    log.info("%s: ids are its column %r, classes %r%s", path, header[at_id], header[place], unused)
    refuse_repeated([row[at_id] for row in rows], f"{path}: ids stand twice")
    unlabelled = [row[at_id] for row in rows if not row[place].strip()]
    if unlabelled:
        raise DataError(f"{path}: {len(unlabelled)} rows without a class: {sample(unlabelled)}")
    return {row[at_id]: plain_name(row[place]) for row in rows}


def _id_place(names: Sequence[str], rows: Sequence[Sequence[str]], called: str, ids: Collection[str]) -> int:
    """The place of the ids: by name, unless another column has the `ids` and this one has not."""
    known, wanted = [name for name in (plain_name(called).lower(), "id") if name], set(ids)
    places = [at for at, name in enumerate(names) if name not in LABEL_COLUMNS] or [0]
    places.sort(key=lambda at: (known.index(names[at]) if names[at] in known else len(known), _is_index(names[at])))
    return next((at for at in places if wanted and {row[at] for row in rows} == wanted), places[0])


def _label_places(path: Path, header: Sequence[str], at_id: int) -> list[int]:
    """The places of all columns called like classes, the best first; of the one other column where none is."""
    names, rest = _plain(header), [at for at in range(len(header)) if at != at_id]
    if called := [names.index(name) for name in LABEL_COLUMNS if name in names and names.index(name) != at_id]:
        return called
    rest = [at for at in rest if not _is_index(names[at])] or rest
    if len(rest) > 1:
        raise DataError(
            f"{path} does not say which column is the class: {', '.join(repr(header[at]) for at in rest)}; "
            f"call it {', '.join(LABEL_COLUMNS[:2])} or the like"
        )
    return rest


def with_truth(table: Predictions, truth: dict[str, str], where: Path) -> Predictions:
    """`table` with labels; a DataError unless ids are the same on both sides and every class is known."""
    ids = [str(name) for name in table.ids]
    predicted = set(ids)
    extra = [name for name in truth if name not in predicted]
    absent = [name for name in ids if name not in truth]
    _refuse_other_rows(where, extra, absent, len(truth), len(ids))
    labelled = replace(table, labels=np.array([truth[name] for name in ids], dtype=object))
    known = set(table.classes)
    unknown = sorted({label for label in truth.values() if label not in known})
    if unknown:
        raise DataError(
            f"{where}: classes that the model does not know: {sample(unknown)}; it knows {sample(table.classes)}"
        )
    return labelled


def read_submission(path: Path) -> Predictions:
    """A submission (first column ids, one column of probabilities a class) as predictions.

    Rows are brought to sum 1 and clipped as competitions do. Raises a DataError that names the
    row for what is no finite number at or above 0, or a row of zeros.
    """
    header, rows = read_cells(path)
    classes = [plain_name(name) for name in header[1:]]
    if len(classes) < 2 or not rows:
        raise DataError(f"{path} is no submission: an id column, at least two class columns and rows are needed")
    refuse_repeated(classes, f"{path}: columns stand twice")
    refuse_repeated([row[0] for row in rows], f"{path}: ids stand twice")
    probs = shares(np.array([_probabilities(row, path) for row in rows]), path)
    order = np.argsort(np.array(classes), kind="stable")
    return Predictions(
        ids=np.array([row[0] for row in rows], dtype=object),
        fold=np.full(len(rows), -1, np.int16),
        system=path.stem,
        classes=tuple(classes[at] for at in order),
        log_probs=np.log(probs)[:, order].astype(np.float32),
    )


def shares(probs: np.ndarray, path: Path) -> np.ndarray:
    """`probs` [N, C] at or above 0, each row brought to sum 1 and clipped to [FLOOR, 1]; warns of sums far from 1 and 100."""
    sums = probs.sum(axis=1)
    far = np.flatnonzero(np.minimum(np.abs(sums - 1), np.abs(sums / 100 - 1)) > FAR)
    if len(far):
        log.warning(
            "%s: %d rows sum neither to 1 nor to 100, the first in line %d (to %g); each is divided by its sum",
            path,
            len(far),
            far[0] + 2,
            sums[far[0]],
        )
    probs = np.clip(probs / sums[:, None], FLOOR, 1)
    return probs / probs.sum(axis=1, keepdims=True)


def read_answers(path: Path) -> dict[str, str]:
    """Predicted class names by row id, of a file with one column of them, or with a column of probabilities a class."""
    if not path.is_file():
        raise MissingInputError(f"no answers at {path}; run inference first, with the same output folder")
    header, _ = read_cells(path, 1)
    if len(header) == 2:
        return read_truth(path)
    table = read_submission(path)
    return {name: table.classes[code] for name, code in zip(table.ids, table.log_probs.argmax(axis=1), strict=True)}


def score_answers(answers: dict[str, str], truth: dict[str, str], where: Path) -> dict[str, float | int]:
    """`accuracy` and `f1_macro` (over the classes that occur as truth or as answer) of `n` rows, and `n`.

    Raises a DataError unless answers and truth are of the same ids.
    """
    extra, absent = [name for name in truth if name not in answers], [name for name in answers if name not in truth]
    _refuse_other_rows(where, extra, absent, len(truth), len(answers))
    from sklearn.metrics import accuracy_score, f1_score

    labels, guesses = list(truth.values()), [answers[name] for name in truth]
    f1 = f1_score(labels, guesses, average="macro", zero_division=0)
    return {"accuracy": accuracy_score(labels, guesses), "f1_macro": float(f1), "n": len(labels)}


def _probabilities(row: list[str], path: Path) -> list[float]:
    try:
        values = [float(cell) for cell in row[1:]]
    except ValueError as error:
        raise DataError(f"{path}: the row of id {row[0]!r} holds what is no number: {error}") from error
    if not all(0 <= value < float("inf") for value in values) or sum(values) == 0:
        raise DataError(f"{path}: the row of id {row[0]!r} holds no probabilities: NaN, infinite, negative or all 0")
    return values


def read_cells(path: Path, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, or the first `most`, of a CSV in UTF-8, less the index that pandas writes before the ids.

    Raises a DataError for another encoding, an empty file, or rows of unlike lengths.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            filled = (line for line in csv.reader(file, strict=True) if line)
            lines = list(filled if most is None else islice(filled, most + 1))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV in UTF-8: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty")
    ragged = next((line for line in lines if len(line) != len(lines[0])), None)
    if ragged is not None:
        raise DataError(
            f"{path}: the row {','.join(ragged)[:60]!r} has {len(ragged)} cells, the header {len(lines[0])}"
        )
    if _has_index(lines):
        lines = [line[1:] for line in lines]
    return lines[0], lines[1:]


def _has_index(lines: Sequence[Sequence[str]]) -> bool:
    """Whether a first column without a name stands before the ids: one that is called so, or is of no numbers."""
    first, second = [*_plain(lines[0]), ""][:2]
    if not _is_index(first) or len(lines[0]) < 3 or second in LABEL_COLUMNS:
        return False
    cell = lines[1][1] if lines[1:] else ""
    return second in ID_COLUMNS or (cell != "" and not is_number(cell))


def _plain(header: Sequence[str]) -> list[str]:
    return [plain_name(name).lower() for name in header]


def _is_index(name: str) -> bool:
    """Whether pandas calls a column so that has no name, in lower case."""
    return not name or name.startswith("unnamed:")


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refuse_other_rows(where: Path, extra: list[str], absent: list[str], truth: int, predicted: int) -> None:
    parts = [f"{len(extra)} of its {truth} ids are not predicted ({sample(extra)})"] if extra else []
    parts += [f"{len(absent)} of {predicted} predicted ids are not in it ({sample(absent)})"] if absent else []
    if parts:
        raise DataError(f"{where} is the truth of other rows: {'; '.join(parts)}; give the truth of this test set")


def refuse_repeated(names: list[str], what: str) -> None:
    """Raises a DataError, which starts with `what`, for names that stand several times."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{what}: {sample(twice)}")
