"""What must lie there after a system has run: files, their columns, their rows."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

REST = "…"
"""As the last of the columns: further ones may follow."""


@dataclass(frozen=True)
class Expected:
    """A file, by a path that may hold `*` and then stands for one file; of a table its columns and number of rows.

    Tables are .csv and .parquet, and .out, whose last line is a list of objects with these keys, or one object.
    `least`: so many bytes at least.
    """

    path: str
    columns: tuple[str, ...] = ()
    rows: int | None = None
    least: int = 1


def problems(root: Path, expected: Iterable[Expected]) -> list[str]:
    """What is wrong with the files below `root`, a line each."""
    return [f"{each.path}: {wrong}" for each in expected if (wrong := _problem(root, each))]


def _problem(root: Path, expected: Expected) -> str:
    found = sorted(root.glob(expected.path))
    if len(found) != 1:
        return f"{len(found)} files" if found else "missing"
    size = found[0].stat().st_size
    if size < expected.least:
        return f"{size} bytes, at least {expected.least} are wanted"
    if not expected.columns and expected.rows is None:
        return ""
    columns, rows = READERS[found[0].suffix](found[0])
    if not _fits(columns, expected.columns):
        return f"columns {', '.join(columns)}; wanted {', '.join(expected.columns)}"
    if expected.rows is not None and rows != expected.rows:
        return f"{rows} rows; wanted {expected.rows}"
    return ""


def _fits(columns: Sequence[str], wanted: tuple[str, ...]) -> bool:
    if wanted[-1:] == (REST,):
        return list(columns[: len(wanted) - 1]) == list(wanted[:-1])
    return not wanted or list(columns) == list(wanted)


def _csv(path: Path) -> tuple[list[str], int]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    ragged = [row for row in rows if len(row) != len(header) or not all(row[:1])]
    return (header, len(rows)) if not ragged else ([*header, f"a row of {len(ragged[0])} cells"], len(rows))


def _parquet(path: Path) -> tuple[list[str], int]:
    read = pq.read_table(path)
    return read.column_names, read.num_rows


def _printed(path: Path) -> tuple[list[str], int]:
    content: Any = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
    rows = content if isinstance(content, list) else [content]
    return list(rows[0]), len(rows)


READERS = {".csv": _csv, ".parquet": _parquet, ".out": _printed}
"""By suffix: a file's columns and number of rows. `.out` is what a command printed, whose last line is JSON."""
