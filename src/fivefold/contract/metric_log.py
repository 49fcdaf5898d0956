"""Names of an epoch's metrics, and the log line that platforms parse for them."""

from collections.abc import Mapping
from typing import Any

LOG_COLUMNS = (
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss", "val_f1_macro", "lr"
)  # fmt: skip
METRICS = tuple(name for name in LOG_COLUMNS if name not in ("epoch", "lr"))
"""The columns that the log line contains."""
START = "metric fold="


def format_metric_line(fold: int | None, row: Mapping[str, Any]) -> str:
    """Return `metric fold=2 epoch=3 train_loss=0.4120 …` with the metrics that `row` has. Fold None is the student."""
    values = " ".join(f"{name}={row[name]:.4f}" for name in METRICS if row.get(name) is not None)
    return f"{START}{'student' if fold is None else fold} epoch={row['epoch']} {values}"


def metric_patterns() -> dict[str, str]:
    """Return a regular expression for each metric. Its only group is the value in the log line; its syntax is basic, for any service."""
    return {name: rf"{START}.* {name}=([-+.0-9a-z]+)" for name in METRICS}
