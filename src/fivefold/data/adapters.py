"""How training data lies on disk, made rows: class folders, profiles of people, or a CSV."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fivefold.choose import choose
from fivefold.contract.spelling import is_sample, is_truth, plain_name
from fivefold.data.images import is_image
from fivefold.data.layouts import (
    IMAGE_FOLDERS,
    TRAIN_FOLDERS,
    bases,
    class_images,
    class_level,
    csvs,
    levels,
    stem,
    warn_of_deeper,
)
from fivefold.data.profiles import are_profiles, read_profiles
from fivefold.data.store import ImageStore
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
from fivefold.errors import DataError
from fivefold.factors import Factors

log = logging.getLogger("fivefold")

NOT_TRAINING = {"test", "submission", "valid", "val"}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
LONGEST = 60
"""Of what a message shows of a label, in characters."""


@dataclass(frozen=True)
class Columns:
    """Names of a CSV's columns; empty ones are guessed (but for the group: no column then)."""

    id: str = ""
    path: str = ""
    label: str = ""
    group: str = ""


@dataclass(frozen=True, eq=False)
class Rows:
    """N labelled images: `ids`, `paths` and `groups` (or nulls) [N] strings in Arrow, `codes` [N] int32 into `classes`.

    `factors`: what the classes are made of, None where they are single things.
    `strata` [N] strings, where a split spreads its groups by something else than the classes; every
    row then has a group, and the rows of a group one stratum.
    """

    ids: pa.Array
    paths: pa.Array
    codes: np.ndarray
    classes: tuple[str, ...]
    groups: pa.Array
    layout: str
    factors: Factors | None = None
    strata: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, kept: np.ndarray) -> "Rows":
        """The rows where `kept` [N] bool is true; classes that are left without any row are dropped."""
        mask, used = pa.array(kept), np.unique(self.codes[kept])
        classes = tuple(self.classes[code] for code in used)
        _check_classes(classes, "the rows that are left")
        codes = np.searchsorted(used, self.codes[kept]).astype(np.int32)
        ids, paths, groups = (column.filter(mask) for column in (self.ids, self.paths, self.groups))
        factors = None if self.factors is None else self.factors.only(classes)
        strata = None if self.strata is None else self.strata.filter(mask)
        return Rows(ids, paths, codes, classes, groups, self.layout, factors, strata)


def read_rows(
    store: ImageStore,
    layout: str = "auto",
    table: str = "",
    columns: Columns | None = None,
    check_files: bool = True,
    age_cuts: Sequence[float] = (30, 60),
    base_path: str = "",
) -> Rows:
    """The training rows of a store: of the CSV `table` (or the one that is found), of its profiles, or its class folders.

    Raises a DataError for what cannot be trained on: no images, one class, missing files or columns,
    paths that lead out, ids that stand twice, empty labels. A guessed layout is logged.
    """
    columns = columns or Columns()
    read_folders = choose(LAYOUTS, "data.layout", layout)
    if layout in ("folders", "mask_profiles") and not table:
        return read_folders(store, age_cuts)
    tables = [open_csv(store, table)] if table else _training_tables(store, columns)
    if not tables and layout == "csv":
        raise DataError(f"no CSV in {store.root}; set data.table to its name, or data.layout=folders")
    if tables and (table or layout == "csv" or _is_usable(tables[0], columns)):
        log.info("data: rows of %s", tables[0])
        _pass_over(tables[1:])
        return _table_rows(tables[0], columns, check_files, base_path)
    try:
        rows = _any_folders(store, age_cuts)
    except DataError:
        if tables:
            _must_be_usable(tables[0], columns)
        raise
    if tables and stem(tables[0].name) == "train" and rows.factors is None:
        _must_be_usable(tables[0], columns, ", or data.layout=folders where the folders are the classes")
    _pass_over(tables)
    log.info("data: no table of labels, so the classes are the %s", rows.layout)
    return rows


def _training_tables(store: ImageStore, columns: Columns) -> list[CsvFile]:
    """train.csv, or the only CSV with the columns and the others that may be meant, or those alone; empty for none."""
    for level in levels(store, TRAIN_FOLDERS):
        names = [name for name in csvs(store, level) if _may_be_training(name)]
        named = [name for name in names if stem(name) == "train"]
        tables = [open_csv(store, name) for name in named or names]
        usable = [table for table in tables if _is_usable(table, columns)]
        if len(usable) > 1:
            raise DataError(f"several tables in {store.root}: {few([t.name for t in usable])}; set data.table to one")
        if tables:
            return sorted(tables, key=lambda table: table not in usable)
    return []


def _may_be_training(name: str) -> bool:
    return stem(name) not in NOT_TRAINING and not is_sample(name) and not is_truth(name)


def _pass_over(tables: Sequence[CsvFile]) -> None:
    for table in tables:
        log.warning("data: %s is passed over; its columns are %s", table, ", ".join(table.header))


def _is_usable(table: CsvFile, columns: Columns) -> bool:
    return bool(table.column(columns.path, PATH_NAMES) and table.column(columns.label, LABEL_NAMES))


def _must_be_usable(table: CsvFile, columns: Columns, otherwise: str = "") -> tuple[str, str]:
    """The columns of paths and labels; the DataError for a miss names all that is to be set, and what to do `otherwise`."""
    wanted = {"data.path_column": (columns.path, PATH_NAMES), "data.label_column": (columns.label, LABEL_NAMES)}
    keys = " and ".join(key for key, names in wanted.items() if table.column(*names) is None) + otherwise
    path, label = (table.must_have(*names, keys) for names in wanted.values())
    return path, label


def _table_rows(table: CsvFile, columns: Columns, check_files: bool, base_path: str) -> Rows:
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
    groups = _groups(read[group]) if group else pa.nulls(len(codes), TEXT)
    where = bases(table.store, table.folder, (*TRAIN_FOLDERS, *IMAGE_FOLDERS), base_path)
    paths = image_paths(read[path], table, where, check_files)
    return Rows(read[row_id], paths, codes, classes, groups, f"the CSV {table.name}")


def _groups(written: pa.StringArray) -> pa.Array:
    """Groups [N] as they are written, without the blanks around them; null where there is none."""
    encoded = written.dictionary_encode()
    names = [plain_name(name) or None for name in encoded.dictionary.to_pylist()]
    return pa.array(names, TEXT).take(encoded.indices)


def _classes(labels: pa.DictionaryArray, table: CsvFile) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as codes [N] int32 into the sorted class names, without the blanks around them."""
    names = [plain_name(name) for name in labels.dictionary.to_pylist()]
    indices = labels.indices.to_numpy()
    empty = np.flatnonzero(np.isin(indices, [code for code, name in enumerate(names) if not name]))
    if len(empty):
        raise DataError(
            f"{table} has {len(empty)} rows with an empty label, the first in row {empty[0] + 1} below the header"
        )
    torn = np.flatnonzero(np.isin(indices, [code for code, name in enumerate(names) if set(name) & {*"\r\n"}]))
    if len(torn):
        raise DataError(
            f"{table} has {len(torn)} labels with a line break, the first {names[indices[torn[0]]][:LONGEST]!r} in "
            f"row {torn[0] + 1} below the header; a quote may be missing there"
        )
    classes = tuple(sorted(set(names)))
    _check_classes(classes, str(table))
    index = {name: code for code, name in enumerate(classes)}
    return np.array([index[name] for name in names], np.int32)[indices], classes


def _check_classes(classes: Sequence[str], where: str) -> None:
    if len(classes) < 2:
        raise DataError(f"{where}: only {len(classes)} class ({few(classes)}); at least two are needed")


def _images(store: ImageStore) -> tuple[list[str], str]:
    """The names of all images of a store, and the level whose folders mean something."""
    names = [name for name in store.names() if is_image(name)]
    if not names:
        packed = [name for name in store.names() if name.lower().endswith(ARCHIVES)]
        how = f"unpack {few(packed)}, or give one .zip itself" if packed else "put a folder of images a class there"
        raise DataError(f"{store.root} holds no images (nor a usable CSV); {how}")
    return names, class_level(names)


def _any_folders(store: ImageStore, age_cuts: Sequence[float]) -> Rows:
    """Of profiles where the folders are clearly such; else of classes."""
    names, level = _images(store)
    if are_profiles(names, level):
        return _profiles(store, names, level, age_cuts)
    return _class_folders(store, names, level)


def _profiles(store: ImageStore, names: Sequence[str], level: str, age_cuts: Sequence[float]) -> Rows:
    where = f"{store.root}/{level}".rstrip("/")
    found = read_profiles(names, level, age_cuts, where)
    classes = tuple(sorted(set(found.labels)))
    _check_classes(classes, where)
    index = {name: code for code, name in enumerate(classes)}
    codes = np.array([index[label] for label in found.labels], np.int32)
    paths, people = _path_column(found.paths, where), _path_column(found.people, where)
    return Rows(
        paths, paths, codes, classes, people, f"mask profiles below {level or '.'}", found.factors.only(classes)
    )


def _class_folders(store: ImageStore, names: Sequence[str], level: str) -> Rows:
    inside = [name for name in names if name.startswith(level) and "/" in name[len(level) :]]
    loose = sum(name.startswith(level) for name in names) - len(inside)
    if loose:
        log.warning("data: %d images lie in no class folder of %s and are left out", loose, level or store.root)
    where = f"{store.root}/{level}".rstrip("/")
    inside = class_images(inside, level, where)
    labels = [_class_name(name, level) for name in inside]
    classes = tuple(sorted(set(labels)))
    if not classes:
        raise DataError(f"{where} holds no class folders ({loose} images lie in none), and there is no CSV of labels")
    _check_classes(classes, where)
    warn_of_deeper(inside, level, where)
    index = {name: code for code, name in enumerate(classes)}
    codes = np.array([index[label] for label in labels], np.int32)
    paths = _path_column(inside, where)
    return Rows(paths, paths, codes, classes, pa.nulls(len(codes), TEXT), f"class folders below {level or '.'}")


def _class_name(name: str, level: str) -> str:
    """The class folder of an image, called as labels are; one of blanks alone as it is."""
    folder = name[len(level) :].partition("/")[0]
    return plain_name(folder) or folder


def _path_column(names: Sequence[str], where: str) -> pa.Array:
    try:
        return pa.array(names, TEXT)
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has file names that are not UTF-8, as {error.object!r}; rename them") from error


LAYOUTS = {
    "auto": _any_folders,
    "csv": _any_folders,
    "folders": lambda store, age_cuts: _class_folders(store, *_images(store)),
    "mask_profiles": lambda store, age_cuts: _profiles(store, *_images(store), age_cuts),
}
"""Folders of images as rows, by the name of the layout; a CSV is looked for first in the first two."""
