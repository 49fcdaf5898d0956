"""CSV files as people write them, read by pandas as text: no id 007 becomes 7, no class "NA" becomes nothing."""

import codecs
import csv
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from fivefold.contract.spelling import plain_name
from fivefold.errors import DataError, MissingInputError
from fivefold.predictions import sample

ID_NAMES = ("id",)
PATH_NAMES = (
    "image_path",
    "img_path",
    "path",
    "file_path",
    "filepath",
    "filename",
    "file_name",
    "file",
    "image",
    "img",
    "imageid",
    "image_id",
    "img_id",
    "image_name",
    "img_name",
    "imagename",
)
LABEL_NAMES = ("target", "label", "class_name", "class", "category")
ANSWER_NAMES = ("ans", "answer")
CLASS_NAMES = (*LABEL_NAMES, *ANSWER_NAMES)
"""Columns of classes in truths and submissions; the first one that is there goes."""
TRUE_CLASS_NAMES = ("true_class", "image_type", *LABEL_NAMES)
CATEGORY_NAMES = ("category_name", "category")
DELIMITERS = (",", ";", "\t")
csv.field_size_limit(2**31 - 1)  # masks and images stand in cells too; the size of a table has its own bound


@dataclass(frozen=True)
class CsvFile:
    """A CSV whose header is read: `where` it is, in words, its `name`, the names of its columns as they are written.

    `has_index`: pandas wrote a first column of row numbers, which is none of `columns`.
    `has_mark`: the file starts with a byte-order mark, as Excel's do.
    """

    where: str
    name: str
    text: str = field(repr=False)
    columns: tuple[str, ...]
    delimiter: str
    has_index: bool
    has_mark: bool

    def __str__(self) -> str:
        return self.where

    @property
    def line_end(self) -> str:
        return "\r\n" if self.text.partition("\n")[0].endswith("\r") else "\n"

    @property
    def plain_columns(self) -> list[str]:
        """The names of the columns in lower case, without the blanks around them."""
        return [plain_name(name).lower() for name in self.columns]

    def column(self, name: str, known: Sequence[str] = ()) -> str | None:
        """The column `name` as the header writes it, or without a name the first of `known`; None for a miss."""
        for wanted in [name] if name else known:
            if wanted in self.columns:
                return wanted
            if wanted.lower() in self.plain_columns:
                return self.columns[self.plain_columns.index(wanted.lower())]
        return None

    def must_have(self, name: str, known: Sequence[str], key: str) -> str:
        """As `column`; a DataError names the setting `key` and the columns that there are."""
        column = self.column(name, known)
        if column is None:
            wanted = repr(name) if name else f"{', '.join(known[:3])} or the like"
            raise DataError(f"{self} has no column {wanted}; it has {', '.join(self.columns)}; set {key}")
        return column

    def read(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """The rows, every cell a text, with the named columns or all.

        Raises a DataError for no rows, rows of another length than the header, broken quotes, and columns of one name.
        """
        names = list(dict.fromkeys(columns or self.columns))
        twice = [name for name in names if self.columns.count(name) > 1]
        if twice:
            raise DataError(f"{self} has the column {twice[0]!r} twice; rename one of them")
        self._check_lines()
        places = [self.columns.index(name) + self.has_index for name in names]
        try:
            frame = pd.read_csv(
                io.StringIO(self.text),
                sep=self.delimiter,
                header=0,
                names=list(range(len(self.columns) + self.has_index)),
                usecols=places,
                dtype=str,
                keep_default_na=False,
                na_filter=False,
            )
        except (pd.errors.ParserError, ValueError) as error:
            raise DataError(f"{self} cannot be read: {error}") from error
        if not len(frame):
            raise DataError(f"{self} holds no rows, only the header {', '.join(self.columns)}")
        return frame[places].set_axis(names, axis=1)

    def first_rows(self, count: int) -> list[list[str]]:
        """The cells of at most so many rows below the header, as far as they can be read."""
        reader = csv.reader(io.StringIO(self.text, newline=""), delimiter=self.delimiter)
        return [*islice((cells for cells in reader if not _is_blank(cells)), 1, 1 + count)]

    def numbers(self, cells: pd.DataFrame) -> np.ndarray:
        """The cells as float64 [N, C]; a comma in a cell is a decimal comma.

        A DataError names the row and the column of the first cell that is no number.
        """
        cells = cells.apply(lambda column: column.str.replace(",", ".", regex=False))
        try:
            return cells.to_numpy(object).astype(np.float64)
        except ValueError as error:
            row, column = np.argwhere(~cells.map(is_number).to_numpy())[0]
            raise DataError(
                f"{self}: {cells.iat[row, column]!r} in row {row + 1} below the header, "
                f"column {cells.columns[column]!r}, is no number"
            ) from error

    def _check_lines(self) -> None:
        """Raises a DataError for the first line that is broken or of another length; pandas would fill it up."""
        width = len(self.columns) + self.has_index
        reader = csv.reader(io.StringIO(self.text, newline=""), delimiter=self.delimiter, strict=True)
        try:
            for cells in reader:
                if len(cells) != width and not _is_blank(cells):
                    raise DataError(f"{self}: line {reader.line_num} has {len(cells)} cells, the header {width}")
        except csv.Error as error:
            raise DataError(f"{self} cannot be read: {error}; a quote may be missing") from error


def open_csv(path: Path) -> CsvFile:
    """The CSV at `path`; a DataError when it is empty or not UTF-8."""
    if not path.is_file():
        raise MissingInputError(f"no table {path}")
    return parse_csv(path.read_bytes(), str(path), path.name)


def parse_csv(content: bytes, where: str, name: str) -> CsvFile:
    """The CSV of these bytes, parted by what of DELIMITERS splits header and first row alike, into most cells; blank lines are none of it."""
    try:
        text = re.sub('^"?sep=."?\r?\n', "", content.decode("utf-8-sig"))  # a line that Excel writes and hides
        heads = {delimiter: _head(text, delimiter) for delimiter in DELIMITERS}
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error}; save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{where} cannot be read: {error}; a quote may be missing") from error
    # A name with a comma in it parts a header of semicolons too, but not into as many cells as the row below has.
    delimiter = max(DELIMITERS, key=lambda one: (1 < len(heads[one][0]) == len(heads[one][1]), len(heads[one][0])))
    head = heads[delimiter]
    if not head[0]:
        raise DataError(f"{where} is empty")
    index = _has_index(*head)
    return CsvFile(where, name, text, tuple(head[0][index:]), delimiter, index, content.startswith(codecs.BOM_UTF8))


def _head(text: str, delimiter: str) -> list[list[str]]:
    """The cells of the header and of the first row; empty lists where there is none."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [*islice((cells for cells in reader if not _is_blank(cells)), 2), [], []][:2]


def _is_blank(cells: list[str]) -> bool:
    return len(cells) < 2 and not "".join(cells).strip()


def _has_index(header: list[str], row: list[str]) -> bool:
    """Whether a first column without a name stands before one that is called like ids, or that holds no numbers."""
    first, second = [plain_name(name).lower() for name in (*header[:2], "")][:2]
    if not is_index(first) or len(header) < 3 or second in CLASS_NAMES:
        return False
    return second in (*ID_NAMES, *PATH_NAMES) or bool(row[1:] and row[1] and not is_number(row[1]))


def is_index(name: str) -> bool:
    """Whether pandas calls a column so that has no name; `name` is in lower case."""
    return not name or name.startswith("unnamed:")


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def plain_names(cells: pd.Series) -> pd.Series:
    """The cells as names of classes or groups: see `plain_name`."""
    codes, names = pd.factorize(cells)
    return pd.Series(pd.array([plain_name(name) for name in names], dtype="str").take(codes), cells.index)


def check_filled(cells: pd.Series, what: str, where: object) -> None:
    """Raises a DataError with the first row, from 1 on below the header, unless every cell holds more than blanks."""
    empty = np.flatnonzero(cells.str.strip() == "")
    if len(empty):
        raise DataError(
            f"{where} has {len(empty)} rows with an empty {what}, the first in row {empty[0] + 1} below the header"
        )


def check_unique(ids: pd.Series, where: object) -> None:
    """Raises a DataError that lists the ids that stand in several rows."""
    if not ids.is_unique:
        twice = ids[ids.duplicated()].unique()
        raise DataError(
            f"{where}: ids stand twice, in several rows of the column {ids.name!r}: {sample(twice)}; name another as the id"
        )


def check_same_ids(ids: Collection[str], whose: str, others: Collection[str], of: str) -> None:
    """Raises a DataError that counts and names the ids of one side alone; `whose` and `of` say what the sides are."""
    left, right = set(ids), set(others)
    parts = [
        f"{len(alone)} of the {len(all_ids)} ids of {side} are not in {other} ({sample(sorted(alone))})"
        for alone, all_ids, side, other in ((left - right, left, whose, of), (right - left, right, of, whose))
        if alone
    ]
    if parts:
        raise DataError(
            f"{whose} and {of} name other rows: {'; '.join(parts)}; give those of the same rows, "
            "ids letter for letter (7 is not 007)"
        )
