"""Checks of the files that a system must write: their columns and numbers of rows."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

REST = "…"
"""As the last column: further columns may follow."""


@dataclass(frozen=True)
class Expected:
    """A file, by a path in which `*` must match exactly one file; for a table also its columns and number of rows.

    Tables are .csv, .parquet and .out; the last line of an .out file is one object with these keys, or a list of them.
    `least` is the minimum number of bytes.
    """

    path: str
    columns: tuple[str, ...] = ()
    rows: int | None = None
    least: int = 1


def problems(root: Path, expected: Iterable[Expected]) -> list[str]:
    """Return one line for each problem with the files below `root`."""
    return [f"{file.path}: {problem}" for file in expected if (problem := _find_problem(root, file))]


def _find_problem(root: Path, expected: Expected) -> str:
    paths = sorted(root.glob(expected.path))
    if len(paths) != 1:
        return f"{len(paths)} files" if paths else "missing"
    size = paths[0].stat().st_size
    if size < expected.least:
        return f"{size} bytes, at least {expected.least} are wanted"
    if not expected.columns and expected.rows is None:
        return ""
    columns, rows = READERS[paths[0].suffix](paths[0])
    if not _columns_match(columns, expected.columns):
        return f"columns {', '.join(columns)}; wanted {', '.join(expected.columns)}"
    if expected.rows is not None and rows != expected.rows:
        return f"{rows} rows; wanted {expected.rows}"
    return ""


def _columns_match(columns: Sequence[str], expected: tuple[str, ...]) -> bool:
    if expected[-1:] == (REST,):
        return list(columns[: len(expected) - 1]) == list(expected[:-1])
    return not expected or list(columns) == list(expected)


def _measure_csv(path: Path) -> tuple[list[str], int]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    ragged = [row for row in rows if len(row) != len(header) or not all(row[:1])]
    return (header, len(rows)) if not ragged else ([*header, f"a row of {len(ragged[0])} cells"], len(rows))


def _measure_parquet(path: Path) -> tuple[list[str], int]:
    table = pq.read_table(path)
    return table.column_names, table.num_rows


def _measure_output(path: Path) -> tuple[list[str], int]:
    content: Any = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
    rows = content if isinstance(content, list) else [content]
    return list(rows[0]), len(rows)


READERS = {".csv": _measure_csv, ".parquet": _measure_parquet, ".out": _measure_output}
"""By suffix: a function for a file's columns and number of rows. `.out` is a command's output, whose last line is JSON."""
