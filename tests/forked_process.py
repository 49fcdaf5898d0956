"""Processes of Python that need not import torch again: multiprocessing's fork server has done so before it forks them.

A process is a real one, with its own environment, folder and output, and a signal that hits it kills it alone.
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
"""What a stage imports; a name that cannot be imported here is left to the process."""


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
    """`python SCRIPT ARGUMENTS…`, with what it said in a file; `returncode` is negative where a signal ended it."""

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
        """The exit code; None while it runs."""
        return self.process.exitcode

    def said(self) -> str:
        """What it has written up to now."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: int) -> None:
        """Sends it a signal if it still runs."""
        if self.returncode is None:
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def ended(self, within: float) -> bool:
        """Waits for its end, but no longer than these seconds; whether it came."""
        self.process.join(within)
        return self.returncode is not None

    def wait(self, within: float = 240) -> str:
        """Waits for its end; what it said. An AssertionError, and the process is killed, if it takes longer."""
        if not self.ended(within):
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it still ran after {within} s: {self.said()}")
        said = self.said()
        self.log.unlink()
        return said
