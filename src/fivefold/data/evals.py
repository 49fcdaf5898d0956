"""The images to predict: of a table or a folder, and the submission that a sample asks for."""

import codecs
import logging
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fivefold.contract.spelling import is_sample, is_truth, plain_name
from fivefold.data.images import is_image
from fivefold.data.layouts import EVAL_FOLDERS, IMAGE_FOLDERS, bases, csvs, levels, stem
from fivefold.data.store import ImageStore, open_store
from fivefold.data.tables import (
    ANSWER_NAMES,
    ID_NAMES,
    PATH_NAMES,
    TEXT,
    CsvFile,
    check_unique,
    few,
    image_paths,
    open_csv,
)
from fivefold.errors import DataError

log = logging.getLogger("fivefold")

NOT_EVAL = {"train", "submission"}


@dataclass(frozen=True)
class Submission:
    """A sample submission: the id column's name, the other columns' (a class each), the ids [N] in order."""

    id_column: str
    classes: tuple[str, ...]
    ids: np.ndarray
    marked: bool = False
    """Whether the file starts with a byte-order mark, as Excel's do."""
    numbered: str = ""
    """The name of a first column, of the rows' numbers from 0; empty: there is none."""
    written: tuple[str, ...] = ()
    """The classes as the file writes them, with blanks or decomposed letters; empty: as in `classes`."""
    end: str = "\n"
    """The end of a line."""

    @property
    def header(self) -> list[str]:
        """The first line's cells."""
        return [*([self.numbered] if self.numbered else []), self.id_column, *(self.written or self.classes)]


@dataclass(frozen=True)
class EvalTable:
    """The images to predict, in order: `ids` and `paths` [N] object arrays of strings."""

    id_column: str
    ids: np.ndarray
    paths: np.ndarray
    sample: Submission | None

    def __len__(self) -> int:
        return len(self.ids)

    def answered_in(self, column: str, numbered: str) -> "EvalTable":
        """The same images, whose submission has predicted classes in `column`; what a sample asks for goes first."""
        if self.sample or not column:
            return self
        return replace(self, sample=Submission(self.id_column, (column,), self.ids, numbered=numbered))


def read_eval(source: ImageStore | Path, id_column: str = "", path_column: str = "") -> EvalTable:
    """The images to predict: of test.csv (or the one CSV with paths), else of test/, else all that there are.

    `id_column` and `path_column` are looked for first, and guessed where the table has no such column.
    Ids are the id column's values, or the paths as written where there is none. Without a CSV they
    are file names; paths, or either without the suffix, where the sample submission has them so. Files must exist.
    """
    store = open_store(source) if isinstance(source, Path) else source
    tables = [name for level in levels(store, EVAL_FOLDERS) for name in csvs(store, level)]
    sample = _sample(store, next(filter(is_sample, tables), None))
    given = [name for name in tables if not (stem(name) in NOT_EVAL or is_sample(name) or is_truth(name))]
    named = [name for name in given if stem(name) == "test"]
    readable = [open_csv(store, name) for name in named[:1] or given]
    usable = [found for found in readable if _if_there(found, path_column, PATH_NAMES)] or readable[: len(named)]
    if len(usable) > 1:
        raise DataError(
            f"several tables to predict in {store.root}: {few([t.name for t in usable])}; name one test.csv"
        )
    return _eval_table(usable[0], id_column, path_column, sample) if usable else _eval_folder(store, sample)


def check_rows(images: EvalTable) -> None:
    """Raises a DataError, with the ids, unless the sample submission has a row for each of the images and no other."""
    if images.sample is None or images.sample.ids is images.ids:
        return
    asked, there = set(images.sample.ids), set(images.ids)
    parts = []
    if extra := sorted(asked - there):
        parts.append(f"{len(extra)} of its {len(asked)} ids are of no image ({few(extra)})")
    if missing := sorted(there - asked):
        parts.append(f"{len(missing)} of the {len(there)} images are not in it ({few(missing)})")
    if parts:
        raise DataError(
            f"the sample submission and the test images name other rows: {'; '.join(parts)}; "
            "give the sample of these images, its ids letter for letter (7 is not 007)"
        )


def _sample(store: ImageStore, name: str | None) -> Submission | None:
    if name is None:
        return None
    table = open_csv(store, name)
    id_column, *written = table.header
    ids = table.read({id_column: TEXT})[id_column]
    check_unique(ids, table, id_column)
    plain = tuple(plain_name(cell) for cell in written)
    return _of_file(table, Submission(id_column, plain, ids.to_numpy(zero_copy_only=False), written=tuple(written)))


def _of_file(table: CsvFile, submission: Submission) -> Submission:
    """The submission with the byte-order mark and the ends of lines that the table's file has."""
    first, _, _ = table.store.read(table.name).partition(b"\n")
    end = "\r\n" if first.endswith(b"\r") else "\n"
    return replace(submission, marked=first.startswith(codecs.BOM_UTF8), end=end)


def _if_there(table: CsvFile, given: str, known: Sequence[str]) -> str | None:
    """The column `given`, which may be the training table's alone; otherwise the first of `known`."""
    return (table.column(given, known) if given else None) or table.column("", known)


def _eval_table(table: CsvFile, id_column: str, path_column: str, sample: Submission | None) -> EvalTable:
    path = _if_there(table, path_column, PATH_NAMES) or table.must_have("", PATH_NAMES, "data.path_column")
    row_id = _if_there(table, id_column, ID_NAMES) or path
    read = table.read({row_id: TEXT, path: TEXT})
    check_unique(read[row_id], table, row_id)
    paths = image_paths(
        read[path], table, bases(table.store, table.folder, (*EVAL_FOLDERS, *IMAGE_FOLDERS)), check_files=True
    )
    ids, paths = (column.to_numpy(zero_copy_only=False) for column in (read[row_id], paths))
    return EvalTable(row_id, ids, paths, sample or _asks_itself(table, row_id, path, ids))


def _asks_itself(table: CsvFile, row_id: str, path: str, ids: np.ndarray) -> Submission | None:
    """The table as its own sample submission, where it has nothing but images and a column for the answer."""
    answer = table.column("", ANSWER_NAMES)
    if row_id != path or answer is None or len(table.header) != 2:
        return None
    return _of_file(table, Submission(row_id, (answer,), ids))


def _eval_folder(store: ImageStore, sample: Submission | None) -> EvalTable:
    *_, level = levels(store, EVAL_FOLDERS)
    level += "/" if level else ""
    paths = [name for name in store.names() if is_image(name) and name.startswith(level)]
    if not paths:
        raise DataError(f"{store.root} holds no test.csv and no images to predict")
    names = [path[len(level) :] for path in paths]
    wanted = set(sample.ids) if sample else set()
    bare = [[posixpath.splitext(name)[0] for name in each] for each in (names, paths)]
    ids = next((each for each in (bare[0], paths, bare[1]) if len(wanted) == len(each) and set(each) == wanted), names)
    log.info("data: %d images of %s/%s, in the order of their names", len(paths), store.root, level)
    return EvalTable(sample.id_column if sample else "ID", np.array(ids, object), np.array(paths, object), sample)
