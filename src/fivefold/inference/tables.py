"""Prediction tables side by side, a block of rows at a time: as many rows as there are, in the memory of a few. No torch."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fivefold import predictions
from fivefold.contract.files import atomic, disk_is_full, reserve
from fivefold.errors import DataError, RetryableError
from fivefold.inference.blends import TINY
from fivefold.machine import count_cores
from fivefold.predictions import PREFIX, ROWS_A_GROUP, Predictions, TableFile, check_block, sample
from fivefold.progress import MIB

ROWS_AT_ONCE = 16_384
"""Rows that a thread mixes at a time: their sums stay in the processor's cache."""
FAINT = np.float32(1e-30)
"""Below it float32 loses digits, and from 1e-45 on there are none."""
LEAST = float(np.log(TINY))
"""The logarithm that stands for a probability of 0, as in `blends`."""


@dataclass(frozen=True)
class Block:
    """Rows `start` on of joined tables: their `ids` [n], and `log_probs` [C, n], class by class, float32."""

    start: int
    ids: pa.Array
    log_probs: np.ndarray


@dataclass(frozen=True)
class Reordered:
    """A table whose rows stand in another order: its float32 [N, C] in the wanted one, in a file of a scratch folder."""

    table: TableFile
    file: IO[bytes]

    def blocks(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The named columns, as `TableFile.blocks` gives them."""
        width = len(self.table.classes)
        places = [self.table.classes.index(name.removeprefix(PREFIX)) for name in columns]
        for start in range(0, self.table.rows, ROWS_A_GROUP):
            rows = min(ROWS_A_GROUP, self.table.rows - start)
            values = np.frombuffer(os.pread(self.file.fileno(), rows * width * 4, start * width * 4), np.float32)
            values = values.reshape(rows, width)
            yield pa.table({PREFIX + self.table.classes[at]: np.ascontiguousarray(values[:, at]) for at in places})


def save_predictions(path: Path, table: Predictions) -> Path:
    """Writes a predictions table, whole or not at all; its path."""
    with atomic(path) as temporary:
        predictions.write(temporary, table)
    return path


def joined(tables: Sequence[TableFile], weights: np.ndarray, ids: pa.Array, scratch: Path) -> Iterator[Block]:
    """log Σ w p of all tables for the rows of `ids` [N], by the first one's classes, a block at a time; rows sum to 1.

    Rows in the order of `ids` are read once, as they are needed; a table of another order goes to a file in
    `scratch` first. Raises DataError, naming the table, for other classes or ids, or a row that is no probabilities.
    """
    check_classes(tables)
    columns = [PREFIX + name for name in tables[0].classes]
    with ThreadPoolExecutor(count_cores()) as pool, ExitStack() as files:
        sources = [_in_order(table, ids, scratch, files) for table in tables]
        pa.default_memory_pool().release_unused()  # of comparing the ids, which Arrow would keep
        start = 0
        for blocks in zip(*(_portions(source.blocks(columns)) for source in sources), strict=True):
            rows = blocks[0].num_rows
            found = [[block.column(name).to_numpy() for name in columns] for block in blocks]
            named = ids.slice(start, rows)
            log_probs = _mixed(found, weights.astype(np.float32), tables, named, pool)
            del blocks, found  # the next ones are read before this loop comes back
            yield Block(start, named, log_probs)
            start += rows


def check_classes(tables: Sequence[TableFile]) -> None:
    """Raises a DataError that names the first table of other classes than the first one's, and the classes."""
    for table in tables[1:]:
        differing = sorted(set(tables[0].classes) ^ set(table.classes))
        if differing:
            raise DataError(
                f"{tables[0].path} and {table.path} know different classes: {sample(differing)} on one side alone"
            )


def _in_order(table: TableFile, ids: pa.Array, scratch: Path, files: ExitStack) -> TableFile | Reordered:
    """The table, if its rows stand in the order of `ids`; else its numbers brought into it."""
    own = table.ids(checked=False)
    if own.equals(ids):
        return table
    own = table.ids()
    place = pc.index_in(own, value_set=ids)
    if place.null_count or len(own) != len(ids):
        there, wanted = set(own.to_pylist()), set(ids.to_pylist())
        missing, further = sorted(wanted - there), sorted(there - wanted)
        parts = [f"{len(missing)} ids are not in it ({sample(missing)})"] if missing else []
        parts += [f"{len(further)} of its ids are not among them ({sample(further)})"] if further else []
        raise DataError(f"{table.path} speaks of other rows: {'; '.join(parts)}")
    return _reordered(table, place.to_numpy(), files.enter_context(tempfile.TemporaryFile(dir=scratch)), scratch)


def _reordered(table: TableFile, place: np.ndarray, file: IO[bytes], scratch: Path) -> Reordered:
    """Writes row r of the table to place[r] of a file in `scratch`; a RetryableError where that has no room."""
    shape, start = (table.rows, len(table.classes)), 0
    try:
        reserve(file.fileno(), 4 * shape[0] * shape[1])
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise RetryableError(
            f"{table.path} has its rows in another order than the first table, and {scratch} has no room for the "
            f"{4 * shape[0] * shape[1] / MIB:.0f} MiB to sort them in: free some, or name another folder by TMPDIR"
        ) from error
    for block in table.blocks():
        values = np.stack([block.column(PREFIX + name).to_numpy() for name in table.classes], axis=1)
        # Mapped anew for each block: pages that were written to count as this process's memory until then.
        np.memmap(file, np.float32, "r+", shape=shape)[place[start : start + len(values)]] = values
        start += len(values)
    return Reordered(table, file)


def _portions(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, ROWS_A_GROUP at a time, whatever the row groups of the file."""
    rest: pa.Table | None = None
    for block in blocks:
        rest = block if rest is None else pa.concat_tables([rest, block])
        while rest.num_rows >= ROWS_A_GROUP:
            portion, rest = rest.slice(0, ROWS_A_GROUP), rest.slice(ROWS_A_GROUP)
            yield portion
            del portion
            if not rest.num_rows:
                rest = None  # an empty slice would keep all of it in memory
                break
    if rest is not None:
        yield rest


def _mixed(
    found: Sequence[Sequence[np.ndarray]],
    weights: np.ndarray,
    tables: Sequence[TableFile],
    ids: pa.Array,
    pool: Executor,
) -> np.ndarray:
    """log Σ w p [C, n] of a block [K][C][n] of K tables, checked, each row brought to sum 1."""
    columns = np.empty((len(found[0]), len(ids)), np.float32)

    def mix(start: int) -> bool:
        rows = slice(start, start + ROWS_AT_ONCE)
        return _mix([[column[rows] for column in each] for each in found], weights, columns[:, rows])

    if not all(pool.map(mix, range(0, len(ids), ROWS_AT_ONCE))):
        _refuse(found, tables, ids)
    return columns


def _mix(found: Sequence[Sequence[np.ndarray]], weights: np.ndarray, into: np.ndarray) -> bool:
    """Writes log Σ w p of a few rows [K][C][n] `into` [C, n], each row with sum 1; whether every table's rows had it before."""
    rows = into.shape[1]
    sums, whole, probs = (
        np.zeros((len(found), rows), np.float32),
        np.zeros(rows, np.float32),
        np.empty(rows, np.float32),
    )
    weights = np.ones_like(weights) if (weights == weights[0]).all() else weights / weights.max()
    with np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore"):
        for each, total in zip(zip(*found, strict=True), into, strict=True):
            total[:] = 0
            for column, weight, own in zip(each, weights, sums, strict=True):
                np.copyto(probs, column, casting="same_kind")  # exp of what is not in the cache takes twice the time
                own += np.exp(probs, out=probs)
                total += probs if weight == 1 else np.multiply(probs, weight, out=probs)
            whole += total
            faint = np.flatnonzero(total < FAINT)
            np.log(total, out=total)
            if len(faint):
                total[faint] = _log_sum([column[faint] for column in each], weights)
        norm = np.log(whole)
        for total in into:
            total -= norm
    return bool((np.abs(sums - 1) <= predictions.TOLERANCE).all())


def _log_sum(columns: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """log Σ w p [n] of probabilities too small for float32, whose logarithms are not; LEAST for 0."""
    shifted = [column.astype(np.float64) + np.log(weight) for column, weight in zip(columns, weights, strict=True)]
    return np.maximum(np.logaddexp.reduce(shifted), LEAST).astype(np.float32)


def _refuse(found: Sequence[Sequence[np.ndarray]], tables: Sequence[TableFile], ids: pa.Array) -> None:
    """Raises the DataError of the first row that is no probabilities, if there is one to double precision."""
    for columns, table in zip(found, tables, strict=True):
        check_block(np.stack(columns, axis=1), ids.to_pylist(), str(table.path))
