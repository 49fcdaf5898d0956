"""What a stage's `main` gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The files that must be whole for the stage to count as done, its figures, and the SHA-256 of those
    files whose digest was taken while they were written.
    """

    outputs: Sequence[Path]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[Path, str] = field(default_factory=dict)
