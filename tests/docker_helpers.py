"""The image on a real Docker engine, and the comparison of its outputs with those of a local run."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMAGE = os.environ.get("FIVEFOLD_IMAGE", "fivefold:latest")
ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {"train.epochs": 2, "train.warmup_epochs": 0, "train.loggers": []}
"""Settings with which the demo takes seconds."""
COMPARED = (
    "folds.parquet",
    "model.safetensors",
    "model.json",
    "oof.parquet",
    "train_log.csv",
    "predictions.parquet",
    "submission.csv",
)
"""Files whose bytes must be equal on every platform."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Another number of threads changes the results' bits."""


def docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return called(["docker", *arguments], check=check)


def called(command: Sequence[str], where: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command and return its result; unless `check` is false, a failure is an AssertionError with the output."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def differing(run: Path, reference: Path, steps: Sequence[str] = ()) -> list[str]:
    """Return the files of `reference` (only those of `steps`, if any) that are missing in `run` or differ."""
    paths = sorted(path.relative_to(reference) for name in COMPARED for path in reference.rglob(name))
    paths = [path for path in paths if not steps or path.parts[0] in steps]
    assert paths, f"{reference} holds nothing to compare"
    return [str(path) for path in paths if not _have_same_bytes(run / path, reference / path)]


def _have_same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
