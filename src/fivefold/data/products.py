"""Products as rows of a table, with several images in each of several cells: one row an image, grouped by product."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from fivefold.contract.spelling import plain_name
from fivefold.data.adapters import Rows
from fivefold.data.layouts import TRAIN_FOLDERS, bases, csvs, levels, stem
from fivefold.data.store import ImageStore
from fivefold.data.tables import ID_NAMES, TEXT, CsvFile, few, image_paths, open_csv
from fivefold.errors import DataError, SettingsError

log = logging.getLogger("fivefold")

TABLE = "image_data"
CATEGORY_NAMES = ("category_name", "category")
BETWEEN_PATHS = re.compile("[&,]")


@dataclass(frozen=True)
class ProductColumns:
    """A product table's columns; an empty name is guessed. `image_types`: the class of the images in each column."""

    image_types: Mapping[str, str]
    id: str = ""
    category: str = ""


@dataclass
class Images:
    """N images in the order of the table: path as written, product, class, category, and the row that names it."""

    path: list[str] = field(default_factory=list)
    product: list[str] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    category: list[str] = field(default_factory=list)
    row: list[int] = field(default_factory=list)

    def take(self, kept: list[int]) -> "Images":
        """The images at the positions `kept`."""
        return Images(*([column[at] for at in kept] for column in vars(self).values()))


def read_products(
    store: ImageStore, columns: ProductColumns, table: str = "", base_path: str = "", check_files: bool = True
) -> Rows:
    """The images of a product table: `image_data.csv`, or the CSV `table`, or the only one with the columns.

    A cell holds paths between `&` or `,`; an empty cell is none. The class of an image is that of its
    column, its group the product, its stratum the product's category. Raises a DataError for a
    product that stands twice, an empty id or category, and an image of two products or two classes.
    """
    if len(set(columns.image_types.values())) < 2:
        raise SettingsError("data.image_types gives fewer than two classes; map image columns to at least two")
    found = open_csv(store, table) if table else _product_table(store, columns)
    log.info("data: products of %s", found)
    images = _images(found, columns)
    if not images.path:
        raise DataError(f"{found} names no image in the columns {', '.join(columns.image_types)}")
    where = bases(store, found.folder, TRAIN_FOLDERS, base_path)
    paths = image_paths(pa.array(images.path, TEXT), found, where, check_files, np.array(images.row))
    kept = _once(images, paths.to_pylist(), found)
    images, paths = images.take(kept), paths.take(pa.array(kept))
    classes = tuple(sorted(set(images.label)))
    if len(classes) < 2:
        raise DataError(f"{found}: all images are of one class ({few(classes)}); at least two are needed")
    return Rows(
        ids=paths,
        paths=paths,
        codes=np.searchsorted(np.array(classes, object), np.array(images.label, object)).astype(np.int32),
        classes=classes,
        groups=pa.array(images.product, TEXT),
        layout=f"the products of {found.name}",
        strata=pa.array(images.category, TEXT),
    )


def _product_table(store: ImageStore, columns: ProductColumns) -> CsvFile:
    for level in levels(store, TRAIN_FOLDERS):
        tables = [open_csv(store, name) for name in csvs(store, level)]
        named = [table for table in tables if stem(table.name) == TABLE]
        usable = named or [table for table in tables if all(table.column(name, ()) for name in columns.image_types)]
        if len(usable) > 1:
            raise DataError(f"several product tables in {store.root}: {few([t.name for t in usable])}; set data.table")
        if usable:
            return usable[0]
    raise DataError(
        f"no {TABLE}.csv in {store.root}, nor a CSV with the columns {', '.join(columns.image_types)}; "
        "set data.table to its name, or data.image_types to its columns"
    )


def _images(table: CsvFile, columns: ProductColumns) -> Images:
    """Every image that the table names; rows without any are reported."""
    id_column = table.must_have(columns.id, ID_NAMES, "data.id_column")
    category_column = table.must_have(columns.category, CATEGORY_NAMES, "data.category_column")
    of_type = {table.must_have(name, (), "data.image_types"): kind for name, kind in columns.image_types.items()}
    read = table.read(dict.fromkeys((id_column, category_column, *of_type), TEXT))
    products = [name.strip() for name in read[id_column].to_pylist()]
    categories = [plain_name(name) for name in read[category_column].to_pylist()]
    _check_products(products, categories, table)
    cells = {name: read[name].to_pylist() for name in of_type}
    images, without = Images(), []
    for row, (product, category) in enumerate(zip(products, categories, strict=True)):
        before = len(images.path)
        for name, kind in of_type.items():
            for path in filter(None, map(str.strip, BETWEEN_PATHS.split(cells[name][row]))):
                for column, value in zip(vars(images).values(), (path, product, kind, category, row + 1), strict=True):
                    column.append(value)
        if len(images.path) == before:
            without.append(product)
    if without:
        log.warning("data: %d products of %s name no image and are left out: %s", len(without), table, few(without))
    return images


def _check_products(products: list[str], categories: list[str], table: CsvFile) -> None:
    for what, values in (("id", products), ("category", categories)):
        if "" in values:
            raise DataError(
                f"{table} has {values.count('')} rows with an empty {what}, the first in row "
                f"{values.index('') + 1} below the header"
            )
    twice = [name for name, count in Counter(products).items() if count > 1]
    if not twice:
        return
    of = {name: {c for p, c in zip(products, categories, strict=True) if p == name} for name in twice[:100]}
    torn = [f"{name!r} ({', '.join(sorted(found))})" for name, found in of.items() if len(found) > 1]
    if torn:
        raise DataError(f"{table}: products of two categories: {', '.join(torn[:5])}; a product has one category")
    raise DataError(f"{table}: products stand in several rows: {few(twice)}; give each one row")


def _once(images: Images, paths: list[str], table: CsvFile) -> list[int]:
    """The positions of images that stand for the first time; an image of two products or classes is a DataError."""
    first: dict[str, int] = {}
    for at, path in enumerate(paths):
        other = first.setdefault(path, at)
        for what, values in (("products", images.product), ("image types", images.label)):
            if values[other] != values[at]:
                raise DataError(
                    f"{table}: {path!r} is an image of two {what}, {values[other]!r} (row {images.row[other]}) "
                    f"and {values[at]!r} (row {images.row[at]}); name it once"
                )
    if len(first) < len(paths):
        log.warning("data: %d images stand twice in their product's row and are taken once", len(paths) - len(first))
    return list(first.values())
