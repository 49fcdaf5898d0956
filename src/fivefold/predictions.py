"""The one table that crosses stages: log-probabilities of rows, by class name.

Columns: `id`, `fold` (-1 where no single fold speaks), `system`, `label` (where the truth is
known), and for each class `p/<class>`: a float32 log-probability, which keeps its precision where
a probability saturates. Columns are matched by class name, never by position.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fivefold.arrow import pa
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
    columns: dict[str, pa.Array] = {
        "id": pa.array(table.ids, pa.string()),
        "fold": pa.array(table.fold, pa.int16()),
        "system": pa.DictionaryArray.from_arrays(np.zeros(len(table), np.int32), [table.system]),
    }
    if table.labels is not None:
        columns["label"] = pa.array(table.labels, pa.string()).dictionary_encode()
    for code, name in enumerate(table.classes):
        columns[PREFIX + name] = pa.array(np.ascontiguousarray(table.log_probs[:, code], np.float32))
    pq.write_table(pa.table(columns), path, row_group_size=ROWS_A_GROUP, compression="zstd")


def read(path: Path) -> Predictions:
    """Reads a table, checked: ids unique, every value a log-probability, rows summing to 1.

    Raises MissingInputError, or a DataError that names the column or the row.
    """
    if not path.is_file():
        raise MissingInputError(f"no predictions at {path}")
    try:
        table = pq.ParquetFile(path).read()  # read_table imports pandas, which takes a second
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DataError(f"{path} is not a Parquet table: {error}") from error
    classes = tuple(name.removeprefix(PREFIX) for name in table.column_names if name.startswith(PREFIX))
    absent = [name for name in ("id", "fold", "system") if name not in table.column_names]
    if absent or not classes:
        raise DataError(f"{path} is not a predictions table: no column {', '.join(absent) or PREFIX + '<class>'}")
    if len(set(table.column_names)) < len(table.column_names):
        raise DataError(f"{path}: columns of the same name: {sample(_twice(table.column_names))}")
    log_probs = np.empty((table.num_rows, len(classes)), np.float32)
    for code, name in enumerate(classes):
        column = table.column(PREFIX + name)
        if not pa.types.is_floating(column.type):
            raise DataError(f"{path}: column {PREFIX + name} holds {column.type}, not log-probabilities")
        log_probs[:, code] = column.to_numpy()
    found = Predictions(
        ids=_strings(table, "id", path),
        fold=_folds(table, path),
        system=_system(table, path),
        classes=classes,
        log_probs=log_probs,
        labels=_strings(table, "label", path) if "label" in table.column_names else None,
    )
    check(found, str(path))
    return found


def check(table: Predictions, where: str) -> None:
    """Raises a DataError, naming `where` and the row, unless the table holds probabilities of unique ids."""
    if len(set(table.ids)) < len(table):
        raise DataError(f"{where}: ids stand twice: {sample(_twice(table.ids))}")
    for start in range(0, len(table), ROWS_A_GROUP):
        block = table.log_probs[start : start + ROWS_A_GROUP]
        with np.errstate(over="ignore"):
            sums = np.exp(block.astype(np.float64)).sum(axis=1)
        # Written so that NaN counts as bad.
        bad = np.flatnonzero(~(np.abs(sums - 1) <= TOLERANCE))
        if len(bad):
            _refuse_row(block[bad[0]], sums[bad[0]], f"{where}: the row of id {table.ids[start + bad[0]]!r}")


def _refuse_row(log_probs: np.ndarray, total: float, row: str) -> None:
    if np.isnan(log_probs).any():
        raise DataError(f"{row} holds NaN")
    if (log_probs > TOLERANCE).any():
        raise DataError(f"{row} holds {log_probs.max():.4g}, above 0: natural logarithms of probabilities are needed")
    raise DataError(f"{row}: its probabilities sum to {total:.4f}, not 1")


def in_class_order(log_probs: np.ndarray, classes: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """The columns [N, C] of `classes` in the order of `wanted`; a DataError names classes of one side alone."""
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
    every = [name for table in tables for name in table.ids]
    position: dict[str, int] = {}
    rows = np.array([position.setdefault(name, len(position)) for name in every], dtype=np.int64)
    total = np.zeros((len(position), len(first.classes)))
    np.add.at(total, rows, np.exp(np.concatenate([table.log_probs for table in aligned]).astype(np.float64)))
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


def _strings(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column as texts; a label that is null is an unknown one, an id must not be."""
    try:
        found = table.column(name).cast(pa.string())
    except pa.ArrowException as error:
        raise DataError(f"{path}: column {name} holds {table.column(name).type}, not text") from error
    if found.null_count and name == "id":
        raise DataError(f"{path}: {found.null_count} rows have no id")
    return np.array(["" if text is None else text for text in found.to_pylist()], dtype=object)


def _folds(table: pa.Table, path: Path) -> np.ndarray:
    column = table.column("fold")
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{path}: column fold holds {column.type}, {column.null_count} of them null, not fold numbers")
    return column.to_numpy().astype(np.int16)


def _system(table: pa.Table, path: Path) -> str:
    """The one system of all rows; several in a table would be averaged as if they were one."""
    names = sorted({str(name) for chunk in table.column("system").chunks for name in chunk.unique().to_pylist()})
    if len(names) > 1:
        raise DataError(f"{path}: rows of several systems: {sample(names)}; give one table for each")
    return names[0] if names else ""


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
