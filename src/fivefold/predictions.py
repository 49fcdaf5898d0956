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
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fivefold.contract.files import atomic
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


def write(path: Path, table: Predictions) -> Path:
    """Writes the table as Parquet, whole or not at all; returns its path."""
    columns: dict[str, pa.Array] = {
        "id": pa.array(table.ids, pa.string()),
        "fold": pa.array(table.fold, pa.int16()),
        "system": pa.DictionaryArray.from_arrays(np.zeros(len(table), np.int32), [table.system]),
    }
    if table.labels is not None:
        columns["label"] = pa.array(table.labels, pa.string()).dictionary_encode()
    for name, column in zip(table.classes, table.log_probs.T, strict=True):
        columns[PREFIX + name] = pa.array(np.ascontiguousarray(column, np.float32))
    with atomic(path) as temporary:
        # Dictionaries of log-probabilities would take ten times as long and half as much room again.
        options = {"compression": "lz4", "use_dictionary": ["system", "label"]}
        pq.write_table(pa.table(columns), temporary, row_group_size=ROWS_A_GROUP, **options)
    return path


def read(path: Path) -> Predictions:
    """Reads a table, checked: ids unique, every value a log-probability, rows summing to 1.

    Raises MissingInputError, or a DataError that names the column or the row.
    """
    table = _read_columns(path)
    names = table.column_names
    classes = tuple(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    absent = [name for name in ("id", "fold", "system") if name not in names]
    if absent or not classes:
        raise DataError(f"{path} is not a predictions table: no column {', '.join(absent) or PREFIX + '<class>'}")
    if twice := _repeated(names):
        raise DataError(f"{path}: columns of the same name: {sample(twice)}")
    for name in classes:
        kind = table.schema.field(PREFIX + name).type
        if not pa.types.is_floating(kind):
            raise DataError(f"{path}: column {PREFIX + name} holds {kind}, not log-probabilities")
    predictions = Predictions(
        ids=_texts(table, "id", path),
        fold=_folds(table, path),
        system=_system(table, path),
        classes=classes,
        log_probs=np.stack([table[PREFIX + name].to_numpy() for name in classes], axis=1).astype(
            np.float32, copy=False
        ),
        labels=_texts(table, "label", path) if "label" in names else None,
    )
    check(predictions, str(path))
    return predictions


def read_system(path: Path) -> str:
    """Reads the name of the system that a table is of, and nothing else of it; raises as `read`."""
    return _system(_read_columns(path, ["system"]), path)


def check(table: Predictions, where: str) -> None:
    """Raises a DataError, naming `where` and the first row, unless the table holds probabilities of unique ids."""
    if twice := _repeated(table.ids):
        raise DataError(f"{where}: ids stand twice: {sample(twice)}")
    with np.errstate(over="ignore"):
        sums = np.exp(table.log_probs).sum(axis=1, dtype=np.float64)
    bad = np.flatnonzero(~(np.abs(sums - 1) <= TOLERANCE))  # so that NaN counts as bad
    if not len(bad):
        return
    values, row = table.log_probs[bad[0]], f"{where}: the row of id {table.ids[bad[0]]!r}"
    if np.isnan(values).any():
        raise DataError(f"{row} holds NaN")
    if (values > TOLERANCE).any():
        raise DataError(f"{row} holds {values.max():.4g}, above 0: natural logarithms of probabilities are needed")
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
    rows, ids = pd.factorize(np.concatenate([table.ids for table in tables]))
    log_probs = np.concatenate([table.with_classes(first.classes).log_probs for table in tables])
    mean = pd.DataFrame(np.exp(log_probs, dtype=np.float64)).groupby(rows).mean().to_numpy()
    folds = pd.Series(np.concatenate([table.fold for table in tables])).groupby(rows).agg(["min", "max"])
    labels = None
    if all(table.labels is not None for table in tables):
        _, first_rows = np.unique(rows, return_index=True)
        labels = np.concatenate([table.labels for table in tables])[first_rows]
    return Predictions(
        ids=np.array(ids, dtype=object),
        fold=folds["min"].where(folds["min"] == folds["max"], -1).to_numpy(np.int16),
        system=first.system,
        classes=first.classes,
        log_probs=np.log(np.maximum(mean, np.finfo(np.float64).tiny)).astype(np.float32),
        labels=labels,
    )


def sample(names: Sequence[object], most: int = 5) -> str:
    """The first few names, and how many more."""
    shown = ", ".join(repr(str(name)) for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_columns(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads all columns, or some, of a Parquet file; those that the file lacks are left out."""
    if not path.is_file():
        raise MissingInputError(f"no predictions at {path}")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system, as a full disk
            raise
        raise DataError(f"{path} is not a Parquet table: {error}") from error


def _texts(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column as texts [N]; a label that is null is an unknown one, an id must not be."""
    try:
        texts = table[name].cast(pa.string())
    except pa.ArrowException as error:
        raise DataError(f"{path}: column {name} holds {table[name].type}, not text") from error
    if texts.null_count and name == "id":
        raise DataError(f"{path}: {texts.null_count} rows have no id")
    return texts.fill_null("").to_numpy()


def _folds(table: pa.Table, path: Path) -> np.ndarray:
    column = table["fold"]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{path}: column fold holds {column.type}, {column.null_count} of them null, not fold numbers")
    return column.to_numpy().astype(np.int16)


def _system(table: pa.Table, path: Path) -> str:
    """The one system of all rows; several in a table would be averaged as if they were one."""
    if "system" not in table.column_names:
        raise DataError(f"{path} is not a predictions table: no column system")
    names = sorted(str(name) for name in table["system"].unique().to_pylist())
    if len(names) > 1:
        raise DataError(f"{path}: rows of several systems: {sample(names)}; give one table for each")
    return names[0] if names else ""


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
