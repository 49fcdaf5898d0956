"""A small run of the demo's digits, to compare other platforms with this machine, and ways to start and to disturb runs."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SETTINGS = ("recipe=demo", "run=r", "split.folds=2", "train.epochs=1", "train.warmup_epochs=0")
STEPS = ("split", "fold-0", "fold-1", "ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student")
SUBMIT = [sys.executable, "-m", "jobs", "submit"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def start_submit(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start `submit` as a process with additional variables; its stdout includes stderr."""
    return subprocess.Popen([*SUBMIT, *arguments], cwd=REPOSITORY, env={**os.environ, **variables}, **PIPES)


def submit(arguments: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `submit` for the small run as a process; its stdout includes stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ = {**inherited, **variables}
    return subprocess.run([*SUBMIT, *SETTINGS, *arguments], cwd=REPOSITORY, env=environ, timeout=1200, **PIPES)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition that another process or thread fulfils; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@contextmanager
def act_when(condition: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """While the block runs, wait for the condition in a thread and then call `act`, which lets the block end."""
    is_over = threading.Event()

    def wait_and_act() -> None:
        try:
            wait_until(lambda: is_over.is_set() or condition())
        finally:
            if not is_over.is_set():
                act()

    with ThreadPoolExecutor(1) as pool:
        acted = pool.submit(wait_and_act)
        try:
            yield
        finally:
            is_over.set()
        acted.result()


def interrupt() -> None:
    """Send SIGINT to this process."""
    os.kill(os.getpid(), signal.SIGINT)
