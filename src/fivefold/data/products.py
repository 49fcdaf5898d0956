"""Products as rows of a table, with several images in each of several cells: one row an image, grouped by product."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from fivefold.csv_tables import CATEGORY_NAMES, ID_NAMES, CsvFile, check_filled, plain_names
from fivefold.data.adapters import Rows, make_rows
from fivefold.data.layouts import TRAIN_FOLDERS, bases, csvs, image_paths, levels, open_table, stem
from fivefold.data.store import ImageStore
from fivefold.errors import DataError, SettingsError
from fivefold.predictions import sample

log = logging.getLogger("fivefold")

TABLE = "image_data"
BETWEEN_PATHS = "[&,]"


@dataclass(frozen=True)
class ProductColumns:
    """A product table's columns; an empty name is guessed. `image_types`: the class of the images in each column."""

    image_types: Mapping[str, str]
    id: str = ""
    category: str = ""


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
    found = open_table(store, table) if table else _product_table(store, columns)
    log.info("data: products of %s", found)
    images = _images(found, columns)
    if not len(images):
        raise DataError(f"{found} names no image in the columns {', '.join(columns.image_types)}")
    where = bases(store, found.name, TRAIN_FOLDERS, base_path)
    images["path"] = image_paths(images["path"], found, store, where, check_files, images["row"].tolist())
    _check_owners(images, found)
    once = images.drop_duplicates("path")
    if len(once) < len(images):
        log.warning("data: %d images stand twice in their product's row and are taken once", len(images) - len(once))
    return make_rows(
        once["path"],
        once["label"],
        str(found),
        f"the products of {found.name}",
        groups=once["product"],
        strata=once["category"],
    )


def _product_table(store: ImageStore, columns: ProductColumns) -> CsvFile:
    for level in levels(store, TRAIN_FOLDERS):
        tables = [open_table(store, name) for name in csvs(store, level)]
        named = [table for table in tables if stem(table.name) == TABLE]
        usable = named or [table for table in tables if all(table.column(name, ()) for name in columns.image_types)]
        if len(usable) > 1:
            raise DataError(
                f"several product tables in {store.root}: {sample([t.name for t in usable])}; set data.table"
            )
        if usable:
            return usable[0]
    raise DataError(
        f"no {TABLE}.csv in {store.root}, nor a CSV with the columns {', '.join(columns.image_types)}; "
        "set data.table to its name, or data.image_types to its columns"
    )


def _images(table: CsvFile, columns: ProductColumns) -> pd.DataFrame:
    """Every image that the table names, in its order: `path` as written, `product`, `category`, `label`, `row` from 1 on.

    Rows without any image are reported.
    """
    id_column = table.must_have(columns.id, ID_NAMES, "data.id_column")
    category_column = table.must_have(columns.category, CATEGORY_NAMES, "data.category_column")
    label_of = {table.must_have(name, (), "data.image_types"): label for name, label in columns.image_types.items()}
    frame = table.read([id_column, category_column, *label_of])
    products = pd.DataFrame({"product": frame[id_column].str.strip(), "category": plain_names(frame[category_column])})
    _check_products(products, table)
    paths = frame[list(label_of)].stack().str.split(BETWEEN_PATHS, regex=True).explode().str.strip()
    paths = paths[paths != ""]
    rows, image_columns = (paths.index.get_level_values(level) for level in (0, 1))
    images = products.loc[rows].assign(path=paths.to_numpy(), label=image_columns.map(label_of), row=rows + 1)
    without = products["product"].drop(rows.unique())
    if len(without):
        log.warning("data: %d products of %s name no image and are left out: %s", len(without), table, sample(without))
    return images.reset_index(drop=True)


def _check_products(products: pd.DataFrame, table: CsvFile) -> None:
    check_filled(products["product"], "id", table)
    check_filled(products["category"], "category", table)
    again = products[products["product"].duplicated(keep=False)].groupby("product")["category"]
    torn = again.unique()[again.nunique() > 1]
    if len(torn):
        shown = ", ".join(f"{name!r} ({', '.join(sorted(found))})" for name, found in torn[:5].items())
        raise DataError(f"{table}: products of two categories: {shown}; a product has one category")
    if len(again):
        raise DataError(f"{table}: products stand in several rows: {sample(list(again.groups))}; give each one row")


def _check_owners(images: pd.DataFrame, table: CsvFile) -> None:
    """Raises a DataError for an image of two products or two classes."""
    by_path = images.groupby("path")
    for what, column in (("products", "product"), ("image types", "label")):
        torn = images[by_path[column].transform("nunique") > 1]
        if len(torn):
            same = torn[torn["path"] == torn["path"].iloc[0]]
            first, other = same.drop_duplicates(column)[[column, "row"]].to_numpy()[:2]
            raise DataError(
                f"{table}: {same['path'].iloc[0]!r} is an image of two {what}, {first[0]!r} (row {first[1]}) "
                f"and {other[0]!r} (row {other[1]}); name it once"
            )
