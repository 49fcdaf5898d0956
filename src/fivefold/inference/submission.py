"""Submission files, with exactly the columns of the sample, in its order. No torch.

A column holds the probability of its class, or the only column holds the probability of one class, class names or numbers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fivefold.contract.filenames import visual_form
from fivefold.contract.files import atomic
from fivefold.csv_tables import CLASS_NAMES, check_same_ids, is_number
from fivefold.data.class_aliases import ClassAliases
from fivefold.data.readers.eval_images import EvalImages, SampleSubmission, check_rows
from fivefold.errors import DataError, SettingsError
from fivefold.log import log
from fivefold.predictions import Predictions, preview

NO_ALIASES = ClassAliases()
EMPTY = ("", "nan", "na", "n/a", "null", "none", "?")
"""Cells that count as empty, in lower case."""
PAIRS = (
    ("0", "1"),
    ("-1", "1"),
    ("no", "yes"),
    ("n", "y"),
    ("neg", "pos"),
    ("negative", "positive"),
    ("false", "true"),
    ("f", "t"),
    ("absent", "present"),
)
"""Common names of two classes: (negative, positive)."""
NOT = r"(?:no|not|non|without)[ -]*"
"""A prefix that turns the name of the positive class into the name of the negative class."""
DIGITS = "%.9g"
"""The format of a probability in a submission: nine digits."""


@dataclass(frozen=True)
class AnswerFormat:
    """The content of a submission's cells.

    `kind`: `columns` (the probability of each column's class), `probability` (of one class), `class` (the name of the
    predicted class) or `number` (its number). `names`: the classes of the columns, the one class, or all classes.
    `cells`: the text for each name of a `class` or `number`. `doubt`: a warning if the format is a guess.
    """

    kind: str
    names: tuple[str, ...]
    cells: Mapping[str, str]
    description: str
    doubt: str = ""


def detect_format(
    submission: SampleSubmission, classes: Sequence[str], same: ClassAliases = NO_ALIASES
) -> AnswerFormat:
    """Return the format that a sample's columns and values require of a model with `classes`.

    Raise a DataError for columns that are not the classes, or an ambiguous single column; a SettingsError for invalid settings.
    """
    names = same.names(classes)
    if submission.positive and not match_name(submission.positive, names):
        raise SettingsError(f"ensemble.positive_class={submission.positive} is not one of the classes {preview(names)}")
    if len(submission.classes) == 1:
        column = _Column(submission.classes[0], names, submission)
        if submission.answer != "auto" or submission.positive or not column.called or len(names) == 2:
            return column.form()
    elif submission.answer != "auto" or submission.positive:
        raise SettingsError(
            "ensemble.answer and ensemble.positive_class need a sample with one column after the ids, not "
            f"{len(submission.classes)}: remove both settings"
        )
    columns = match_columns(submission.classes, names, "the sample submission")
    return AnswerFormat("columns", columns, {}, f"{len(columns)} columns of probabilities, one per class")


def match_name(name: str, names: Sequence[str]) -> str:
    """Return `name` if it is in `names`, else the only one that differs just in case, blanks and underscores; "" for none."""
    if name in names:
        return name
    similar = [candidate for candidate in names if _normalise_name(candidate) == _normalise_name(name)]
    return similar[0] if len(similar) == 1 else ""


def match_columns(columns: Sequence[str], names: Sequence[str], where: object) -> tuple[str, ...]:
    """Return the class of each column, as `match_name`; raise a DataError unless each of `names` has exactly one column."""
    matched = tuple(match_name(column, names) or column for column in columns)
    matched = matched if len(set(matched)) == len(matched) else tuple(columns)
    unknown, missing = sorted(set(matched) - set(names)), sorted(set(names) - set(matched))
    if unknown or missing:
        parts = [f"{preview(unknown)} unknown to the models"] if unknown else []
        parts += [f"{preview(missing)} without a column"] if missing else []
        raise DataError(
            f"{where}: the columns are not the models' classes: {', '.join(parts)}; after the id column there must be "
            "one column per class, or a single column for the answer"
        )
    return matched


def guess_positive(names: Sequence[str]) -> str:
    """Return the positive one of two classes if their names are as in PAIRS or `cactus` and `no_cactus`; else ""."""
    if len(names) != 2:
        return ""
    for negative, positive in (names, names[::-1]):
        pair = tuple(f"{float(name):g}" if is_number(name) else _normalise_name(name) for name in (negative, positive))
        if pair in PAIRS or re.fullmatch(NOT + re.escape(pair[1]), pair[0]):
            return positive
    return ""


def _normalise_name(name: str) -> str:
    return " ".join(visual_form(name.replace("_", " ")).casefold().split())


class _Column:
    """The single answer column of a sample: its name, the classes, and the kinds of its cells."""

    def __init__(self, name: str, names: Sequence[str], sample_file: SampleSubmission) -> None:
        self.name, self.names, self.sample_file = name, tuple(names), sample_file
        bare = re.sub(r"^(?:is|has)[ _-]+", "", name, flags=re.IGNORECASE)
        self.called = match_name(name, names) or match_name(bare, names)
        cells = dict.fromkeys(cell.strip() for cell in sample_file.values)
        self.filled = [cell for cell in cells if cell in self.names or cell.casefold() not in EMPTY]
        plain = [cell.replace(",", ".") for cell in self.filled]
        known = bool(plain) and all(is_number(cell) and math.isfinite(float(cell)) for cell in plain)
        self.numbers = {float(cell) for cell in plain} if known else set()
        self.decimals = max((len(cell.partition(".")[2]) for cell in plain), default=0) if known else 0
        self.pointed = known and any("." in cell for cell in plain)
        by_number = {float(name): name for name in names if is_number(name)}
        self.by_number = by_number if len(by_number) == len(names) else {}

    def form(self) -> AnswerFormat:
        """Return the format that the settings choose, else the one that the values imply."""
        answer = "probability" if self.sample_file.positive else self.sample_file.answer
        kind = self._kind() if answer == "auto" else answer
        return {"class": self._classes, "number": self._numbers, "probability": self._probability}[kind]()

    def _kind(self) -> str:
        """Infer the kind from the values, the classes and the column's name; raise a DataError if it stays ambiguous."""
        two, share = len(self.names) == 2, all(0 <= number <= 1 for number in self.numbers)
        if not self.sample_file.values or (self.filled and all(match_name(cell, self.names) for cell in self.filled)):
            return "probability" if self.called and self.numbers else "class"
        if self.called and two:
            return "probability"
        kind = ""
        if not self.numbers:
            kind = "class" if self.filled or self.name.casefold() in CLASS_NAMES else ""
        elif any(number % 1 for number in self.numbers):
            kind = "probability" if two and share else ""
        elif self.by_number and self.numbers <= self.by_number.keys():
            kind = "" if two and self.pointed and share else "class"
        elif not self.by_number and two and share and (self.pointed or guess_positive(self.names)):
            kind = "probability" if self.pointed else "number"
        elif not self.by_number and not two and len(self.numbers) > 1 and self.numbers <= set(range(len(self.names))):
            kind = "number"
        if not kind:
            raise DataError(
                f"the sample submission's column {self.name!r} holds {preview(self.filled) or 'nothing'}, and the classes are "
                f"{preview(self.names)}: it is unclear whether it holds class names, class numbers or the probability of a "
                "class; set ensemble.answer=class, number or probability (of ensemble.positive_class)"
            )
        return kind

    def _probability(self) -> AnswerFormat:
        configured = self.sample_file.positive
        positive = (configured and match_name(configured, self.names)) or self.called or guess_positive(self.names)
        if not positive:
            raise DataError(
                f"the sample submission's column {self.name!r} holds the probability of one class, but it is unclear which of "
                f"{preview(self.names)}; set ensemble.positive_class to it (or ensemble.answer=class for names)"
            )
        return AnswerFormat("probability", (positive,), {}, f"column {self.name!r}: the probability of {positive!r}")

    def _classes(self) -> AnswerFormat:
        """Return class names in the sample's spelling, if it formats numeric names or letter case differently."""
        cells, doubt = {name: name for name in self.names}, ""
        if self.numbers and self.by_number and not set(self.filled) <= set(self.names):
            spelt = {name: f"{number:.{self.decimals}f}" for number, name in self.by_number.items()}
            cells = {name: cell.replace(".", self.sample_file.decimal) for name, cell in spelt.items()}
        elif strange := [cell for cell in self.filled if cell not in self.names]:
            spellings = {match_name(cell, self.names): cell for cell in strange}
            if len({match_name(cell, self.names) for cell in self.filled} - {""}) == len(self.names):
                cells |= {name: cell for name, cell in spellings.items() if name}
            else:
                doubt = f"the sample contains {preview(strange)}, which are not class names; the models' class names are written"
        return AnswerFormat("class", self.names, cells, f"column {self.name!r}: the predicted class", doubt)

    def _numbers(self) -> AnswerFormat:
        """Return numbers from 0: of two classes 1 for the positive one, else in the order of the names."""
        positive = guess_positive(self.names)
        order = sorted(self.names, key=lambda name: (name == positive, name))
        cells = {name: str(number) for number, name in enumerate(order)}
        listed = ", ".join(f"{number} {name}" for name, number in list(cells.items())[:5])
        words = f"column {self.name!r}: the number of the predicted class ({listed}{', …' if len(order) > 5 else ''})"
        guessed = self.sample_file.answer == "auto" and not positive
        doubt = "the numbers follow the sorted class names; set ensemble.answer=class for names" if guessed else ""
        return AnswerFormat("number", self.names, cells, words, doubt)


def write_submission(path: Path, table: Predictions, layout: SampleSubmission, same: ClassAliases = NO_ALIASES) -> Path:
    """Write the rows and columns of the sample `layout`, in its order, with its header, delimiter and line endings.

    Class columns get probabilities; the policy of `same` applies to classes with the same meaning. A single column
    gets the content that `detect_format` chooses. The file is written atomically. Return its path. Raise a DataError
    with the ids or classes that do not match.
    """
    check_same_ids(layout.ids, "the sample submission", table.ids, "the predictions")
    rows = table.reindex(layout.ids)
    form = detect_format(layout, table.classes, same)
    if form.cells:
        frame = pd.DataFrame([form.cells[name] for name in _labels(rows, same)], dtype=object)
    else:
        names = same.names(table.classes) if form.kind == "probability" else form.names
        wanted = [names.index(name) for name in form.names]
        frame = pd.DataFrame(_probabilities(rows, names, same)[:, wanted])
    frame.insert(0, "id", pd.Series(rows.ids, dtype=object))
    if layout.row_number_column:
        frame.insert(0, "number", np.arange(len(rows)))
    with atomic(path) as temporary:
        frame.to_csv(
            temporary,
            header=layout.header,
            index=False,
            sep=layout.delimiter,
            decimal=layout.decimal,
            float_format=DIGITS,
            lineterminator=layout.line_ending,
            encoding="utf-8-sig" if layout.has_bom else "utf-8",
        )
    return path


def check_submission(images: EvalImages, classes: Sequence[str], same: ClassAliases) -> None:
    """Raise a DataError, before any training or prediction, unless the sample's rows and columns can be filled."""
    same.check_model(classes)
    if images.sample:
        form = detect_format(images.sample, classes, same)
        log.info("submission: %s", form.description)
        if form.doubt:
            log.warning("%s", form.doubt)
    check_rows(images)


def _labels(table: Predictions, same: ClassAliases) -> list[str]:
    """Return the predicted class of each row; of classes that are summed, the most probable name of the best sum."""
    probabilities = _probabilities(table, table.classes, same) if same.policy == "sum" else np.exp(table.log_probs)
    best = probabilities.max(axis=1, keepdims=True)
    # Names with one sum are tied: their own probabilities break the tie.
    codes = np.where(probabilities >= best * (1 - 1e-12), table.log_probs, -np.inf).argmax(axis=1)
    return [table.classes[code] for code in codes]


def _probabilities(table: Predictions, columns: Sequence[str], same: ClassAliases) -> np.ndarray:
    """Return the probabilities of the `columns` [N, W], each row normalised to sum 1."""
    probabilities = np.exp(table.log_probs.astype(np.float64)) @ same.columns(table.classes, columns)
    return probabilities / probabilities.sum(axis=1, keepdims=True)
