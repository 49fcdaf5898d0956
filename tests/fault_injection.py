"""`python struck.py SIGNAL POINT CALL DELAY STEPS STAGE KEY=VALUE…`: a stage that a signal hits.

It does so DELAY seconds after the CALL-th time that it comes by POINT, and then the time stands in STEPS.struck. A byte
goes to the file STEPS for every step of its optimiser, so that nobody has to believe a log. POINT `never` only counts.
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
from jobs import __main__ as door

number, point, call, delay, steps, *arguments = sys.argv[1:]
left = int(call)


def hit() -> None:
    Path(f"{steps}.struck").write_text(str(time.time()))
    os.kill(os.getpid(), signal.Signals[number])


def strike() -> None:
    """Counts down; at the last time, the signal: at once, or after the delay while the stage goes on."""
    global left
    left -= 1
    if left == 0 and float(delay) == 0:
        hit()
    elif left == 0:
        late = threading.Timer(float(delay), hit)
        late.daemon = True
        late.start()


def before(owner: Any, name: str) -> None:
    """Has `strike` called before each call of a function."""
    function: Callable = getattr(owner, name)

    @wraps(function)
    def struck(*given, **named):
        strike()
        return function(*given, **named)

    setattr(owner, name, struck)


def half_written(state: Any, file: io.BufferedWriter) -> None:
    whole = io.BytesIO()
    torch.serialization.save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    strike()
    file.write(whole.getvalue()[len(whole.getvalue()) // 2 :])


def count_steps(path: Path) -> None:
    call_schedule = Schedule.__call__

    def counted(self: Schedule) -> None:
        with open(path, "ab") as file:
            file.write(b".")
        call_schedule(self)

    Schedule.__call__ = counted


POINTS: dict[str, Callable[[], None]] = {
    "never": lambda: None,
    "start": lambda: before(door, "compute_key"),
    "caching": lambda: before(ImageDataset, "cache_in_memory"),
    "preparing": lambda: before(EvalImageCache, "_make"),
    "step": lambda: before(Schedule, "__call__"),
    "validation": lambda: before(trainer, "validate"),
    "checkpoint": lambda: setattr(checkpoints.torch, "save", half_written),
    "views": lambda: before(training_run, "predict_images"),
    "weights": lambda: before(trained_model, "save_weights"),
    "record": lambda: before(door, "write_record"),
}

count_steps(Path(steps))
POINTS[point]()
sys.exit(door.main(arguments))
