"""Checks of the files that a system must write: their columns and numbers of rows."""

import csv
import json
from collections.abc import Iterable
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
    columns, rows = _measure(paths[0])
    wanted = list(expected.columns)
    if wanted[-1:] == [REST]:
        wanted = [*wanted[:-1], *columns[len(wanted) - 1 :]]
    if wanted and columns != wanted:
        return f"columns {', '.join(columns)}; wanted {', '.join(expected.columns)}"
    return "" if expected.rows in (None, rows) else f"{rows} rows; wanted {expected.rows}"


def _measure(path: Path) -> tuple[list[str], int]:
    """Return the columns and the number of rows of a table. An .out file is a command's output, whose last line is JSON."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return table.column_names, table.num_rows
    if path.suffix == ".out":
        content: Any = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
        rows = content if isinstance(content, list) else [content]
        return list(rows[0]), len(rows)
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *lines = csv.reader(file)
    ragged = [line for line in lines if len(line) != len(header) or not all(line[:1])]
    return [*header, *(f"a row of {len(line)} cells" for line in ragged[:1])], len(lines)
