"""Read training data into labelled rows: class folders, profiles of people, a CSV of paths and labels, or a CSV of products."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow as pa

from fivefold import csv_tables
from fivefold.config.schema import Data
from fivefold.contract.filenames import is_ground_truth, is_sample_submission, normalize_class_name, visual_form
from fivefold.contract.files import DANGLING, EMPTY, is_visible
from fivefold.csv_tables import LABEL_NAMES, PATH_NAMES, CsvFile, normalize_names
from fivefold.data.readers import layout_detection as layouts
from fivefold.data.readers.layout_detection import HELD_OUT, TRAIN_FOLDERS, image_paths
from fivefold.data.readers.profiles import are_profiles, profile_factors, read_profiles
from fivefold.data.readers.stores import UNUSED, ImageStore, Inventory, describe_counts, may_be_images, take_inventory
from fivefold.errors import DataError, SettingsError
from fivefold.label_factors import LabelFactors
from fivefold.log import log
from fivefold.predictions import preview

NON_TRAINING_TABLES = {"test", "submission", "valid", "val"}
PATH_SEPARATORS = "[&,]"
Column = pd.Series | Sequence[str]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """N labelled images: `ids`, `paths` and `groups` (or nulls) [N] strings in Arrow, `codes` [N] int32 into `classes`.

    `factors`: the factors of the classes, or None if they have none.
    `strata` [N] strings: what a split balances across groups instead of the classes, or None; with strata, every
    row has a group, and all rows of a group have the same stratum.
    `ignored`: number of files of the store that are in no row, by reason. `lost`: folders that would be classes if they
    had a readable image, each with a description of its content.
    """

    ids: pa.Array
    paths: pa.Array
    codes: np.ndarray
    classes: tuple[str, ...]
    groups: pa.Array
    layout: str
    factors: LabelFactors | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    strata: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, kept: np.ndarray) -> "LabelledImages":
        """Return the rows where `kept` [N] bool is true, without the classes that have no row left."""
        used = np.unique(self.codes[kept])
        classes = tuple(self.classes[code] for code in used)
        _check_classes(classes, "the rows that are left")
        arrow = {name: getattr(self, name) for name in ("ids", "paths", "groups", "strata")}
        return replace(
            self,
            codes=np.searchsorted(used, self.codes[kept]).astype(np.int32),
            classes=classes,
            factors=None if self.factors is None else self.factors.restrict(classes),
            **{name: None if column is None else column.filter(pa.array(kept)) for name, column in arrow.items()},
        )


def read_rows(store: ImageStore, data: Data, check_files: bool = True) -> LabelledImages:
    """Read the training rows of a store as `data.layout` selects: from a CSV, products, profiles, or class folders.

    The CSV is `data.table`, or else the detected one. Raise a DataError for data that cannot be trained on: no images,
    a single class, missing files or columns, paths outside the store, duplicate ids, empty labels. Log a detected layout.
    """
    stock = take_inventory(store)
    if data.layout == "products":
        rows = _product_rows(store, data, check_files)
    elif data.table or data.layout in ("auto", "csv"):
        rows = _table_or_folders(store, stock, data, check_files)
    else:
        rows = _folder_rows(store, stock, data)
    unused = UNUSED[rows.layout.startswith(("class folders", "mask profiles"))]
    return replace(rows, ignored=stock.counts(rows.paths.to_pylist(), unused))


def _table_or_folders(store: ImageStore, stock: Inventory, data: Data, check_files: bool) -> LabelledImages:
    tables = _find_tables(store, data, "train", lambda table: _is_usable(table, data))
    if not tables and data.layout == "csv":
        raise DataError(f"no CSV in {store.root}; set data.table to its name, or data.layout=folders")
    if tables and (
        data.table
        or data.layout == "csv"
        or _is_usable(tables[0], data)
        or (layouts.stem(tables[0].name) == "train" and not are_profiles(stock.images, _class_level(stock)))
    ):
        log.info("data: reading rows from %s", tables[0])
        _warn_ignored(tables[1:])
        return _table_rows(store, tables[0], _require_columns(store, tables[0], data), data, check_files)
    try:
        rows = _folder_rows(store, stock, data)
    except DataError:
        usable = [(table, names) for table in tables if all(names := _columns(store, table, data))]
        if not tables or len(usable) > 1:
            raise
        table, columns = usable[0] if usable else (tables[0], _require_columns(store, tables[0], data))
        return _table_rows(store, table, columns, data, check_files)
    _warn_ignored(tables)
    log.info("data: no CSV of labels, so the classes are the %s", rows.layout)
    return rows


def _find_tables(store: ImageStore, data: Data, usual: str, is_usable: Callable[[CsvFile], bool]) -> list[CsvFile]:
    """Return the CSV `data.table`, or the one called `usual`, or the only usable one, followed by the CSVs that are not usable."""
    if data.table:
        return [layouts.open_table(store, data.table)]
    others: list[CsvFile] = []
    for level in layouts.search_levels(store, TRAIN_FOLDERS):
        names = [name for name in layouts.list_csvs(store, level) if layouts.stem(name) not in NON_TRAINING_TABLES]
        names = [name for name in names if not is_sample_submission(name) and not is_ground_truth(name)]
        names = [name for name in names if name not in (data.labels, data.groups)]
        tables = [layouts.open_table(store, name) for name in names]
        named = [table for table in tables if layouts.stem(table.name) == usual]
        usable = named or [table for table in tables if is_usable(table)]
        if len(usable) > 1:
            names = preview([table.name for table in usable])
            raise DataError(f"several tables in {store.root}: {names}; set data.table to one of them")
        if named:
            return named
        others += [table for table in tables if table not in usable]
        if usable:
            return usable + others
    return others


def _warn_ignored(tables: Sequence[CsvFile]) -> None:
    for table in tables:
        log.warning("data: %s is ignored; its columns are %s", table, ", ".join(table.columns))


def _is_usable(table: CsvFile, data: Data) -> bool:
    return bool(table.column(data.path_column, PATH_NAMES) and table.column(data.label_column, LABEL_NAMES))


def _columns(store: ImageStore, table: CsvFile, data: Data) -> tuple[str | None, str | None]:
    """Return the columns of paths and labels (None for a missing one), detected by name, else by content.

    The path column is the one that names images of the store, and the label column the only other one; log such a guess.
    """
    path, label = table.column(data.path_column, PATH_NAMES), table.column(data.label_column, LABEL_NAMES)
    guessed = path is None and not data.path_column
    if guessed:
        path = layouts.guess_paths(table, store, HELD_OUT, label or "")
    rest = [name for name in table.columns if name != path]
    is_only_other = path and label is None and not data.label_column and len(rest) == 1
    if is_only_other and (guessed or layouts.guess_paths(table, store, HELD_OUT, rest[0])):
        label = rest[0]
        log.warning("data: %s: taking the labels from the only other column, %r", table, label)
    return path, label


def _require_columns(store: ImageStore, table: CsvFile, data: Data) -> tuple[str, str]:
    """Return the columns of paths and labels; the DataError for a missing one lists all keys to set, and the alternative."""
    path, label = _columns(store, table, data)
    keys = {"data.path_column": path, "data.label_column": label}
    absent = " and ".join(key for key, column in keys.items() if column is None)
    absent += ", or data.layout=folders if the folders are the classes"
    path = path or table.require_column(data.path_column, PATH_NAMES, absent)
    return path, label or table.require_column(data.label_column, LABEL_NAMES, absent)


def _table_rows(
    store: ImageStore, table: CsvFile, columns: tuple[str, str], data: Data, check_files: bool
) -> LabelledImages:
    path, label = columns
    group = table.require_column(data.group_column, (), "data.group_column") if data.group_column else None
    row_id = table.require_column(data.id_column, (), "data.id_column") if data.id_column else table.column("id")
    row_id = row_id or path
    if len({path, label, group} - {None}) < 2 + bool(group):
        raise DataError(f"{table}: one column cannot be path, label and group at once")
    frame = table.read([row_id, path, label, *([group] if group else [])])
    csv_tables.check_unique(frame[row_id], table)
    labels = normalize_names(frame[label])
    csv_tables.check_not_empty(labels, "label", table)
    _log_normalized(frame[label].unique(), table)
    broken = np.flatnonzero(labels.str.contains(r"[\r\n]"))
    if len(broken):
        place = f"the label in row {broken[0] + 1} below the header"
        raise DataError(f"{table}: {place} has a line break: {labels.iloc[broken[0]][:60]!r}; a quote may be missing")
    special = (*TRAIN_FOLDERS, *layouts.IMAGE_FOLDERS)
    paths = image_paths(frame[path], table, store, special, HELD_OUT, check_files, data.image_root)
    groups = normalize_names(frame[group]).replace("", None) if group else None
    return make_rows(paths, labels, str(table), f"the CSV {table.name}", ids=frame[row_id], groups=groups)


def make_rows(
    paths: Column,
    labels: Column,
    where: str,
    layout: str,
    ids: Column | None = None,
    groups: Column | None = None,
    strata: Column | None = None,
    factors: LabelFactors | None = None,
) -> LabelledImages:
    """Return N rows from their columns; without `ids`, the paths are the ids. DataErrors name `where`.

    Raise a DataError for fewer than two classes, and for file names that are not UTF-8.
    """
    codes, classes = pd.factorize(np.asarray(labels, object), sort=True)
    _check_classes(classes, where)
    columns = {"ids": paths if ids is None else ids, "paths": paths, "groups": groups, "strata": strata}
    try:
        arrow = {
            name: None if column is None else pa.array(np.asarray(column, object), pa.string(), from_pandas=True)
            for name, column in columns.items()
        }
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has file names that are not UTF-8, such as {error.object!r}; rename them") from error
    arrow["groups"] = pa.nulls(len(codes), pa.string()) if groups is None else arrow["groups"]
    factors = None if factors is None else factors.restrict(tuple(classes))
    return LabelledImages(codes=codes.astype(np.int32), classes=tuple(classes), layout=layout, factors=factors, **arrow)


def _log_normalized(names: Iterable[str], where: object) -> None:
    """Log the names that `normalize_class_name` changes."""
    changed = sorted({name for name in names if normalize_class_name(name) != name})
    if changed:
        examples = ", ".join(map(ascii, changed[:5]))
        log.info("data: %s: normalizing %d names (spaces, invisible characters): %s", where, len(changed), examples)


def _check_classes(classes: Sequence[str], where: str) -> None:
    if len(classes) < 2:
        raise DataError(f"{where}: only {len(classes)} class ({preview(classes)}); at least two are needed")
    looks = Counter(map(visual_form, classes))
    if alike := [ascii(name) for name in classes if looks[visual_form(name)] > 1]:
        names = ", ".join(alike[:4])
        raise DataError(f"{where}: different class names look the same: {names}; spell each class in one way")
    folded = Counter(map(str.casefold, classes))
    if cases := preview([name for name in classes if folded[name.casefold()] > 1]):
        log.warning("data: %s: class names that differ only in case count as different classes: %s", where, cases)


def _class_level(stock: Inventory) -> str:
    """Return the prefix below which folders are classes or profiles."""
    return layouts.class_level([name for name in stock.expected_images if "." in name])


def _folder_rows(store: ImageStore, stock: Inventory, data: Data) -> LabelledImages:
    """Read profiles if `data.layout` selects them or most folders are named as such, else class folders."""
    if not stock.images:
        content = describe_counts(stock.counts()) or "nothing"
        hint = "add a folder of images per class, or pass a .zip itself"
        raise DataError(f"{store.root} holds no images and no usable CSV (content: {content}); {hint}")
    level = _class_level(stock)
    where = f"{store.root}/{level}".rstrip("/")
    if data.layout == "folders" or not (data.layout == "mask_profiles" or are_profiles(stock.images, level)):
        return _class_rows(stock, level, where)
    photos = read_profiles(stock.images, level, data.age_bins, where)
    layout, factors = f"mask profiles below {level or '.'}", profile_factors(data.age_bins)
    return make_rows(photos["name"], photos["label"], where, layout, groups=photos["person"], factors=factors)


def _class_rows(stock: Inventory, level: str, where: str) -> LabelledImages:
    below = [name for name in stock.images if name.startswith(level)]
    inside = [name for name in below if "/" in name[len(level) :]]
    loose = len(below) - len(inside)
    if loose:
        log.warning("data: %d images are in no class folder of %s and are ignored", loose, where)
    lost = _folders_without_images(stock, level, where)
    inside = layouts.class_images(inside, level, where)
    if not inside:
        raise DataError(
            f"{where} holds no class folders ({loose} images are in no folder), and there is no CSV of labels"
        )
    folders = [name[len(level) :].partition("/")[0] for name in inside]
    _log_normalized(set(folders), where)
    labels = [normalize_class_name(folder) or folder for folder in folders]
    description = f"{where} without {', '.join(lost.values())}" if lost else where
    return replace(make_rows(inside, labels, description, f"class folders below {level or '.'}"), lost=lost)


def _folders_without_images(stock: Inventory, level: str, where: str) -> dict[str, str]:
    """Return the folders that would be classes if they had a readable image, with their content; log all folders without images."""
    contents: dict[str, Counter[str]] = defaultdict(Counter)
    for reason, names in stock.ignored.items():
        for folder, slash, _ in (name[len(level) :].partition("/") for name in names if name.startswith(level)):
            if slash or (reason == DANGLING and "." not in folder):
                contents[folder][reason] += reason != EMPTY
    used = {name[len(level) :].partition("/")[0] for name in stock.images if name.startswith(level)}
    without = filter(is_visible, sorted(contents.keys() - used - set(layouts.held_out_folders(contents))))
    descriptions = {name: f"{name!r} ({describe_counts(contents[name]) or 'empty'})" for name in without}
    if descriptions:
        log.warning("data: folders of %s without images are not classes: %s", where, ", ".join(descriptions.values()))
    return {name: text for name, text in descriptions.items() if may_be_images(contents[name])}


def _product_rows(store: ImageStore, data: Data, check_files: bool) -> LabelledImages:
    """Read the images of a product table: image_data.csv, or the CSV `data.table`, or the only one with the columns.

    A cell holds paths separated by `&` or `,`; an empty cell holds none. The class of an image is that of its
    column, its group is the product, and its stratum the product's category. Raise a DataError for a
    duplicate product, an empty id or category, and an image of two products or two classes.
    """
    if len(set(data.image_types.values())) < 2:
        raise SettingsError("data.image_types gives fewer than two classes; map image columns to at least two")
    tables = _find_tables(store, data, "image_data", lambda table: all(map(table.column, data.image_types)))
    if not tables:
        raise DataError(f"no image_data.csv in {store.root}, nor another CSV; set data.table to its name")
    table = tables[0]
    log.info("data: reading products from %s", table)
    images = _product_images(table, data)
    if not len(images):
        raise DataError(f"{table} lists no image in the columns {', '.join(data.image_types)}")
    images["path"] = image_paths(images["path"], table, store, TRAIN_FOLDERS, HELD_OUT, check_files, data.image_root)
    for kind, column in (("products", "product"), ("image types", "label")):
        conflicting = images[images.groupby("path")[column].transform("nunique") > 1]
        if len(conflicting):
            path = conflicting["path"].iloc[0]
            owners = preview(conflicting[column][conflicting["path"] == path].unique())
            raise DataError(f"{table}: {path!r} is an image of two {kind}, {owners}; list it once")
    unique = images.drop_duplicates("path")
    if repeated := len(images) - len(unique):
        log.warning("data: %d images are duplicates within a product's row and are used once", repeated)
    columns = {"groups": unique["product"], "strata": unique["category"]}
    return make_rows(unique["path"], unique["label"], str(table), f"the products of {table.name}", **columns)


def _product_images(table: CsvFile, data: Data) -> pd.DataFrame:
    """Return every image of the table in order: `path` as written, `product`, `category`, `label`; the index is the row.

    Log rows without images.
    """
    id_column = table.require_column(data.id_column, csv_tables.ID_NAMES, "data.id_column")
    category_column = table.require_column(data.category_column, csv_tables.CATEGORY_NAMES, "data.category_column")
    label_of = {table.require_column(name, (), "data.image_types"): label for name, label in data.image_types.items()}
    frame = table.read([id_column, category_column, *label_of])
    ids, categories = frame[id_column].str.strip(), normalize_names(frame[category_column])
    csv_tables.check_not_empty(ids, "id", table)
    csv_tables.check_not_empty(categories, "category", table)
    csv_tables.check_unique(ids, table)
    paths = frame[list(label_of)].stack().str.split(PATH_SEPARATORS, regex=True).explode().str.strip()
    paths = paths[paths != ""]
    rows, image_columns = (paths.index.get_level_values(level) for level in (0, 1))
    without = ids.drop(rows.unique())
    if len(without):
        log.warning("data: %d products of %s list no image and are ignored: %s", len(without), table, preview(without))
    products = pd.DataFrame({"product": ids, "category": categories})
    return products.loc[rows].assign(path=paths.to_numpy(), label=image_columns.map(label_of))
