"""Find the images to predict, in a CSV or a folder, and read the sample submission that defines the output format."""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fivefold.contract.filenames import is_ground_truth, is_sample_submission, normalize_class_name
from fivefold.csv_tables import ANSWER_NAMES, ID_NAMES, PATH_NAMES, CsvFile, check_same_ids, check_unique
from fivefold.data.readers import layout_detection as layouts
from fivefold.data.readers.layout_detection import EVAL_FOLDERS, TRAIN_FOLDERS, open_table, stem
from fivefold.data.readers.stores import ImageStore, log_ignored, open_store, take_inventory
from fivefold.errors import DataError
from fivefold.log import log
from fivefold.predictions import preview

NON_EVAL_TABLES = {"train", "submission"}
PROBE_ROWS = 1000
"""Rows of a sample submission to inspect for its number format."""


@dataclass(frozen=True)
class SampleSubmission:
    """A sample submission: the name of the id column, the other columns' names (one per class), and the ids [N] in order.

    `has_bom`: the file starts with a byte-order mark, as written by Excel. `row_number_column`: name of a first column
    of row numbers from 0, or empty. `written`: the classes as spelled in the file; empty: as in `classes`. `values`: the
    distinct cells of a single answer column; empty: unknown. `answer` and `positive`: the configured content of such a
    column (class, number, probability), and the class of a probability.
    """

    id_column: str
    classes: tuple[str, ...]
    ids: np.ndarray
    has_bom: bool = False
    row_number_column: str = ""
    written: tuple[str, ...] = ()
    line_ending: str = "\n"
    delimiter: str = ","
    decimal: str = "."
    values: tuple[str, ...] = ()
    answer: str = "auto"
    positive: str = ""

    @property
    def header(self) -> list[str]:
        """Return the cells of the header line."""
        first = [self.row_number_column] if self.row_number_column else []
        return [*first, self.id_column, *(self.written or self.classes)]


@dataclass(frozen=True)
class EvalImages:
    """The images to predict, in order: `ids` and `paths` [N] object arrays of strings."""

    id_column: str
    ids: np.ndarray
    paths: np.ndarray
    sample: SampleSubmission | None

    def __len__(self) -> int:
        return len(self.ids)

    def with_label_column(
        self, column: str, row_number_column: str = "", answer: str = "auto", positive: str = ""
    ) -> "EvalImages":
        """Return the same images with a submission that puts predicted classes in `column`; a sample submission takes precedence.

        `answer` and `positive` state what a single answer column holds if its values do not show it.
        """
        submission = self.sample
        if submission is None and column:
            submission = SampleSubmission(self.id_column, (column,), self.ids, row_number_column=row_number_column)
        return replace(self, sample=submission and replace(submission, answer=answer, positive=positive))


def read_eval(source: ImageStore | Path, id_column: str = "", path_column: str = "") -> EvalImages:
    """Find the images to predict: those of test.csv (or the only CSV with paths), else of test/, else all images.

    Look for the columns `id_column` and `path_column` first, and guess them if the table lacks them.
    Ids are the values of the id column, or without one the paths as written. Without a CSV, ids are file names, or
    paths, or either without suffix, whichever matches the sample submission. Files must exist.
    """
    store = open_store(source) if isinstance(source, Path) else source
    tables = [name for level in layouts.search_levels(store, EVAL_FOLDERS) for name in layouts.list_csvs(store, level)]
    submission = next((_read_sample(open_table(store, name)) for name in tables if is_sample_submission(name)), None)
    others = [name for name in tables if not (is_sample_submission(name) or is_ground_truth(name))]
    others = [name for name in others if stem(name) not in NON_EVAL_TABLES]
    named = [name for name in others if stem(name) == "test"]
    readable = [open_table(store, name) for name in named[:1] or others]
    usable = [table for table in readable if _find_column(table, path_column, PATH_NAMES)] or readable[: len(named)]
    if len(usable) > 1:
        names = preview([table.name for table in usable])
        raise DataError(f"several tables to predict in {store.root}: {names}; rename one to test.csv")
    if usable:
        return _eval_table(store, usable[0], id_column, path_column, submission)
    return _eval_folder(store, submission)


def check_rows(images: EvalImages) -> None:
    """Raise a DataError with the ids unless the sample submission has exactly one row for each image."""
    if images.sample:
        check_same_ids(images.sample.ids, "the sample submission", images.ids, "the test images")


def _read_sample(table: CsvFile) -> SampleSubmission:
    """Read a table as a sample submission: its first column holds the ids, and the output will use the same format."""
    id_column, *written = table.columns
    frame = table.read()
    check_unique(frame[id_column], table)
    cells = frame.iloc[:PROBE_ROWS, 1:].to_numpy(object).ravel()
    commas = any(re.fullmatch(r"\d*,\d+", cell.strip()) for cell in cells)
    return SampleSubmission(
        id_column,
        tuple(map(normalize_class_name, written)),
        frame[id_column].to_numpy(object),
        has_bom=table.has_bom,
        written=tuple(written),
        line_ending=table.line_end,
        delimiter=table.delimiter,
        decimal="," if commas else ".",
        values=tuple(frame[written[0]].unique()) if len(written) == 1 else (),
    )


def _find_column(table: CsvFile, name: str, known: Sequence[str]) -> str | None:
    """Return the column `name`, if the table has it (only the training table may), else the first of `known`."""
    return table.column("", [name, *known] if name else known)


def _eval_table(
    store: ImageStore, table: CsvFile, id_column: str, path_column: str, submission: SampleSubmission | None
) -> EvalImages:
    path = _find_column(table, path_column, PATH_NAMES) or layouts.guess_paths(table, store, TRAIN_FOLDERS)
    path = path or table.require_column("", PATH_NAMES, "data.path_column")
    row_id = _find_column(table, id_column, ID_NAMES) or path
    frame = table.read([row_id, path])
    check_unique(frame[row_id], table)
    paths = layouts.image_paths(frame[path], table, store, (*EVAL_FOLDERS, *layouts.IMAGE_FOLDERS), TRAIN_FOLDERS)
    if submission is None and table.columns == (row_id, table.column("", ANSWER_NAMES)) and row_id == path:
        submission = _read_sample(table)  # the table has only images and an answer column
    return EvalImages(row_id, frame[row_id].to_numpy(object), paths.to_numpy(object), submission)


def _eval_folder(store: ImageStore, submission: SampleSubmission | None) -> EvalImages:
    *_, level = layouts.search_levels(store, EVAL_FOLDERS)
    level += "/" if level else ""
    stock = take_inventory(store)
    log_ignored(stock.counts(), store.root)
    paths = [name for name in stock.images if name.startswith(level)]
    if not paths:
        raise DataError(f"{store.root} holds no test.csv and no images to predict")
    names = [path[len(level) :] for path in paths]
    known = set(submission.ids) if submission else set()
    stems = [[posixpath.splitext(name)[0] for name in form] for form in (names, paths)]
    ids = next((form for form in (stems[0], paths, stems[1]) if len(known) == len(form) and set(form) == known), names)
    log.info("data: %d images of %s/%s, sorted by name", len(paths), store.root, level)
    id_column = submission.id_column if submission else "ID"
    return EvalImages(id_column, np.array(ids, object), np.array(paths, object), submission)
