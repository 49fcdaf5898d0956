"""How data lies on disk, made rows: class folders or a CSV for training, a table or a folder to predict."""

import codecs
import logging
import posixpath
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from fivefold.arrow import pa
from fivefold.data.images import is_image
from fivefold.data.layouts import EVAL_FOLDERS, TRAIN_FOLDERS, bases, class_level, csvs, levels, stem
from fivefold.data.store import ImageStore, open_store
from fivefold.data.tables import (
    CATEGORY,
    ID_NAMES,
    LABEL_NAMES,
    PATH_NAMES,
    TEXT,
    CsvFile,
    check_unique,
    few,
    image_paths,
    open_csv,
)
from fivefold.errors import DataError, SettingsError

log = logging.getLogger("fivefold")

SAMPLE_SUBMISSION = "sample_submission"
NOT_TRAINING = {"test", SAMPLE_SUBMISSION, "submission", "gt", "ground_truth", "valid", "val"}
NOT_EVAL = {"train", SAMPLE_SUBMISSION, "submission", "gt", "ground_truth"}


@dataclass(frozen=True)
class Columns:
    """Names of a CSV's columns; empty ones are guessed (but for the group: no column then)."""

    id: str = ""
    path: str = ""
    label: str = ""
    group: str = ""


@dataclass(frozen=True, eq=False)
class Rows:
    """N labelled images: `ids`, `paths` and `groups` (or nulls) [N] strings in Arrow, `codes` [N] int32 into `classes`."""

    ids: pa.Array
    paths: pa.Array
    codes: np.ndarray
    classes: tuple[str, ...]
    groups: pa.Array
    layout: str

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, kept: np.ndarray) -> "Rows":
        """The rows where `kept` [N] bool is true; classes that are left without any row are dropped."""
        mask, used = pa.array(kept), np.unique(self.codes[kept])
        classes = tuple(self.classes[code] for code in used)
        _check_classes(classes, "the rows that are left")
        codes = np.searchsorted(used, self.codes[kept]).astype(np.int32)
        ids, paths, groups = (column.filter(mask) for column in (self.ids, self.paths, self.groups))
        return Rows(ids, paths, codes, classes, groups, self.layout)


@dataclass(frozen=True)
class Submission:
    """A sample submission: the id column's name, the other columns' (a class each), the ids [N] in order."""

    id_column: str
    classes: tuple[str, ...]
    ids: np.ndarray
    marked: bool = False
    """Whether the file starts with a byte-order mark, as Excel's do."""


@dataclass(frozen=True)
class EvalTable:
    """The images to predict, in order: `ids` and `paths` [N] object arrays of strings."""

    id_column: str
    ids: np.ndarray
    paths: np.ndarray
    sample: Submission | None

    def __len__(self) -> int:
        return len(self.ids)


def read_rows(
    store: ImageStore, layout: str = "auto", table: str = "", columns: Columns | None = None, check_files: bool = True
) -> Rows:
    """The training rows of a store: of the CSV `table` (or the one that is found), or of its class folders.

    Raises a DataError for what cannot be trained on: no images, one class, missing files or columns,
    paths that lead out, ids that stand twice, empty labels. A guessed layout is logged.
    """
    columns = columns or Columns()
    if layout not in ("auto", "csv", "folders"):
        raise SettingsError(f"data.layout={layout!r}; known: auto, csv, folders")
    if layout == "folders" and not table:
        return _class_folders(store)
    found = open_csv(store, table) if table else _training_table(store, columns)
    if found is None and layout == "csv":
        raise DataError(f"no CSV in {store.root}; set data.table to its name, or data.layout=folders")
    if found is not None and (table or layout == "csv" or _is_usable(found, columns)):
        log.info("data: rows of %s", found)
        return _table_rows(found, columns, check_files)
    try:
        rows = _class_folders(store)
    except DataError:
        if found is not None:
            _must_be_usable(found, columns)
        raise
    log.info("data: no table of labels, so the classes are the %s", rows.layout)
    return rows


def read_eval(source: ImageStore | Path, id_column: str = "", path_column: str = "") -> EvalTable:
    """The images to predict: of test.csv (or the one CSV with paths), else of test/, else all that there are.

    `id_column` and `path_column` are looked for first, and guessed where the table has no such column.
    Ids are the id column's values, or the paths as written where there is none. Without a CSV they
    are file names; without their suffix where the sample submission has them so. Files must exist.
    """
    store = open_store(source) if isinstance(source, Path) else source
    columns = Columns(id=id_column, path=path_column)
    tables = [name for level in levels(store, EVAL_FOLDERS) for name in csvs(store, level)]
    sample = _sample(store, next((name for name in tables if stem(name) == SAMPLE_SUBMISSION), None))
    given = [name for name in tables if stem(name) not in NOT_EVAL]
    named = [name for name in given if stem(name) == "test"]
    readable = [open_csv(store, name) for name in named[:1] or given]
    usable = [found for found in readable if _if_there(found, columns.path, PATH_NAMES)] or readable[: len(named)]
    if len(usable) > 1:
        raise DataError(
            f"several tables to predict in {store.root}: {few([t.name for t in usable])}; name one test.csv"
        )
    return _eval_table(usable[0], columns, sample) if usable else _eval_folder(store, sample)


def _training_table(store: ImageStore, columns: Columns) -> CsvFile | None:
    """train.csv, or the only CSV with the columns, or else the only CSV that may be meant; None for none."""
    for level in levels(store, TRAIN_FOLDERS):
        names = [name for name in csvs(store, level) if stem(name) not in NOT_TRAINING]
        named = [name for name in names if stem(name) == "train"]
        tables = [open_csv(store, name) for name in named or names]
        usable = [table for table in tables if _is_usable(table, columns)]
        if len(usable) > 1:
            raise DataError(f"several tables in {store.root}: {few([t.name for t in usable])}; set data.table to one")
        if tables:
            return (usable or tables)[0]
    return None


def _is_usable(table: CsvFile, columns: Columns) -> bool:
    return bool(table.column(columns.path, PATH_NAMES) and table.column(columns.label, LABEL_NAMES))


def _must_be_usable(table: CsvFile, columns: Columns) -> tuple[str, str]:
    path = table.must_have(columns.path, PATH_NAMES, "data.path_column")
    return path, table.must_have(columns.label, LABEL_NAMES, "data.label_column")


def _table_rows(table: CsvFile, columns: Columns, check_files: bool) -> Rows:
    path, label = _must_be_usable(table, columns)
    group = table.must_have(columns.group, (), "data.group_column") if columns.group else None
    if columns.id:
        table.must_have(columns.id, (), "data.id_column")
    row_id = table.column(columns.id, ID_NAMES) or path
    wanted = {row_id: TEXT, path: TEXT, **({group: TEXT} if group else {}), label: CATEGORY}
    if len({path, label, group} - {None}) < 2 + bool(group):
        raise DataError(f"{table}: one column cannot be path, label and group at once")
    read = table.read({name: TEXT if name == row_id else kind for name, kind in wanted.items()})
    labels = read[label] if row_id != label else read[label].dictionary_encode()
    check_unique(read[row_id], table, row_id)
    codes, classes = _classes(labels, table)
    groups = pc.if_else(pc.equal(read[group], ""), None, read[group]) if group else pa.nulls(len(codes), TEXT)
    paths = image_paths(read[path], table, bases(table.store, table.folder, TRAIN_FOLDERS), check_files)
    return Rows(read[row_id], paths, codes, classes, groups, f"the CSV {table.name}")


def _classes(labels: pa.DictionaryArray, table: CsvFile) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as codes [N] int32 into the sorted class names, without the blanks around them."""
    names = [unicodedata.normalize("NFC", name.strip()) for name in labels.dictionary.to_pylist()]
    indices = labels.indices.to_numpy()
    if "" in names:
        empty = np.flatnonzero(np.isin(indices, [code for code, name in enumerate(names) if not name]))
        raise DataError(f"{table} has {len(empty)} rows with an empty label, the first in line {empty[0] + 2}")
    classes = tuple(sorted(set(names)))
    _check_classes(classes, str(table))
    index = {name: code for code, name in enumerate(classes)}
    return np.array([index[name] for name in names], np.int32)[indices], classes


def _check_classes(classes: Sequence[str], where: str) -> None:
    if len(classes) < 2:
        raise DataError(f"{where}: only {len(classes)} class ({few(classes)}); at least two are needed")


def _class_folders(store: ImageStore) -> Rows:
    names = [name for name in store.names() if is_image(name)]
    if not names:
        raise DataError(f"{store.root} holds no images (nor a usable CSV); put a folder of images a class there")
    level = class_level(names)
    inside = [name for name in names if name.startswith(level) and "/" in name[len(level) :]]
    loose = sum(name.startswith(level) for name in names) - len(inside)
    if loose:
        log.warning("data: %d images lie in no class folder of %s and are left out", loose, level or store.root)
    labels = [unicodedata.normalize("NFC", name[len(level) :].partition("/")[0]) for name in inside]
    classes = tuple(sorted(set(labels)))
    where = f"{store.root}/{level}".rstrip("/")
    if not classes:
        raise DataError(f"{where} holds {loose} images but no class folders, and there is no CSV of labels")
    _check_classes(classes, where)
    index = {name: code for code, name in enumerate(classes)}
    codes = np.array([index[label] for label in labels], np.int32)
    paths = _path_column(inside, where)
    return Rows(paths, paths, codes, classes, pa.nulls(len(codes), TEXT), f"class folders below {level or '.'}")


def _path_column(names: Sequence[str], where: str) -> pa.Array:
    try:
        return pa.array(names, TEXT)
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has file names that are not UTF-8, as {error.object!r}; rename them") from error


def _sample(store: ImageStore, name: str | None) -> Submission | None:
    if name is None:
        return None
    table = open_csv(store, name)
    id_column, *classes = table.header
    ids = table.read({id_column: TEXT})[id_column]
    check_unique(ids, table, id_column)
    marked = store.read(name).startswith(codecs.BOM_UTF8)
    return Submission(id_column, tuple(classes), ids.to_numpy(zero_copy_only=False), marked)


def _if_there(table: CsvFile, given: str, known: Sequence[str]) -> str | None:
    """The column `given`, which may be the training table's alone; otherwise the first of `known`."""
    return (table.column(given, known) if given else None) or table.column("", known)


def _eval_table(table: CsvFile, columns: Columns, sample: Submission | None) -> EvalTable:
    path = _if_there(table, columns.path, PATH_NAMES) or table.must_have("", PATH_NAMES, "data.path_column")
    row_id = _if_there(table, columns.id, ID_NAMES) or path
    read = table.read({row_id: TEXT, path: TEXT})
    check_unique(read[row_id], table, row_id)
    paths = image_paths(read[path], table, bases(table.store, table.folder, EVAL_FOLDERS), check_files=True)
    return EvalTable(row_id, *(column.to_numpy(zero_copy_only=False) for column in (read[row_id], paths)), sample)


def _eval_folder(store: ImageStore, sample: Submission | None) -> EvalTable:
    *_, level = levels(store, EVAL_FOLDERS)
    level += "/" if level else ""
    paths = [name for name in store.names() if is_image(name) and name.startswith(level)]
    if not paths:
        raise DataError(f"{store.root} holds no test.csv and no images to predict")
    names = [path[len(level) :] for path in paths]
    stems = [posixpath.splitext(name)[0] for name in names]
    wanted = set(sample.ids) if sample else set()
    ids = stems if len(set(stems)) == len(stems) and set(stems) == wanted else names
    log.info("data: %d images of %s/%s, in the order of their names", len(paths), store.root, level)
    return EvalTable(sample.id_column if sample else "ID", np.array(ids, object), np.array(paths, object), sample)
