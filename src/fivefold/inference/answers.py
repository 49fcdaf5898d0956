"""What a submission's columns hold: a probability a class, the probability of one class, class names, or their numbers. No torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fivefold.contract.spelling import look
from fivefold.csv_tables import CLASS_NAMES, is_number
from fivefold.data.evals import Submission
from fivefold.data.same_classes import SameClasses
from fivefold.errors import DataError, SettingsError
from fivefold.predictions import sample

AS_NAMED = SameClasses()
EMPTY = ("", "nan", "na", "n/a", "null", "none", "?")
"""Cells that say nothing, in lower case."""
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
"""Names of two classes, the negative one and the positive one."""
NOT = r"(?:no|not|non|without)[ -]*"
"""What makes the name of the negative class from that of the positive one."""
SETTINGS = "ensemble.answer=class, number or probability (of ensemble.positive_class)"


@dataclass(frozen=True)
class Form:
    """What the cells below a submission's columns hold.

    `kind`: `columns` (the probability of each column's class), `probability` (of one class), `class` (the name of the
    predicted one) or `number` (its number). `names`: the classes of the columns, the one class, or all classes.
    `cells`: how class and number write each of the names. `words` say it for the log, `doubt` what was not certain.
    """

    kind: str
    names: tuple[str, ...]
    cells: Mapping[str, str]
    words: str
    doubt: str = ""


def form_of(wanted: Submission, classes: Sequence[str], same: SameClasses = AS_NAMED) -> Form:
    """The form that the columns and the values of a sample ask for, of a model of `classes`.

    Raises a DataError, with the names, for columns that are no classes and classes without a column, and one that
    names the setting where it cannot be known what a single column is for; a SettingsError for a setting that cannot be.
    """
    names = same.names(classes)
    if wanted.positive and not match(wanted.positive, names):
        raise SettingsError(f"ensemble.positive_class={wanted.positive} is none of the classes {sample(names)}")
    if len(wanted.classes) == 1:
        column = _Column(wanted.classes[0], names, wanted)
        if wanted.answer != "auto" or wanted.positive or not column.called or len(names) == 2:
            return column.form()
    elif wanted.answer != "auto" or wanted.positive:
        raise SettingsError(
            f"ensemble.answer and ensemble.positive_class are for samples of one column behind the ids; this one has "
            f"{len(wanted.classes)}: leave them out"
        )
    found = [match(name, names) or name for name in wanted.classes]
    columns = tuple(found) if len(set(found)) == len(found) else wanted.classes
    _check_columns(columns, classes, same)
    return Form("columns", columns, {}, f"{len(columns)} columns of probabilities, one a class")


def match(name: str, names: Sequence[str]) -> str:
    """The one of `names` that is `name`, or is the only one that differs in case, blanks and underscores alone; "" for none."""
    if name in names:
        return name
    found = [each for each in names if _key(each) == _key(name)]
    return found[0] if len(found) == 1 else ""


def positive_of(names: Sequence[str]) -> str:
    """The positive one of two classes where their names say it, as those of PAIRS or `cactus` and `no_cactus`; else ""."""
    if len(names) != 2:
        return ""
    for negative, positive in (names, names[::-1]):
        pair = tuple(f"{float(name):g}" if is_number(name) else _key(name) for name in (negative, positive))
        if pair in PAIRS or re.fullmatch(NOT + re.escape(pair[1]), pair[0]):
            return positive
    return ""


def _key(name: str) -> str:
    return " ".join(look(name.replace("_", " ")).casefold().split())


def _check_columns(columns: Sequence[str], classes: Sequence[str], same: SameClasses) -> None:
    matrix = same.columns(classes, columns)
    unknown = [name for name, used in zip(columns, matrix.any(axis=0), strict=True) if not used]
    without = [name for name, used in zip(classes, matrix.any(axis=1), strict=True) if not used]
    without += sorted(set(same.names(classes)) - {*classes, *columns})
    if unknown or without:
        parts = [f"{sample(sorted(unknown))} unknown to the models"] if unknown else []
        parts += [f"{sample(sorted(without))} without a column"] if without else []
        raise DataError(
            f"the sample submission's columns are not the models' classes: {', '.join(parts)}; behind its first column, "
            "of the ids, a sample has one column a class, or a single one for the answer"
        )


class _Column:
    """The single column of a sample: its name, the classes, and what its cells look like."""

    def __init__(self, name: str, names: Sequence[str], wanted: Submission) -> None:
        self.name, self.names, self.wanted = name, tuple(names), wanted
        bare = re.sub(r"^(?:is|has)[ _-]+", "", name, flags=re.IGNORECASE)
        self.called = match(name, names) or match(bare, names)
        cells = dict.fromkeys(cell.strip() for cell in wanted.values)
        self.said = [cell for cell in cells if cell in self.names or cell.casefold() not in EMPTY]
        plain = [cell.replace(",", ".") for cell in self.said]
        known = bool(plain) and all(is_number(cell) and math.isfinite(float(cell)) for cell in plain)
        self.numbers = {float(cell) for cell in plain} if known else set()
        self.decimals = max((len(cell.partition(".")[2]) for cell in plain), default=0) if known else 0
        self.pointed = known and any("." in cell for cell in plain)
        by_number = {float(name): name for name in names if is_number(name)}
        self.by_number = by_number if len(by_number) == len(names) else {}

    def form(self) -> Form:
        """The form by the settings, else by the values."""
        answer = "probability" if self.wanted.positive else self.wanted.answer
        kind = self._kind() if answer == "auto" else answer
        return {"class": self._classes, "number": self._numbers, "probability": self._probability}[kind]()

    def _kind(self) -> str:
        """What the values are, by themselves, the classes and the column's name; a DataError asks where that is not enough."""
        two, share = len(self.names) == 2, all(0 <= number <= 1 for number in self.numbers)
        if not self.wanted.values or (self.said and all(match(cell, self.names) for cell in self.said)):
            return "probability" if self.called and self.numbers else "class"
        if self.called and two:
            return "probability"
        if not self.said:
            return "class" if self.name.casefold() in CLASS_NAMES else self._ask("is empty")
        if not self.numbers:
            return "class"
        if any(number % 1 for number in self.numbers):
            return "probability" if two and share else self._ask(f"holds {sample(self.said)}")
        if self.by_number and self.numbers <= self.by_number.keys():
            return self._ask(f"holds {sample(self.said)}") if two and self.pointed and share else "class"
        if not self.by_number and two and share and (self.pointed or positive_of(self.names)):
            return "probability" if self.pointed else "number"
        several = len(self.numbers) > 1 and self.numbers <= set(range(len(self.names)))
        return "number" if several and not self.by_number and not two else self._ask(f"holds {sample(self.said)}")

    def _ask(self, found: str) -> NoReturn:
        raise DataError(
            f"the sample submission's column {self.name!r} {found}, and the classes are {sample(self.names)}: whether it is "
            f"for class names, their numbers or the probability of a class is not clear; set {SETTINGS}"
        )

    def _probability(self) -> Form:
        positive = match(self.wanted.positive, self.names) if self.wanted.positive else ""
        positive = positive or self.called or positive_of(self.names)
        if not positive:
            raise DataError(
                f"the sample submission's column {self.name!r} is for the probability of one class, and which of "
                f"{sample(self.names)} is not clear; set ensemble.positive_class to it (or ensemble.answer=class for names)"
            )
        return Form("probability", (positive,), {}, f"column {self.name!r}: the probability of {positive!r}")

    def _classes(self) -> Form:
        """Class names; where they are numbers that the sample writes otherwise, or names in other letters, as it does."""
        cells, doubt = {name: name for name in self.names}, ""
        if self.numbers and self.by_number and not set(self.said) <= set(self.names):
            point = "," if self.wanted.decimal == "," else "."
            spelt = {name: f"{number:.{self.decimals}f}" for number, name in self.by_number.items()}
            cells = {name: cell.replace(".", point) for name, cell in spelt.items()}
        elif strange := [cell for cell in self.said if cell not in self.names]:
            found = {match(cell, self.names): cell for cell in strange}
            if len({match(cell, self.names) for cell in self.said} - {""}) == len(self.names):
                cells |= {name: cell for name, cell in found.items() if name}
            else:
                doubt = f"the sample has {sample(strange)}, which no class is called; names are written as the models know them"
        return Form("class", self.names, cells, f"column {self.name!r}: the predicted class", doubt)

    def _numbers(self) -> Form:
        """Numbers from 0: of two classes 1 for the positive one, else in the order of the names."""
        positive = positive_of(self.names)
        order = sorted(self.names, key=lambda name: (name == positive, name))
        cells = {name: str(number) for number, name in enumerate(order)}
        listed = ", ".join(f"{number} {name}" for name, number in list(cells.items())[:5])
        words = f"column {self.name!r}: the number of the predicted class ({listed}{', …' if len(order) > 5 else ''})"
        guessed = self.wanted.answer == "auto" and not positive
        doubt = (
            "the numbers go by the order of the classes' names; set ensemble.answer=class for names" if guessed else ""
        )
        return Form("number", self.names, cells, words, doubt)
