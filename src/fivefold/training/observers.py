"""Who watches a training run: each takes the row of an epoch when it ends."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold.training.loop import Observer

LOG_COLUMNS = (
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss", "val_f1_macro", "lr"
)  # fmt: skip


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
    """Prints one stable line an epoch, from which SageMaker's regexes read the metrics."""

    def observe(row: Mapping[str, Any]) -> None:
        names = [name for name in LOG_COLUMNS[1:] if row.get(name) is not None and name != "lr"]
        figures = " ".join(f"{name}={row[name]:.4f}" for name in names)
        print(f"metric fold={'student' if fold is None else fold} epoch={row['epoch']} {figures}", flush=True)

    return observe
