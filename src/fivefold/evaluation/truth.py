"""The truth of test rows, and predictions that come as a competition's submission: CSVs to checked tables."""

import csv
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from fivefold.errors import DataError, MissingInputError
from fivefold.evaluation.metrics import FLOOR, confusion_matrix, f1
from fivefold.predictions import Predictions, sample

TRUTH_FILES = ("gt.csv", "ground_truth.csv")
LABEL_COLUMNS = ("label", "target", "ans", "answer")


def truth_file(where: Path) -> Path:
    """The CSV of the truth: `where` itself, or in that folder gt.csv, ground_truth.csv, or the only CSV."""
    if where.is_file():
        return where
    for name in TRUTH_FILES:
        if (where / name).is_file():
            return where / name
    found = [path for path in sorted(where.glob("*.csv")) if path.is_file()]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(path.name for path in found) or "no CSV"
    raise MissingInputError(f"no {' or '.join(TRUTH_FILES)} in {where} (found: {listed}); name the truth gt.csv")


def read_truth(path: Path) -> dict[str, str]:
    """Class names by row id.

    Ids are the first column; the class is the column label, target, ans or answer, else the second.
    Raises a DataError for an empty table, an id that stands twice, or a row without a class.
    """
    header, rows = read_cells(path)
    if len(header) < 2:
        raise DataError(f"{path} has {len(header)} column; the truth needs an id and a class")
    place = next((at for at, name in enumerate(header) if at and name.strip().lower() in LABEL_COLUMNS), 1)
    if not rows:
        raise DataError(f"{path} holds no rows, only {','.join(header)}")
    refuse_repeated([row[0] for row in rows], f"{path}: ids stand twice")
    unlabelled = [row[0] for row in rows if not row[place].strip()]
    if unlabelled:
        raise DataError(f"{path}: {len(unlabelled)} rows without a class: {sample(unlabelled)}")
    return {row[0]: plain_name(row[place]) for row in rows}


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
    probs = np.array([_probabilities(row, path) for row in rows])
    probs = np.clip(probs / probs.sum(axis=1, keepdims=True), FLOOR, 1)
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.argsort(np.array(classes), kind="stable")
    return Predictions(
        ids=np.array([row[0] for row in rows], dtype=object),
        fold=np.full(len(rows), -1, np.int16),
        system=path.stem,
        classes=tuple(classes[at] for at in order),
        log_probs=np.log(probs)[:, order].astype(np.float32),
    )


def read_answers(path: Path) -> dict[str, str]:
    """Predicted class names by row id, of a file with one column of them, or with a column of probabilities a class."""
    if not path.is_file():
        raise MissingInputError(f"no answers at {path}; run inference first, with the same output folder")
    header, _ = read_cells(path)
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
    classes = sorted({*truth.values(), *answers.values()})
    index = {name: code for code, name in enumerate(classes)}
    codes = np.array([index[name] for name in truth.values()])
    guesses = np.array([index[answers[name]] for name in truth])
    counts = confusion_matrix(guesses, codes, len(classes))
    return {"accuracy": float((guesses == codes).mean()), "f1_macro": f1(counts), "n": len(codes)}


def _probabilities(row: list[str], path: Path) -> list[float]:
    try:
        values = [float(cell) for cell in row[1:]]
    except ValueError as error:
        raise DataError(f"{path}: the row of id {row[0]!r} holds what is no number: {error}") from error
    if not all(0 <= value < float("inf") for value in values) or sum(values) == 0:
        raise DataError(f"{path}: the row of id {row[0]!r} holds no probabilities: NaN, infinite, negative or all 0")
    return values


def read_cells(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV in UTF-8; a DataError for another, an empty one, or rows of unlike lengths."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV in UTF-8: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty")
    ragged = next((line for line in lines if len(line) != len(lines[0])), None)
    if ragged is not None:
        raise DataError(
            f"{path}: the row {','.join(ragged)[:60]!r} has {len(ragged)} cells, the header {len(lines[0])}"
        )
    return lines[0], lines[1:]


def _refuse_other_rows(where: Path, extra: list[str], absent: list[str], truth: int, predicted: int) -> None:
    parts = [f"{len(extra)} of its {truth} ids are not predicted ({sample(extra)})"] if extra else []
    parts += [f"{len(absent)} of {predicted} predicted ids are not in it ({sample(absent)})"] if absent else []
    if parts:
        raise DataError(f"{where} is the truth of other rows: {'; '.join(parts)}; give the truth of this test set")


def plain_name(name: str) -> str:
    """A class name as the split stage has it: NFC, without the blanks around it."""
    return unicodedata.normalize("NFC", name.strip())


def refuse_repeated(names: list[str], what: str) -> None:
    """Raises a DataError, which starts with `what`, for names that stand several times."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{what}: {sample(twice)}")
