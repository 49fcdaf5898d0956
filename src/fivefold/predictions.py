"""The prediction table that stages exchange: log-probabilities of rows, by class name.

Columns: `id`, `fold` (-1 if the prediction is not from a single fold), `system`, `label` (if the true class is known), and
for each class `p/<class>`: a float32 log-probability. Columns are matched by class name, never by position.
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
ROW_GROUP_SIZE = 65_536
TOLERANCE = 1e-2
"""Largest accepted difference between 1 and the sum of a row's probabilities."""


@dataclass(frozen=True)
class Predictions:
    """N rows by C classes.

    `ids` [N] str, `fold` [N] int, `log_probs` [N, C] float32 natural logarithms of probabilities that sum to 1 per row;
    `labels` [N] str, "" if the true class is unknown, or None if there are no labels.
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
        """Return the rows selected by index or mask."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, ids=self.ids[rows], fold=self.fold[rows], log_probs=self.log_probs[rows], labels=labels)

    def reindex(self, ids: Sequence[str]) -> "Predictions":
        """Return the rows of `ids` in that order; raise a DataError that lists missing ids."""
        if len(ids) == len(self) and np.array_equal(self.ids, ids):
            return self
        position = {name: row for row, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in position]
        if missing:
            raise DataError(
                f"predictions of {self.system or 'this system'} lack {len(missing)} ids: {preview(missing)}"
            )
        return self.take(np.array([position[name] for name in ids], dtype=np.int64))

    def with_classes(self, classes: Sequence[str]) -> "Predictions":
        """Return the same rows with columns in the order of `classes`, matched by name."""
        return replace(self, classes=tuple(classes), log_probs=reorder_classes(self.log_probs, self.classes, classes))

    def codes(self) -> np.ndarray:
        """Return the labels as class indices [N] int64; raise a DataError that lists labels that are not classes."""
        if self.labels is None:
            raise DataError("these predictions have no labels")
        codes = pd.Index(self.classes, dtype=object).get_indexer(self.labels).astype(np.int64)
        if unknown := sorted({str(label) for label in self.labels[codes < 0]}):
            raise DataError(f"labels that are not classes of the model: {preview(unknown)}")
        return codes


def write(path: Path, table: Predictions) -> Path:
    """Write the table as Parquet, atomically; return its path."""
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
        # Dictionary encoding of log-probabilities takes ten times as long and 50 % more space.
        options = {"compression": "lz4", "use_dictionary": ["system", "label"]}
        pq.write_table(pa.table(columns), temporary, row_group_size=ROW_GROUP_SIZE, **options)
    return path


def read(path: Path) -> Predictions:
    """Read a table and check it: unique ids, valid log-probabilities, rows that sum to 1.

    Raise MissingInputError, or a DataError that names the column or the row.
    """
    table = _read_columns(path)
    names = table.column_names
    classes = tuple(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    absent = [name for name in ("id", "fold", "system") if name not in names]
    if absent or not classes:
        raise DataError(f"{path} is not a predictions table: no column {', '.join(absent) or PREFIX + '<class>'}")
    if duplicates := _duplicates(names):
        raise DataError(f"{path}: duplicate columns: {preview(duplicates)}")
    for name in classes:
        kind = table.schema.field(PREFIX + name).type
        if not pa.types.is_floating(kind):
            raise DataError(f"{path}: column {PREFIX + name} holds {kind}, not log-probabilities")
    ids, fold = _text_column(table, "id", path), table["fold"]
    if duplicates := _duplicates(ids):
        raise DataError(f"{path}: duplicate ids: {preview(duplicates)}")
    if not pa.types.is_integer(fold.type) or fold.null_count:
        raise DataError(f"{path}: column fold holds {fold.type}, {fold.null_count} of them null, not fold numbers")
    log_probs = np.stack([table[PREFIX + name] for name in classes], axis=1).astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        sums = np.exp(log_probs).sum(axis=1, dtype=np.float64)
    bad = np.flatnonzero(~(np.abs(sums - 1) <= TOLERANCE))  # written so that NaN counts as bad
    if len(bad):
        raise DataError(
            f"{path}: the row of id {ids[bad[0]]!r} needs natural logarithms of probabilities that sum to 1; "
            f"they sum to {sums[bad[0]]:.4g}, and the largest logarithm is {log_probs[bad[0]].max():.4g}"
        )
    labels = _text_column(table, "label", path) if "label" in names else None
    return Predictions(ids, fold.to_numpy().astype(np.int16), _system_name(table, path), classes, log_probs, labels)


def read_system(path: Path) -> str:
    """Read only the system name of a table; raise as `read` does."""
    return _system_name(_read_columns(path, ["system"]), path)


def reorder_classes(log_probs: np.ndarray, classes: Sequence[str], target: Sequence[str]) -> np.ndarray:
    """Return the columns [N, C] of `classes` in the order of `target`; raise a DataError that lists classes of one side only."""
    if tuple(classes) == tuple(target):
        return log_probs
    if set(classes) != set(target):
        raise DataError(f"classes differ: {preview(sorted(set(classes) ^ set(target)))} on one side only")
    position = {name: code for code, name in enumerate(classes)}
    return log_probs[:, [position[name] for name in target]]


def mean_by_id(tables: Sequence[Predictions]) -> Predictions:
    """Return one table with each id once, in order of first occurrence: the mean probability of its rows.

    Columns are matched by name; the fold is kept if all rows of an id have the same one.
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


def preview(names: Sequence[object], limit: int = 5) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(repr(str(name)) for name in list(names)[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read_columns(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all columns, or those in `columns`, of a Parquet file; ignore columns that the file lacks."""
    if not path.is_file():
        raise MissingInputError(f"no predictions at {path}")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the system, such as a full disk
            raise
        raise DataError(f"{path} is not a Parquet table: {error}") from error


def _text_column(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return a column as texts [N]; a null label means unknown, a null id is an error."""
    try:
        texts = table[name].cast(pa.string())
    except pa.ArrowException as error:
        raise DataError(f"{path}: column {name} holds {table[name].type}, not text") from error
    if texts.null_count and name == "id":
        raise DataError(f"{path}: {texts.null_count} rows have no id")
    return texts.fill_null("").to_numpy()


def _system_name(table: pa.Table, path: Path) -> str:
    """Return the system of all rows; raise a DataError for several, which would be averaged as if they were one."""
    if "system" not in table.column_names:
        raise DataError(f"{path} is not a predictions table: no column system")
    names = sorted(str(name) for name in table["system"].unique().to_pylist())
    if len(names) > 1:
        raise DataError(f"{path}: rows of several systems: {preview(names)}; pass one table per system")
    return names[0] if names else ""


def _duplicates(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
