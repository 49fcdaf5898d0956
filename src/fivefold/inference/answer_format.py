"""The kinds of submission columns: one probability per class, the probability of one class, class names or class numbers. No torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fivefold.contract.filenames import look
from fivefold.csv_tables import CLASS_NAMES, is_number
from fivefold.data.class_aliases import SameClasses
from fivefold.data.readers.eval_images import Submission
from fivefold.errors import DataError, SettingsError
from fivefold.predictions import sample

AS_NAMED = SameClasses()
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
SETTINGS = "ensemble.answer=class, number or probability (of ensemble.positive_class)"


@dataclass(frozen=True)
class Form:
    """The content of a submission's cells.

    `kind`: `columns` (the probability of each column's class), `probability` (of one class), `class` (the name of the
    predicted class) or `number` (its number). `names`: the classes of the columns, the one class, or all classes.
    `cells`: for `class` and `number`, the text that stands for each name. `words`: the form as a log message.
    `doubt`: a warning if the form is a guess.
    """

    kind: str
    names: tuple[str, ...]
    cells: Mapping[str, str]
    words: str
    doubt: str = ""


def form_of(wanted: Submission, classes: Sequence[str], same: SameClasses = AS_NAMED) -> Form:
    """Return the form that a sample's columns and values require of a model with `classes`.

    Raise a DataError with the names if a column is not a class or a class has no column. Raise a DataError that names
    the setting if the purpose of a single column is ambiguous. Raise a SettingsError for an invalid setting.
    """
    names = same.names(classes)
    if wanted.positive and not match(wanted.positive, names):
        raise SettingsError(f"ensemble.positive_class={wanted.positive} is not one of the classes {sample(names)}")
    if len(wanted.classes) == 1:
        column = _Column(wanted.classes[0], names, wanted)
        if wanted.answer != "auto" or wanted.positive or not column.called or len(names) == 2:
            return column.form()
    elif wanted.answer != "auto" or wanted.positive:
        raise SettingsError(
            f"ensemble.answer and ensemble.positive_class apply only to samples with one column after the ids; this sample has "
            f"{len(wanted.classes)}: remove both settings"
        )
    matched = [match(name, names) or name for name in wanted.classes]
    columns = tuple(matched) if len(set(matched)) == len(matched) else wanted.classes
    _check_columns(columns, classes, same)
    return Form("columns", columns, {}, f"{len(columns)} columns of probabilities, one per class")


def match(name: str, names: Sequence[str]) -> str:
    """Return `name` if it is in `names`, else the only one that differs just in case, blanks and underscores; "" for none."""
    if name in names:
        return name
    similar = [candidate for candidate in names if _normalise_name(candidate) == _normalise_name(name)]
    return similar[0] if len(similar) == 1 else ""


def positive_of(names: Sequence[str]) -> str:
    """Return the positive one of two classes if their names tell, as in PAIRS or `cactus` and `no_cactus`; else ""."""
    if len(names) != 2:
        return ""
    for negative, positive in (names, names[::-1]):
        pair = tuple(f"{float(name):g}" if is_number(name) else _normalise_name(name) for name in (negative, positive))
        if pair in PAIRS or re.fullmatch(NOT + re.escape(pair[1]), pair[0]):
            return positive
    return ""


def _normalise_name(name: str) -> str:
    return " ".join(look(name.replace("_", " ")).casefold().split())


def _check_columns(columns: Sequence[str], classes: Sequence[str], same: SameClasses) -> None:
    matrix = same.columns(classes, columns)
    unknown = [name for name, used in zip(columns, matrix.any(axis=0), strict=True) if not used]
    missing = [name for name, used in zip(classes, matrix.any(axis=1), strict=True) if not used]
    missing += sorted(set(same.names(classes)) - {*classes, *columns})
    if unknown or missing:
        parts = [f"{sample(sorted(unknown))} unknown to the models"] if unknown else []
        parts += [f"{sample(sorted(missing))} without a column"] if missing else []
        raise DataError(
            f"the sample submission's columns are not the models' classes: {', '.join(parts)}; after the id column, "
            "a sample has one column per class, or a single column for the answer"
        )


class _Column:
    """The single answer column of a sample: its name, the classes, and the kinds of its cells."""

    def __init__(self, name: str, names: Sequence[str], sample_file: Submission) -> None:
        self.name, self.names, self.sample_file = name, tuple(names), sample_file
        bare = re.sub(r"^(?:is|has)[ _-]+", "", name, flags=re.IGNORECASE)
        self.called = match(name, names) or match(bare, names)
        cells = dict.fromkeys(cell.strip() for cell in sample_file.values)
        self.filled = [cell for cell in cells if cell in self.names or cell.casefold() not in EMPTY]
        plain = [cell.replace(",", ".") for cell in self.filled]
        known = bool(plain) and all(is_number(cell) and math.isfinite(float(cell)) for cell in plain)
        self.numbers = {float(cell) for cell in plain} if known else set()
        self.decimals = max((len(cell.partition(".")[2]) for cell in plain), default=0) if known else 0
        self.pointed = known and any("." in cell for cell in plain)
        by_number = {float(name): name for name in names if is_number(name)}
        self.by_number = by_number if len(by_number) == len(names) else {}

    def form(self) -> Form:
        """Return the form that the settings choose, else the form that the values imply."""
        answer = "probability" if self.sample_file.positive else self.sample_file.answer
        kind = self._kind() if answer == "auto" else answer
        return {"class": self._classes, "number": self._numbers, "probability": self._probability}[kind]()

    def _kind(self) -> str:
        """Infer the kind from the values, the classes and the column's name; raise a DataError if it stays ambiguous."""
        two, share = len(self.names) == 2, all(0 <= number <= 1 for number in self.numbers)
        if not self.sample_file.values or (self.filled and all(match(cell, self.names) for cell in self.filled)):
            return "probability" if self.called and self.numbers else "class"
        if self.called and two:
            return "probability"
        if not self.filled:
            return "class" if self.name.casefold() in CLASS_NAMES else self._raise_ambiguous("is empty")
        if not self.numbers:
            return "class"
        if any(number % 1 for number in self.numbers):
            return "probability" if two and share else self._raise_ambiguous(f"holds {sample(self.filled)}")
        if self.by_number and self.numbers <= self.by_number.keys():
            return self._raise_ambiguous(f"holds {sample(self.filled)}") if two and self.pointed and share else "class"
        if not self.by_number and two and share and (self.pointed or positive_of(self.names)):
            return "probability" if self.pointed else "number"
        several = len(self.numbers) > 1 and self.numbers <= set(range(len(self.names)))
        return (
            "number"
            if several and not self.by_number and not two
            else self._raise_ambiguous(f"holds {sample(self.filled)}")
        )

    def _raise_ambiguous(self, problem: str) -> NoReturn:
        raise DataError(
            f"the sample submission's column {self.name!r} {problem}, and the classes are {sample(self.names)}: it is unclear "
            f"whether the column holds class names, class numbers or the probability of a class; set {SETTINGS}"
        )

    def _probability(self) -> Form:
        positive = match(self.sample_file.positive, self.names) if self.sample_file.positive else ""
        positive = positive or self.called or positive_of(self.names)
        if not positive:
            raise DataError(
                f"the sample submission's column {self.name!r} holds the probability of one class, but it is unclear which of "
                f"{sample(self.names)}; set ensemble.positive_class to it (or ensemble.answer=class for names)"
            )
        return Form("probability", (positive,), {}, f"column {self.name!r}: the probability of {positive!r}")

    def _classes(self) -> Form:
        """Return class names in the sample's spelling, if it formats numeric names or letter case differently."""
        cells, doubt = {name: name for name in self.names}, ""
        if self.numbers and self.by_number and not set(self.filled) <= set(self.names):
            point = "," if self.sample_file.decimal == "," else "."
            spelt = {name: f"{number:.{self.decimals}f}" for number, name in self.by_number.items()}
            cells = {name: cell.replace(".", point) for name, cell in spelt.items()}
        elif strange := [cell for cell in self.filled if cell not in self.names]:
            spellings = {match(cell, self.names): cell for cell in strange}
            if len({match(cell, self.names) for cell in self.filled} - {""}) == len(self.names):
                cells |= {name: cell for name, cell in spellings.items() if name}
            else:
                doubt = f"the sample contains {sample(strange)}, which are not class names; the models' class names are written"
        return Form("class", self.names, cells, f"column {self.name!r}: the predicted class", doubt)

    def _numbers(self) -> Form:
        """Return numbers from 0: of two classes 1 for the positive one, else in the order of the names."""
        positive = positive_of(self.names)
        order = sorted(self.names, key=lambda name: (name == positive, name))
        cells = {name: str(number) for number, name in enumerate(order)}
        listed = ", ".join(f"{number} {name}" for name, number in list(cells.items())[:5])
        words = f"column {self.name!r}: the number of the predicted class ({listed}{', …' if len(order) > 5 else ''})"
        guessed = self.sample_file.answer == "auto" and not positive
        doubt = "the numbers follow the sorted class names; set ensemble.answer=class for names" if guessed else ""
        return Form("number", self.names, cells, words, doubt)
