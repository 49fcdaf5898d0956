"""The one table that crosses stages: log-probabilities of rows, by class name.

Columns: `id`, `fold` (-1 where no single fold speaks), `system`, `label` (where the truth is
known), and for each class `p/<class>`: a float32 log-probability, which keeps its precision where
a probability saturates. Columns are matched by class name, never by position.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fivefold.errors import DataError, MissingInputError

PREFIX = "p/"
ROWS_A_GROUP = 65_536
TOLERANCE = 1e-2
"""How far a row's probabilities may be from summing to 1 before they are no probabilities."""


@dataclass(frozen=True)
class Predictions:
    """N rows by C classes.

    `ids` [N] str, `fold` [N] int, `log_probs` [N, C] float32 natural logarithms, rows sum to 1 as
    probabilities; `labels` [N] str, empty where the truth is unknown, or None.
    """

    ids: np.ndarray
    fold: np.ndarray
    system: str
    classes: tuple[str, ...]
    log_probs: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "Predictions":
        """The given rows, by index or mask."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, ids=self.ids[rows], fold=self.fold[rows], log_probs=self.log_probs[rows], labels=labels)

    def in_order(self, ids: Sequence[str]) -> "Predictions":
        """The rows of `ids` in that order; a DataError names ids that are not there."""
        if len(ids) == len(self) and np.array_equal(self.ids, ids):
            return self
        position = {name: row for row, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in position]
        if missing:
            raise DataError(f"predictions of {self.system or 'this system'} lack {len(missing)} ids: {sample(missing)}")
        return self.take(np.array([position[name] for name in ids], dtype=np.int64))

    def with_classes(self, classes: Sequence[str]) -> "Predictions":
        """The same rows with their columns in the order of `classes`, matched by name."""
        return replace(self, classes=tuple(classes), log_probs=in_class_order(self.log_probs, self.classes, classes))

    def codes(self) -> np.ndarray:
        """Labels as class indices [N] int64; a DataError names a label that is no class."""
        if self.labels is None:
            raise DataError("these predictions carry no labels")
        index = {name: code for code, name in enumerate(self.classes)}
        unknown = sorted({str(label) for label in self.labels if label not in index})
        if unknown:
            raise DataError(f"labels that are no class of the model: {sample(unknown)}")
        return np.array([index[label] for label in self.labels], dtype=np.int64)


def write(path: Path, table: Predictions) -> None:
    """Writes the table as Parquet to `path` (give a temporary name; see `contract.files.atomic`)."""
    with TableWriter(path, table.system, table.classes, table.labels is not None) as writer:
        for start in range(0, max(len(table), 1), ROWS_A_GROUP):
            rows = slice(start, start + ROWS_A_GROUP)
            labels = None if table.labels is None else table.labels[rows]
            writer.write(table.ids[rows], table.fold[rows], table.log_probs[rows].T, labels)


class TableWriter:
    """A table of predictions that is written a block of rows at a time; each block is a row group of the file."""

    def __init__(self, path: Path | IO[bytes], system: str, classes: Sequence[str], labelled: bool) -> None:
        codes = pa.dictionary(pa.int32(), pa.string())
        fields = [("id", pa.string()), ("fold", pa.int16()), ("system", codes), *([("label", codes)] * labelled)]
        self.schema = pa.schema(fields + [(PREFIX + name, pa.float32()) for name in classes])
        self.system = system
        # Dictionaries of numbers that are hardly ever the same take ten times as long, and half as much room again.
        self.writer = pq.ParquetWriter(path, self.schema, compression="lz4", use_dictionary=["system", "label"])

    def write(
        self, ids: Any, fold: np.ndarray, log_probs: Sequence[np.ndarray], labels: np.ndarray | None = None
    ) -> None:
        """A block of n rows; `log_probs` [C][n], class by class. `ids` are texts or an Arrow array of them."""
        columns: list[pa.Array] = [
            ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string()),
            pa.array(fold, pa.int16()),
            pa.DictionaryArray.from_arrays(np.zeros(len(ids), np.int32), [self.system]),
        ]
        if labels is not None:
            columns.append(pa.array(labels, pa.string()).dictionary_encode())
        columns += [pa.array(np.ascontiguousarray(column, np.float32)) for column in log_probs]
        self.writer.write_table(pa.table(columns, schema=self.schema), row_group_size=ROWS_A_GROUP)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()


@dataclass(frozen=True)
class TableFile:
    """A table in a file, of which a block of rows is in memory at a time: `rows` [N] of a `system`, by `classes` [C]."""

    path: Path
    system: str
    classes: tuple[str, ...]
    rows: int
    labelled: bool

    def ids(self, checked: bool = True) -> pa.Array:
        """The ids [N], texts; a DataError where one is absent or, if that is to be `checked`, stands twice."""
        blocks = [_texts(block, "id", self.path) for block in self.blocks(["id"])]
        ids = pa.concat_arrays(blocks) if blocks else pa.array([], pa.string())
        if checked and len(pc.unique(ids)) < len(ids):
            raise DataError(f"{self.path}: ids stand twice: {sample(_twice(ids.to_pylist()))}")
        return ids

    def blocks(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order with all columns or some, at most twice ROWS_A_GROUP at a time."""
        with _refused(self.path), pq.ParquetFile(self.path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                if file.metadata.row_group(group).num_rows <= 2 * ROWS_A_GROUP:
                    yield file.read_row_group(group, columns)
                else:  # of others' files, which may be one group
                    for batch in file.iter_batches(ROWS_A_GROUP, [group], columns):
                        yield pa.Table.from_batches([batch])


def open_table(path: Path) -> TableFile:
    """A table that is to be read, its columns and its system checked, not yet its rows.

    Raises MissingInputError, or a DataError that names the column.
    """
    if not path.is_file():
        raise MissingInputError(f"no predictions at {path}")
    with _refused(path), pq.ParquetFile(path, pre_buffer=False) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    names = schema.names
    classes = tuple(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    absent = [name for name in ("id", "fold", "system") if name not in names]
    if absent or not classes:
        raise DataError(f"{path} is not a predictions table: no column {', '.join(absent) or PREFIX + '<class>'}")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: columns of the same name: {sample(_twice(names))}")
    for name in classes:
        kind = schema.field(PREFIX + name).type
        if not pa.types.is_floating(kind):
            raise DataError(f"{path}: column {PREFIX + name} holds {kind}, not log-probabilities")
    found = TableFile(path, "", classes, rows, "label" in names)
    return replace(found, system=_system(found))


def read(path: Path) -> Predictions:
    """Reads a table, checked: ids unique, every value a log-probability, rows summing to 1.

    Raises MissingInputError, or a DataError that names the column or the row.
    """
    file = open_table(path)
    log_probs = np.empty((file.rows, len(file.classes)), np.float32)
    ids, fold, labels = (np.empty(file.rows, kind) for kind in (object, np.int16, object))
    start = 0
    for block in file.blocks():
        rows = slice(start, start := start + block.num_rows)
        for code, name in enumerate(file.classes):
            log_probs[rows, code] = block.column(PREFIX + name).to_numpy()
        ids[rows], fold[rows] = _texts(block, "id", path).to_pylist(), _folds(block, path)
        if file.labelled:
            labels[rows] = ["" if text is None else text for text in _texts(block, "label", path).to_pylist()]
    found = Predictions(ids, fold, file.system, file.classes, log_probs, labels if file.labelled else None)
    check(found, str(path))
    return found


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What Arrow says of a broken file as a DataError; what the system says, as of a full disk, as it is."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DataError(f"{path} is not a Parquet table: {error}") from error


def check(table: Predictions, where: str) -> None:
    """Raises a DataError, naming `where` and the row, unless the table holds probabilities of unique ids."""
    if len(set(table.ids)) < len(table):
        raise DataError(f"{where}: ids stand twice: {sample(_twice(table.ids))}")
    for start in range(0, len(table), ROWS_A_GROUP):
        rows = slice(start, start + ROWS_A_GROUP)
        check_block(table.log_probs[rows], table.ids[rows], where)


def check_block(log_probs: np.ndarray, ids: Sequence[str], where: str) -> None:
    """Raises a DataError, naming `where` and the id, for the first row of log_probs [n, C] that is no probabilities."""
    with np.errstate(over="ignore"):
        sums = np.exp(log_probs.astype(np.float64)).sum(axis=1)
    bad = np.flatnonzero(~(np.abs(sums - 1) <= TOLERANCE))  # so that NaN counts as bad
    if not len(bad):
        return
    found, row = log_probs[bad[0]], f"{where}: the row of id {ids[bad[0]]!r}"
    if np.isnan(found).any():
        raise DataError(f"{row} holds NaN")
    if (found > TOLERANCE).any():
        raise DataError(f"{row} holds {found.max():.4g}, above 0: natural logarithms of probabilities are needed")
    raise DataError(f"{row}: its probabilities sum to {sums[bad[0]]:.4f}, not 1")


def in_class_order(log_probs: np.ndarray, classes: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """The columns [N, C] of `classes` in the order of `wanted`; a DataError names classes of one side alone."""
    if tuple(classes) == tuple(wanted):
        return log_probs
    if set(classes) != set(wanted):
        raise DataError(f"classes differ: {sample(sorted(set(classes) ^ set(wanted)))} on one side alone")
    position = {name: code for code, name in enumerate(classes)}
    return log_probs[:, [position[name] for name in wanted]]


def mean_by_id(tables: Sequence[Predictions]) -> Predictions:
    """One table with each id once, in the order of first sight: the mean probability of its rows.

    So the folds of a system become one table of out-of-fold rows, and members' holdout tables one
    ensemble's. Columns are matched by name; the fold stays where all rows of an id agree on it.
    """
    first = tables[0]
    aligned = [table.with_classes(first.classes) for table in tables]
    position: dict[str, int] = {}
    own = [np.array([position.setdefault(name, len(position)) for name in table.ids], np.int64) for table in tables]
    rows, total = np.concatenate(own), np.zeros((len(position), len(first.classes)))
    for at, table in zip(own, aligned, strict=True):
        for start in range(0, len(at), ROWS_A_GROUP):
            here = at[start : start + ROWS_A_GROUP]
            np.add.at(total, here, np.exp(table.log_probs[start : start + ROWS_A_GROUP].astype(np.float64)))
    count = np.bincount(rows, minlength=len(position))
    fold = np.empty(len(position), np.int16)
    folds = np.concatenate([table.fold for table in tables])
    fold[rows[::-1]] = folds[::-1]
    fold[rows[fold[rows] != folds]] = -1
    labels = None
    if all(table.labels is not None for table in tables):
        labels = np.empty(len(position), dtype=object)
        labels[rows[::-1]] = np.concatenate([table.labels for table in tables])[::-1]
    log_probs = np.log(np.maximum(total / count[:, None], np.finfo(np.float64).tiny)).astype(np.float32)
    return Predictions(np.array(list(position), dtype=object), fold, first.system, first.classes, log_probs, labels)


def sample(names: Sequence[object], most: int = 5) -> str:
    """The first few names, and how many more."""
    shown = ", ".join(repr(str(name)) for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _texts(table: pa.Table, name: str, path: Path) -> pa.Array:
    """A column as texts; a label that is null is an unknown one, an id must not be."""
    try:
        found = table.column(name).cast(pa.string()).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{path}: column {name} holds {table.column(name).type}, not text") from error
    if found.null_count and name == "id":
        raise DataError(f"{path}: {found.null_count} rows have no id")
    return found


def _folds(table: pa.Table, path: Path) -> np.ndarray:
    column = table.column("fold")
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{path}: column fold holds {column.type}, {column.null_count} of them null, not fold numbers")
    return column.to_numpy().astype(np.int16)


def _system(file: TableFile) -> str:
    """The one system of all rows; several in a table would be averaged as if they were one."""
    blocks = file.blocks(["system"])
    names = sorted({str(n) for block in blocks for n in block.column("system").unique().to_pylist()})
    if len(names) > 1:
        raise DataError(f"{file.path}: rows of several systems: {sample(names)}; give one table for each")
    return names[0] if names else ""


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
