"""Python processes that need not import torch again: multiprocessing's fork server imports it before it forks them.

Each is a real process with its own environment, folder and output; a signal to it affects only this process.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from toy_data import REPOSITORY

PRELOADED = (
    "torch", "timm", "torchvision.transforms.v2", "pandas", "pyarrow.parquet", "boto3", "scipy.special", "sklearn.metrics",
    "fivefold.training.trainer", "fivefold.models.classifier", "fivefold.data.pipeline.dataset", "fivefold.inference.predictor",
    "fivefold.contract.s3.client", "fivefold.distillation",
)  # fmt: skip
"""Modules that a stage imports; the fork server skips names that it cannot import, and the process imports them."""


def _begin(arguments: list[str], environ: dict[str, str], folder: str, output: str) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tempfile.tempdir = None
    sys.argv = arguments
    sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY)]
    runpy.run_path(arguments[0], run_name="__main__")


class Forked:
    """`python SCRIPT ARGUMENTS…` with its output in a file; `returncode` is negative if a signal ended it."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], folder: Path = REPOSITORY):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self.process = context.Process(target=_begin, args=([*arguments], {**environ}, str(folder), name))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self.process.exitcode

    def read_output(self) -> str:
        """Return the output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: int) -> None:
        """Send a signal if the process still runs."""
        if self.returncode is None:
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def wait(self, within: float = 240) -> str:
        """Wait for the end and return the output; after `within` seconds kill the process and raise AssertionError."""
        self.process.join(within)
        if self.returncode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it still ran after {within} s: {self.read_output()}")
        output = self.read_output()
        self.log.unlink()
        return output
