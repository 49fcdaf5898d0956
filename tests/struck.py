"""`python struck.py SIGNAL POINT CALL STEPS STAGE KEY=VALUE…`: a stage that a signal hits at the CALL-th time it comes by POINT.

A byte goes to the file STEPS for every step of its optimiser, so that nobody has to believe a log. POINT `never`
only counts.
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from fivefold import members
from fivefold.data.dataset import ImageSet
from fivefold.training import loop, resume
from fivefold.training.optim import Schedule
from jobs import __main__ as door
from jobs import training

number, point, call, steps, *arguments = sys.argv[1:]
left = int(call)


def strike() -> None:
    """Counts down; at the last time, the signal."""
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.Signals[number])


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


count_steps(Path(steps))
if point == "start":
    before(door, "key_of")
elif point == "caching":
    before(ImageSet, "keep_in_memory")
elif point == "step":
    before(Schedule, "__call__")
elif point == "validation":
    before(loop, "validate")
elif point == "checkpoint":
    resume.torch.save = half_written
elif point == "views":
    before(training, "predict_images")
elif point == "weights":
    before(members, "save_weights")
elif point == "record":
    before(door, "write_record")
elif point != "never":
    sys.exit(f"no point {point!r}")
sys.exit(door.main(arguments))
