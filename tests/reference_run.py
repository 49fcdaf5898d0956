"""A small run of the demo's digits, to be the same on another platform as on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SETTINGS = ("recipe=demo", "run=r", "split.folds=2", "train.epochs=1", "train.warmup_epochs=0")
STEPS = ("split", "fold-0", "fold-1", "ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student")


def submit(given: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`submit` of the small run, as a command; what it said is its stdout."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "jobs", "submit", *SETTINGS, *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=REPOSITORY, env={**own, **variables}, check=False, timeout=1200, **pipes)


def wait_until(is_so: Callable[[], object], seconds: float = 60) -> None:
    """Waits for what another process or thread brings about; an AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
