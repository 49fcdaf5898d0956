"""Read CSV files as text, so that the id 007 does not become 7, nor the class "NA" a missing value."""

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

from fivefold.contract.filenames import normalize_class_name
from fivefold.errors import DataError, MissingInputError
from fivefold.predictions import preview

ID_NAMES = ("id",)
PATH_NAMES = (
    "image_path", "img_path", "path", "file_path", "filepath", "filename", "file_name", "file", "image", "img", "imageid",
    "image_id", "img_id", "image_name", "img_name", "imagename",
)  # fmt: skip
LABEL_NAMES = ("target", "label", "class_name", "class", "category")
ANSWER_NAMES = ("ans", "answer")
CLASS_NAMES = (*LABEL_NAMES, *ANSWER_NAMES)
"""Class columns in ground truths and submissions; the first one in the table is used."""
TRUE_CLASS_NAMES = ("true_class", "image_type", *LABEL_NAMES)
CATEGORY_NAMES = ("category_name", "category")
DELIMITERS = (",", ";", "\t")
csv.field_size_limit(2**31 - 1)  # cells can hold masks and images; the size of a table is limited elsewhere


@dataclass(frozen=True)
class CsvFile:
    """A CSV after reading its header: `where` describes its place, `name` its file, and `columns` the column names as written.

    `has_index`: the file has a first column of row numbers, as written by pandas, which is not in `columns`.
    `has_bom`: the file starts with a byte-order mark, as written by Excel.
    """

    where: str
    name: str
    text: str = field(repr=False)
    columns: tuple[str, ...]
    delimiter: str
    has_index: bool
    has_bom: bool

    def __str__(self) -> str:
        return self.where

    @property
    def line_end(self) -> str:
        return "\r\n" if self.text.partition("\n")[0].endswith("\r") else "\n"

    @property
    def normalized_columns(self) -> list[str]:
        """Return the column names in lower case, without surrounding spaces."""
        return [normalize_class_name(name).lower() for name in self.columns]

    def column(self, name: str, known: Sequence[str] = ()) -> str | None:
        """Return the column `name` as spelled in the header, or without a name the first of `known`; None if missing."""
        for candidate in [name] if name else known:
            if candidate in self.columns:
                return candidate
            if candidate.lower() in self.normalized_columns:
                return self.columns[self.normalized_columns.index(candidate.lower())]
        return None

    def require_column(self, name: str, known: Sequence[str], key: str) -> str:
        """Return `column`; raise a DataError with the setting `key` and the existing columns if it is missing."""
        column = self.column(name, known)
        if column is None:
            expected = repr(name) if name else f"{', '.join(known[:3])} or the like"
            raise DataError(f"{self} has no column {expected}; it has {', '.join(self.columns)}; set {key}")
        return column

    def read(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the rows with the named columns, or all, with every cell as text.

        Raise a DataError for no rows, rows of another length than the header, broken quotes, and duplicate columns.
        """
        cells_of: dict[str, list[str]] = {name: [] for name in columns or self.columns}
        if duplicates := [name for name in cells_of if self.columns.count(name) > 1]:
            raise DataError(f"{self} has two columns {duplicates[0]!r}; rename one of them")
        places = [(cells_of[name], self.columns.index(name) + self.has_index) for name in cells_of]
        width = len(self.columns) + self.has_index
        reader = csv.reader(io.StringIO(self.text, newline=""), delimiter=self.delimiter, strict=True)
        try:
            for row in reader:
                if _is_blank(row):
                    continue
                if len(row) != width:
                    raise DataError(f"{self}: line {reader.line_num} has {len(row)} cells, the header {width}")
                for column, position in places:
                    column.append(row[position])
        except csv.Error as error:
            raise DataError(f"{self} cannot be read: {error}; a quote may be missing") from error
        frame = pd.DataFrame(cells_of, dtype=str)[1:].reset_index(drop=True)
        if not len(frame):
            raise DataError(f"{self} holds no rows, only the header {', '.join(self.columns)}")
        return frame

    def numbers(self, cells: pd.DataFrame) -> np.ndarray:
        """Return the cells as float64 [N, C]; a comma in a cell is a decimal comma.

        Raise a DataError with the row and the column of the first cell that is not a number.
        """
        cells = cells.apply(lambda column: column.str.replace(",", ".", regex=False))
        try:
            return cells.to_numpy(object).astype(np.float64)
        except ValueError as error:
            row, column = np.argwhere(~cells.map(is_number).to_numpy())[0]
            raise DataError(
                f"{self}: {cells.iat[row, column]!r} in row {row + 1} below the header, "
                f"column {cells.columns[column]!r}, is not a number"
            ) from error


def open_csv(path: Path) -> CsvFile:
    """Open the CSV at `path`; raise a DataError if it is empty or not UTF-8."""
    if not path.is_file():
        raise MissingInputError(f"no table {path}")
    return parse_csv(path.read_bytes(), str(path), path.name)


def parse_csv(content: bytes, where: str, name: str) -> CsvFile:
    """Parse these bytes as a CSV, ignoring blank lines.

    Use the delimiter that splits the header and the first row into the same number of cells, and into the most cells.
    """
    try:
        text = re.sub('^"?sep=."?\r?\n', "", content.decode("utf-8-sig"))  # a line that Excel adds and hides
        rows = {delimiter: _first_two_rows(text, delimiter) for delimiter in DELIMITERS}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is not a CSV in UTF-8: {error}; save it as UTF-8") from error
    # A comma in a name also splits a header of semicolons, but not into as many cells as the first row has.
    delimiter = max(DELIMITERS, key=lambda d: (1 < len(rows[d][0]) == len(rows[d][1]), len(rows[d][0])))
    header, row = rows[delimiter]
    if not header:
        raise DataError(f"{where} is empty")
    index = _has_index(header, row)
    return CsvFile(where, name, text, tuple(header[index:]), delimiter, index, content.startswith(codecs.BOM_UTF8))


def _first_two_rows(text: str, delimiter: str) -> list[list[str]]:
    """Return the cells of the header and of the first row; empty lists for missing ones."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [*islice((cells for cells in reader if not _is_blank(cells)), 2), [], []][:2]


def _is_blank(cells: list[str]) -> bool:
    return len(cells) < 2 and not "".join(cells).strip()


def _has_index(header: list[str], row: list[str]) -> bool:
    """Return whether the first column has no name and the second is named as ids, or holds no numbers."""
    first, second = [normalize_class_name(name).lower() for name in (*header[:2], "")][:2]
    if not is_index(first) or len(header) < 3 or second in CLASS_NAMES:
        return False
    return second in (*ID_NAMES, *PATH_NAMES) or bool(row[1:] and row[1] and not is_number(row[1]))


def is_index(name: str) -> bool:
    """Return whether pandas gives this name (in lower case) to a column without a name."""
    return not name or name.startswith("unnamed:")


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def normalize_names(cells: pd.Series) -> pd.Series:
    """Return the cells as normalized names of classes or groups: see `normalize_class_name`."""
    codes, names = pd.factorize(cells)
    return pd.Series(pd.array([normalize_class_name(name) for name in names], dtype="str").take(codes), cells.index)


def check_not_empty(cells: pd.Series, column: str, where: object) -> None:
    """Raise a DataError with the first row (counted from 1 below the header) whose cell is empty or only spaces."""
    empty = np.flatnonzero(cells.str.strip() == "")
    if len(empty):
        first = f"the first in row {empty[0] + 1} below the header"
        raise DataError(f"{where} has {len(empty)} rows with an empty {column}, {first}")


def check_unique(ids: pd.Series, where: object) -> None:
    """Raise a DataError that lists duplicate ids."""
    if not ids.is_unique:
        duplicates = preview(ids[ids.duplicated()].unique())
        raise DataError(f"{where}: duplicate ids in the column {ids.name!r}: {duplicates}; use another id column")


def check_same_ids(ids: Collection[str], ids_label: str, others: Collection[str], others_label: str) -> None:
    """Raise a DataError that counts and lists the ids of one side only; `ids_label` and `others_label` describe the two sides."""
    left, right = (set(ids), ids_label), (set(others), others_label)
    problems = [
        f"{len(some - rest)} of the {len(some)} ids of {side} are not in {other} ({preview(sorted(some - rest))})"
        for (some, side), (rest, other) in ((left, right), (right, left))
        if some - rest
    ]
    if problems:
        raise DataError(
            f"{ids_label} and {others_label} have different rows: {'; '.join(problems)}; both must have the same ids, "
            "character by character (7 is not 007)"
        )
