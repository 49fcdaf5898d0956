"""`python fault_injection.py SIGNAL POINT CALL DELAY STEPS STAGE KEY=VALUE…`: run a stage and send it a signal.

The signal comes DELAY seconds after the CALL-th arrival at POINT; its time is written to STEPS.struck. The file STEPS gets
one byte per optimiser step, so that tests need not rely on the log. POINT `never` only counts steps.
"""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from fivefold import trained_model
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.data.pipeline.eval_cache import EvalImageCache
from fivefold.stages import training_run
from fivefold.training import checkpoints, trainer
from fivefold.training.optim import Schedule
from jobs import __main__ as entry_point

number, point, call, delay, steps, *arguments = sys.argv[1:]
remaining_calls = int(call)


def send_signal() -> None:
    Path(f"{steps}.struck").write_text(str(time.time()))
    os.kill(os.getpid(), signal.Signals[number])


def count_down() -> None:
    """Count down; on the last call send the signal: at once, or after the delay while the stage continues."""
    global remaining_calls
    remaining_calls -= 1
    if remaining_calls == 0 and float(delay) == 0:
        send_signal()
    elif remaining_calls == 0:
        timer = threading.Timer(float(delay), send_signal)
        timer.daemon = True
        timer.start()


def count_down_before(owner: Any, name: str) -> None:
    """Make `owner.name` call `count_down` before each of its calls."""
    function: Callable = getattr(owner, name)

    @wraps(function)
    def wrapper(*args, **kwargs):
        count_down()
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def save_in_two_halves(state: Any, file: io.BufferedWriter) -> None:
    buffer = io.BytesIO()
    torch.serialization.save(state, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    count_down()
    file.write(buffer.getvalue()[len(buffer.getvalue()) // 2 :])


def count_steps(path: Path) -> None:
    call_schedule = Schedule.__call__

    def counting_call(self: Schedule) -> None:
        with open(path, "ab") as file:
            file.write(b".")
        call_schedule(self)

    Schedule.__call__ = counting_call


POINTS: dict[str, Callable[[], None]] = {
    "never": lambda: None,
    "start": lambda: count_down_before(entry_point, "compute_key"),
    "caching": lambda: count_down_before(ImageDataset, "cache_in_memory"),
    "preparing": lambda: count_down_before(EvalImageCache, "_make"),
    "step": lambda: count_down_before(Schedule, "__call__"),
    "validation": lambda: count_down_before(trainer, "validate"),
    "checkpoint": lambda: setattr(checkpoints.torch, "save", save_in_two_halves),
    "views": lambda: count_down_before(training_run, "predict_images"),
    "weights": lambda: count_down_before(trained_model, "save_weights"),
    "record": lambda: count_down_before(entry_point, "write_record"),
}

count_steps(Path(steps))
POINTS[point]()
sys.exit(entry_point.main(arguments))
