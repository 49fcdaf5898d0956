"""The result of a stage's `main`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The files that must be complete for the stage to count as done, and its figures."""

    outputs: Sequence[Path]
    metrics: Mapping[str, Any] = field(default_factory=dict)
