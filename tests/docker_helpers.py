"""The image on a real engine, and what its stages write held against a run of this machine's own processes."""

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
"""The demo, in seconds."""
COMPARED = (
    "folds.parquet",
    "model.safetensors",
    "model.json",
    "oof.parquet",
    "train_log.csv",
    "predictions.parquet",
    "submission.csv",
)
"""What must be the same bytes on every platform."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Another number of threads gives other bits."""


def docker(*arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return called(["docker", *arguments], check=check, timeout=timeout)


def called(
    command: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    where: Path = ROOT,
    check: bool = True,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """A process that is over, with what it printed, which an AssertionError shows where it fails (but without `check`)."""
    done = subprocess.run(command, env=environ, cwd=where, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def run_here(runs: Path, data: Path) -> Path:
    """The whole run by processes of this machine, of one thread each; its folder, `runs`/here."""
    given = [f"train={data / 'train'}", f"eval={data / 'test'}", f"runs={runs}", "run=here", "recipe=demo"]
    command = [sys.executable, "-m", "jobs", "submit", *given, *as_arguments(SETTINGS)]
    called(command, {**os.environ, **ONE_THREAD})
    return runs / "here"


def differing(run: Path, reference: Path, steps: Sequence[str] = ()) -> list[str]:
    """The files of `reference` (of some of its steps alone, if any are named) that a run lacks or has with other bytes."""
    wanted = sorted(path.relative_to(reference) for name in COMPARED for path in reference.rglob(name))
    wanted = [path for path in wanted if not steps or path.parts[0] in steps]
    assert wanted, f"{reference} holds nothing to compare"
    return [str(path) for path in wanted if not _same(run / path, reference / path)]


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
