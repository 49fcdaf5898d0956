"""Images to folds: opens every image once, and writes which row belongs to which fold."""

import logging

import numpy as np
import pyarrow.compute as pc

from fivefold.arrow import pa
from fivefold.choose import choose
from fivefold.contract.files import write_json, write_text
from fivefold.contract.job import Job
from fivefold.contract.stages import CLASSES, FOLDS, SPLIT_SUMMARY
from fivefold.data.adapters import LAYOUTS, Columns, Rows, read_rows
from fivefold.data.folds import FoldTable, write_folds
from fivefold.data.grouping import find_duplicates, group_codes, merged
from fivefold.data.opening import keep_readable, open_images
from fivefold.data.parts import remove_parts, write_parts
from fivefold.data.products import ProductColumns, read_products
from fivefold.data.same_classes import SameClasses
from fivefold.data.splitting import divide, divide_groups
from fivefold.data.store import ImageStore, open_store
from fivefold.data.summary import as_text, class_file, log_summary, summarise
from fivefold.recipe import Data, Settings, Split
from fivefold.settings import key_settings

from .outcome import Outcome

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Splits the channel's rows; the folds, the classes and the figures."""
    split = settings.split
    store = open_store(job.channel("train"), split.max_unpacked_gib)
    rows = labelled_rows(store, settings)
    log.info("split: %d rows of %d classes in %s", len(rows), len(rows.classes), rows.layout)

    hashes, skipped, pictures, known = pa.nulls(len(rows), pa.string()), [], rows.paths, rows.classes
    if split.open_images:
        rows, opened, skipped = keep_readable(rows, open_images(store, rows.paths), split.skip_unreadable)
        hashes, pictures = opened.sha256, opened.pixels
    duplicates = find_duplicates(pictures)
    whole = merged(group_codes(rows.groups), duplicates)
    fold, part = divided(rows, whole, split)

    table = FoldTable(rows.ids, rows.paths, rows.codes, rows.classes, rows.groups, fold, part, hashes, rows.factors)
    lost = sorted(set(known) - set(rows.classes))
    summary = summarise(table, rows.layout, duplicates, skipped, lost, key_settings(settings, job.stage.sections))
    folder = job.output()
    remove_parts(folder)
    outputs = [folder / FOLDS, folder / CLASSES, folder / SPLIT_SUMMARY]
    write_folds(outputs[0], table)
    write_json(outputs[1], class_file(table))
    write_text(outputs[2], as_text(summary))
    if split.csv or rows.strata is not None:
        outputs += write_parts(folder, table, rows.strata, split.seed, split.parts)
    log_summary(summary)
    return Outcome(outputs, {"rows": len(table), "classes": len(table.classes), "folds": table.num_folds})


def labelled_rows(store: ImageStore, settings: Settings) -> Rows:
    """The rows that the settings describe; files are looked for only where unreadable ones stop the stage."""
    check_files = settings.split.open_images and not settings.split.skip_unreadable
    data = settings.data
    rows = choose(READERS, "data.layout", data.layout)(store, data, check_files)
    return SameClasses(data.same_classes, data.same_class).merge_rows(rows)


def of_products(store: ImageStore, data: Data, check_files: bool) -> Rows:
    columns = ProductColumns(data.image_types, data.id_column, data.category_column)
    return read_products(store, columns, data.table, data.base_path, check_files)


def of_table_or_folders(store: ImageStore, data: Data, check_files: bool) -> Rows:
    columns = Columns(data.id_column, data.path_column, data.label_column, data.group_column)
    return read_rows(store, data.layout, data.table, columns, check_files, data.age_cuts, data.base_path)


def divided(rows: Rows, whole: np.ndarray | None, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """(fold, part) of each row: of rows by their classes, or of whole groups by their strata where there are any."""
    how = (split.folds, split.holdout, split.parts, split.seed, split.stratify)
    if rows.strata is None:
        return divide(rows.codes, whole, *how)
    strata = pc.dictionary_encode(rows.strata).indices.to_numpy()
    return divide_groups(strata, group_codes(rows.groups), whole, *how)


READERS = dict.fromkeys(LAYOUTS, of_table_or_folders) | {"products": of_products}
"""What reads the rows of a channel, by the name of its layout."""
