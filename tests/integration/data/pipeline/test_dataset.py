"""Signals to a training process and its loader workers."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from toy_data import noise

PROGRAM = """
import os, signal, subprocess, sys
from pathlib import Path
from fivefold.data.pipeline.dataset import ImageDataset, load_batches
from fivefold.data.pipeline.loader import shuffle
from fivefold.data.readers.stores import open_store
from fivefold.data.transforms.registry import build_transforms
from fivefold.errors import StoppedError
from fivefold.progress import interruptible
from fivefold.signals import defer_signals

signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests in the background has it ignored
images = ImageDataset(open_store(Path(sys.argv[1])), [f"{n}.png" for n in range(11)], build_transforms([], (8, 8)))
for number in (signal.SIGINT, signal.SIGTERM):
    try:
        with defer_signals():
            for count, _ in enumerate(interruptible(load_batches(images, shuffle(range(11), 2, 0, 1) * 1000, 2))):
                if count == 3:
                    subprocess.Popen(["setsid", "kill", "-s", str(int(number)), "--", f"-{os.getpid()}"])
    except StoppedError as stopped:
        print("stopped by", stopped.number)
"""


@pytest.mark.slow
def test_signal_to_the_process_group_stops_the_process_but_not_its_workers(tmp_path):
    """A terminal's ^C and `timeout` signal the whole group. A worker that died of it would make training fail."""
    for number in range(11):
        noise(tmp_path / f"{number}.png", np.random.default_rng(number), 20)
    command = [sys.executable, "-c", PROGRAM, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True, check=False)
    expected = "".join(f"stopped by {int(number)}\n" for number in (signal.SIGINT, signal.SIGTERM))
    assert (result.returncode, result.stdout) == (0, expected), result.stderr
