"""The figures of an epoch: what they are called, and the one line that says them, from which platforms read metrics."""

from collections.abc import Mapping
from typing import Any

LOG_COLUMNS = (
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss", "val_f1_macro", "lr"
)  # fmt: skip
METRICS = tuple(name for name in LOG_COLUMNS if name not in ("epoch", "lr"))
"""The columns that stand in the line."""
START = "metric fold="


def metric_line(fold: int | None, row: Mapping[str, Any]) -> str:
    """`metric fold=2 epoch=3 train_loss=0.4120 …`, with the figures that `row` has; fold None is the student."""
    figures = " ".join(f"{name}={row[name]:.4f}" for name in METRICS if row.get(name) is not None)
    return f"{START}{'student' if fold is None else fold} epoch={row['epoch']} {figures}"


def metric_patterns() -> dict[str, str]:
    """Of each metric the regular expression whose only group is its value in the line; a plain one, as any service reads."""
    return {name: rf"{START}.* {name}=([-+.0-9a-z]+)" for name in METRICS}
