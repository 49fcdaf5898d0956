"""The images to predict: of a table or a folder, and the submission that a sample asks for."""

import logging
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fivefold.contract.spelling import is_sample, is_truth, plain_name
from fivefold.csv_tables import ANSWER_NAMES, ID_NAMES, PATH_NAMES, CsvFile, check_same_ids, check_unique
from fivefold.data import layouts
from fivefold.data.inventory import log_left_out, take_inventory
from fivefold.data.store import ImageStore, open_store
from fivefold.errors import DataError
from fivefold.predictions import sample

log = logging.getLogger("fivefold")

NOT_EVAL = {"train", "submission"}
TRIED_ROWS = 1000
"""Of a sample, that say how it writes numbers."""


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
    delimiter: str = ","
    decimal: str = "."
    """What parts cells, and a number from its fraction."""
    values: tuple[str, ...] = ()
    """The different cells of a single column of answers; empty: no file says what they look like."""
    answer: str = "auto"
    positive: str = ""
    """What such a column holds (class, number, probability) and the class that a probability is of, by the settings."""

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

    def answered_in(self, column: str, numbered: str = "", answer: str = "auto", positive: str = "") -> "EvalTable":
        """The same images, whose submission has predicted classes in `column`; what a sample asks for goes first.

        `answer` and `positive` say what a single column holds, where its values do not.
        """
        found = self.sample
        if found is None and column:
            found = Submission(self.id_column, (column,), self.ids, numbered=numbered)
        return replace(self, sample=found and replace(found, answer=answer, positive=positive))


def read_eval(source: ImageStore | Path, id_column: str = "", path_column: str = "") -> EvalTable:
    """The images to predict: of test.csv (or the one CSV with paths), else of test/, else all that there are.

    `id_column` and `path_column` are looked for first, and guessed where the table has no such column.
    Ids are the id column's values, or the paths as written where there is none. Without a CSV they
    are file names; paths, or either without the suffix, where the sample submission has them so. Files must exist.
    """
    store = open_store(source) if isinstance(source, Path) else source
    tables = [name for level in layouts.levels(store, layouts.EVAL_FOLDERS) for name in layouts.csvs(store, level)]
    wanted = next((_sample(layouts.open_table(store, name)) for name in tables if is_sample(name)), None)
    given = [name for name in tables if not (layouts.stem(name) in NOT_EVAL or is_sample(name) or is_truth(name))]
    named = [name for name in given if layouts.stem(name) == "test"]
    readable = [layouts.open_table(store, name) for name in named[:1] or given]
    usable = [found for found in readable if _if_there(found, path_column, PATH_NAMES)] or readable[: len(named)]
    if len(usable) > 1:
        raise DataError(
            f"several tables to predict in {store.root}: {sample([t.name for t in usable])}; name one test.csv"
        )
    return _eval_table(store, usable[0], id_column, path_column, wanted) if usable else _eval_folder(store, wanted)


def check_rows(images: EvalTable) -> None:
    """Raises a DataError, with the ids, unless the sample submission has a row for each of the images and no other."""
    if images.sample:
        check_same_ids(images.sample.ids, "the sample submission", images.ids, "the test images")


def _sample(table: CsvFile) -> Submission:
    """A table as a sample submission: its first column are the ids, and it is written as its file is."""
    id_column, *written = table.columns
    ids, values = (table.read([name])[name] for name in (id_column, table.columns[-1]))
    check_unique(ids, table)
    classes, spelling = tuple(map(plain_name, written)), {"marked": table.has_mark, "end": table.line_end}
    commas = any(re.fullmatch(r"\d*,\d+", cell.strip()) for cells in table.first_rows(TRIED_ROWS) for cell in cells[1:])
    answers = tuple(values.unique()) if len(written) == 1 else ()
    spelling |= {"delimiter": table.delimiter, "decimal": "," if commas else ".", "values": answers}
    return Submission(id_column, classes, ids.to_numpy(object), written=tuple(written), **spelling)


def _if_there(table: CsvFile, given: str, known: Sequence[str]) -> str | None:
    """The column `given`, which may be the training table's alone; otherwise the first of `known`."""
    return (table.column(given, known) if given else None) or table.column("", known)


def _eval_table(
    store: ImageStore, table: CsvFile, id_column: str, path_column: str, wanted: Submission | None
) -> EvalTable:
    path = _if_there(table, path_column, PATH_NAMES) or layouts.guess_paths(table, store, layouts.TRAIN_FOLDERS)
    path = path or table.must_have("", PATH_NAMES, "data.path_column")
    row_id = _if_there(table, id_column, ID_NAMES) or path
    frame = table.read([row_id, path])
    check_unique(frame[row_id], table)
    where = layouts.bases(store, table.name, (*layouts.EVAL_FOLDERS, *layouts.IMAGE_FOLDERS))
    paths = layouts.image_paths(frame[path], table, store, where, True, layouts.TRAIN_FOLDERS)
    if wanted is None and table.columns == (row_id, table.column("", ANSWER_NAMES)) and row_id == path:
        wanted = _sample(table)  # the table has nothing but images and a column for the answer
    return EvalTable(row_id, frame[row_id].to_numpy(object), paths.to_numpy(object), wanted)


def _eval_folder(store: ImageStore, wanted: Submission | None) -> EvalTable:
    *_, level = layouts.levels(store, layouts.EVAL_FOLDERS)
    level += "/" if level else ""
    stock = take_inventory(store)
    log_left_out(stock.counts(), store.root)
    paths = [name for name in stock.images if name.startswith(level)]
    if not paths:
        raise DataError(f"{store.root} holds no test.csv and no images to predict")
    names = [path[len(level) :] for path in paths]
    asked = set(wanted.ids) if wanted else set()
    bare = [[posixpath.splitext(name)[0] for name in each] for each in (names, paths)]
    ids = next((each for each in (bare[0], paths, bare[1]) if len(asked) == len(each) and set(each) == asked), names)
    log.info("data: %d images of %s/%s, in the order of their names", len(paths), store.root, level)
    return EvalTable(wanted.id_column if wanted else "ID", np.array(ids, object), np.array(paths, object), wanted)
