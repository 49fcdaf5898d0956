"""Who watches a training run: each takes the row of an epoch when it ends."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold import logline
from fivefold.logline import LOG_COLUMNS
from fivefold.training.loop import Observer


def csv_log(path: Path) -> Observer:
    """Appends each epoch to a CSV, so that a killed run keeps what it did; it holds no times, so equal runs give equal bytes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(LOG_COLUMNS)

    def observe(row: Mapping[str, Any]) -> None:
        cells = [row["epoch"], *("" if row.get(name) is None else f"{row[name]:.6g}" for name in LOG_COLUMNS[1:])]
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(cells)
            file.flush()
            os.fsync(file.fileno())

    return observe


def metric_line(fold: int | None) -> Observer:
    """Prints one stable line an epoch, from which platforms read the metrics."""

    def observe(row: Mapping[str, Any]) -> None:
        print(logline.metric_line(fold, row), flush=True)

    return observe
