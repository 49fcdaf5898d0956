"""The one table that crosses stages: log-probabilities of rows, by class name.

Columns: `id`, `fold` (-1 where no single fold speaks), `system`, `label` (where the truth is
known), and for each class `p/<class>`: a float32 log-probability, which keeps its precision where
a probability saturates. Columns are matched by class name, never by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
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
        position = {name: row for row, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in position]
        if missing:
            raise DataError(f"predictions of {self.system or 'this system'} lack {len(missing)} ids: {sample(missing)}")
        return self.take(np.array([position[name] for name in ids], dtype=np.int64))

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
        "system": pa.array([table.system] * len(table)).dictionary_encode(),
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
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a Parquet table: {error}") from error
    classes = tuple(name.removeprefix(PREFIX) for name in table.column_names if name.startswith(PREFIX))
    absent = [name for name in ("id", "fold", "system") if name not in table.column_names]
    if absent or not classes:
        raise DataError(f"{path} is not a predictions table: no column {', '.join(absent) or PREFIX + '<class>'}")
    log_probs = np.empty((table.num_rows, len(classes)), np.float32)
    for code, name in enumerate(classes):
        column = table.column(PREFIX + name)
        if not pa.types.is_floating(column.type):
            raise DataError(f"{path}: column {PREFIX + name} holds {column.type}, not log-probabilities")
        log_probs[:, code] = column.to_numpy()
    found = Predictions(
        ids=_strings(table, "id"),
        fold=table.column("fold").to_numpy().astype(np.int16),
        system=str(table.column("system")[0]) if table.num_rows else "",
        classes=classes,
        log_probs=log_probs,
        labels=_strings(table, "label") if "label" in table.column_names else None,
    )
    check(found, str(path))
    return found


def check(table: Predictions, where: str) -> None:
    """Raises a DataError, naming `where` and the row, unless the table holds probabilities of unique ids."""
    ids, counts = np.unique(table.ids.astype(str), return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{where}: ids stand twice: {sample(ids[counts > 1])}")
    if np.isnan(table.log_probs).any():
        row = table.ids[np.isnan(table.log_probs).any(axis=1)][0]
        raise DataError(f"{where}: NaN in the row of id {row!r}")
    if (table.log_probs > TOLERANCE).any():
        row = table.ids[(table.log_probs > TOLERANCE).any(axis=1)][0]
        raise DataError(f"{where}: a log-probability above 0 in the row of id {row!r}")
    sums = np.exp(table.log_probs.astype(np.float64)).sum(axis=1)
    if (np.abs(sums - 1) > TOLERANCE).any():
        worst = int(np.argmax(np.abs(sums - 1)))
        raise DataError(f"{where}: probabilities of id {table.ids[worst]!r} sum to {sums[worst]:.4f}, not 1")


def sample(names: Sequence[object], most: int = 5) -> str:
    """The first few names, and how many more."""
    shown = ", ".join(repr(str(name)) for name in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _strings(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table.column(name).cast(pa.string()).to_pylist(), dtype=object)
