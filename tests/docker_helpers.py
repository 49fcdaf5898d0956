"""The image on a real Docker engine, and the comparison of its outputs with those of a local run."""

import json
import os
import subprocess
import sys
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


def docker(*arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return called(["docker", *arguments], check=check, timeout=timeout)


def called(
    command: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    where: Path = ROOT,
    check: bool = True,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its result; unless `check` is false, a failure is an AssertionError with the output."""
    done = subprocess.run(command, env=environ, cwd=where, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def run_here(runs: Path, data: Path) -> Path:
    """Run the whole pipeline in local processes with one thread each; return its folder, `runs`/here."""
    keys = [f"train={data / 'train'}", f"eval={data / 'test'}", f"runs={runs}", "run=here", "recipe=demo"]
    command = [sys.executable, "-m", "jobs", "submit", *keys, *as_arguments(SETTINGS)]
    called(command, {**os.environ, **ONE_THREAD})
    return runs / "here"


def differing(run: Path, reference: Path, steps: Sequence[str] = ()) -> list[str]:
    """Return the files of `reference` (only those of `steps`, if any) that are missing in `run` or differ."""
    paths = sorted(path.relative_to(reference) for name in COMPARED for path in reference.rglob(name))
    paths = [path for path in paths if not steps or path.parts[0] in steps]
    assert paths, f"{reference} holds nothing to compare"
    return [str(path) for path in paths if not _have_same_bytes(run / path, reference / path)]


def _have_same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
