"""CSV files as Arrow columns of text: no id 007 becomes 7, no class "NA" becomes nothing."""

import csv
import io
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fivefold.data.images import is_image
from fivefold.data.store import ImageStore
from fivefold.errors import DataError, MissingInputError

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
TEXT = pa.string()
CATEGORY = pa.dictionary(pa.int32(), pa.string())
ODD_PATH = r"(^|/)\.{0,2}(/|$)|^[A-Za-z]:"
"""Paths that are not plain: empty, absolute, with a drive, or with `.` or `..` or nothing between slashes."""
DELIMITERS = (",", ";", "\t")
TRIED_PATHS = 64
LISTED = 5


@dataclass(frozen=True)
class CsvFile:
    """One CSV of a store, with the names of its columns as they stand in its first line, and what splits them."""

    store: ImageStore
    name: str
    header: tuple[str, ...]
    delimiter: str = DELIMITERS[0]

    def __str__(self) -> str:
        return f"{self.name} in {self.store.root}"

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.name)

    def column(self, given: str, known: Sequence[str]) -> str | None:
        """The header's name for `given`, or for the first of `known` (any case) that it has; None for a miss."""
        plain = [name.strip().lower() for name in self.header]
        for wanted in [given] if given else known:
            if wanted in self.header:
                return wanted
            if wanted.lower() in plain:
                return self.header[plain.index(wanted.lower())]
        return None

    def must_have(self, given: str, known: Sequence[str], key: str) -> str:
        """As `column`; a DataError names the setting `key` and the columns that there are."""
        found = self.column(given, known)
        if found is None:
            wanted = repr(given) if given else f"{', '.join(known[:3])} or the like"
            raise DataError(f"{self} has no column {wanted}; it has {', '.join(self.header)}; set {key}")
        return found

    def read(self, columns: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
        """The columns of that name, each in one piece, as TEXT or CATEGORY; never null."""
        import pyarrow.csv as pa_csv

        twice = sorted(name for name in columns if self.header.count(name) > 1)
        if twice:
            raise DataError(f"{self} has the column {twice[0]!r} twice")
        options = pa_csv.ConvertOptions(
            column_types=dict(columns), include_columns=list(columns), strings_can_be_null=False
        )
        try:
            table = pa_csv.read_csv(
                pa.py_buffer(self.store.read(self.name)),
                parse_options=pa_csv.ParseOptions(delimiter=self.delimiter),
                convert_options=options,
            )
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise DataError(
                f"{self} cannot be read: {error}; it must be UTF-8 text, its values split by {self.delimiter!r}"
            ) from error
        if not table.num_rows:
            raise DataError(f"{self} holds no rows")
        table = table.unify_dictionaries()
        return {name: table.column(name).combine_chunks() for name in columns}


def open_csv(store: ImageStore, name: str) -> CsvFile:
    """The CSV `name` of a store, split by semicolons or tabs where no comma splits its header; blank lines are none of it.

    A DataError when it is empty or not UTF-8.
    """
    if not store.exists(name):
        raise MissingInputError(f"no table {name} in {store.root}")
    try:
        header, delimiter = _header(store.read(name))
    except StopIteration:
        raise DataError(f"{name} in {store.root} is empty") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name} in {store.root} is not UTF-8 text: {error}; save it as UTF-8") from error
    return CsvFile(store, name, header, delimiter)


def _header(content: bytes) -> tuple[tuple[str, ...], str]:
    """The first line that is not blank, and the first of DELIMITERS that splits it (where none does, the first)."""
    for delimiter in DELIMITERS:
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
        header = tuple(next(filter(None, csv.reader(text, delimiter=delimiter))))
        if len(header) > 1:
            return header, delimiter
    return header, DELIMITERS[0]


def image_paths(
    raw: pa.Array, table: CsvFile, bases: Sequence[str], check_files: bool, rows: np.ndarray | None = None
) -> pa.Array:
    """The table's paths relative to the store's root, without the blanks around them.

    They count from the first of `bases` below which most of the first rows exist; names without a suffix get
    that of the images there. `rows` [N] are the numbers of the table's, if not one a path from 1 on. Raises a
    DataError for paths that lead out of the root, and with `check_files` for missing files, with
    the first few and their number.
    """
    if pc.any(pc.match_substring(raw, "\\")).as_py():
        raw = pc.replace_substring(raw, "\\", "/")
    raw = pc.utf8_trim_whitespace(raw)
    for root in _spellings(table.store.root):
        if pc.any(pc.starts_with(raw, root)).as_py():
            raw = pc.replace_substring_regex(raw, f"^{re.escape(root)}", "")
    raw = pc.replace_substring_regex(raw, r"^(\./)+", "") if pc.any(pc.starts_with(raw, "./")).as_py() else raw
    base, suffix = _where_most_are(raw[:TRIED_PATHS].to_pylist(), table.store, bases)
    raw = pc.binary_join_element_wise(raw, suffix, "") if suffix else raw
    paths = _plain_paths(raw, base, table, np.arange(len(raw)) + 1 if rows is None else rows)
    if check_files:
        _check_files(paths, table)
    return paths


def _where_most_are(paths: Sequence[str], store: ImageStore, bases: Sequence[str]) -> tuple[str, str]:
    """The base below which most of the paths are files, and the suffix that they lack; the first base where none is."""
    suffixes = [""]
    if not any(map(is_image, paths)):
        suffixes += [
            suffix
            for suffix, _ in Counter(posixpath.splitext(n)[1] for n in store.names() if is_image(n)).most_common()
        ]
    tried = [(base, suffix) for suffix in suffixes for base in bases]
    found = [sum(_exists(store, _plain(base, f"{path}{suffix}")) for path in paths) for base, suffix in tried]
    return tried[int(np.argmax(found))]


def without_root(path: str, root: Path) -> str:
    """An absolute path inside `root`, however that is spelled, as a relative one; another as it is."""
    for start in _spellings(root):
        path = f"{path}/".removeprefix(start).removesuffix("/")
    return path or "."


def _spellings(root: Path) -> list[str]:
    """A folder as it is given, absolute, and where its links lead, each with a slash at its end."""
    return [f"{path}/" for path in dict.fromkeys((root, root.absolute(), root.resolve()))]


def check_unique(ids: pa.Array, table: CsvFile, column: str) -> None:
    """Raises a DataError that lists the ids that stand in several rows."""
    if len(pc.dictionary_encode(ids).dictionary) == len(ids):
        return
    counted = pc.value_counts(ids)
    twice = pc.filter(counted.field("values"), pc.greater(counted.field("counts"), 1))
    raise DataError(
        f"{table}: ids stand in several rows of the column {column!r}: {few(twice.to_pylist())}; name another as the id"
    )


def few(names: Sequence[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(map(repr, names[:LISTED]))
    return f"{shown} and {len(names) - LISTED} more ({len(names)} in all)" if len(names) > LISTED else shown


def _plain(base: str, path: str) -> str | None:
    """The normal form of `path` below `base`; None when it is empty or leads out of the root."""
    normal = posixpath.normpath(posixpath.join(base, path))
    outside = normal.startswith(("/", "../")) or normal in (".", "..") or normal[1:2] == ":"
    return None if outside or not path.strip() else normal


def _exists(store: ImageStore, name: str | None) -> bool:
    return name is not None and store.exists(name)


def _plain_paths(raw: pa.Array, base: str, table: CsvFile, rows: np.ndarray) -> pa.Array:
    paths = pc.binary_join_element_wise(base, raw, "/") if base else raw
    odd = np.flatnonzero(pc.match_substring_regex(raw, ODD_PATH).to_numpy(zero_copy_only=False))
    if not len(odd):
        return paths
    mended = [_plain(base, path) for path in raw.take(pa.array(odd)).to_pylist()]
    outside = [row for row, path in zip(odd, mended, strict=True) if path is None]
    if outside:
        raise DataError(
            f"{table}: paths that are empty or lead out of {table.store.root}: "
            f"{few(raw.take(pa.array(outside)).to_pylist())}; the first in row {rows[outside[0]]} below the header"
        )
    is_odd = np.zeros(len(raw), bool)
    is_odd[odd] = True
    return pc.replace_with_mask(paths, pa.array(is_odd), pa.array(mended, TEXT))


def _check_files(paths: pa.Array, table: CsvFile) -> None:
    missing = [path for path in paths.to_pylist() if not table.store.exists(path)]
    if missing:
        raise DataError(f"{table} names {len(missing)} of {len(paths)} files that do not exist: {few(missing)}")
