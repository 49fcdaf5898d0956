"""A small run of the demo's digits, to compare other platforms with this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SETTINGS = ("recipe=demo", "run=r", "split.folds=2", "train.epochs=1", "train.warmup_epochs=0")
STEPS = ("split", "fold-0", "fold-1", "ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student")


def submit(arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `submit` for the small run as a process; its stdout includes stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "jobs", "submit", *SETTINGS, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=REPOSITORY, env={**inherited, **variables}, check=False, timeout=1200, **pipes)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition that another process or thread fulfils; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
