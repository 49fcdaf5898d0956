"""A stage as it is, with clocks around a part of it: `python -m benchmarks.watched WATCH STAGE KEY=VALUE…`.

The stage runs as `python -m jobs STAGE …` would run it, in this process; what the clocks saw is the last line of stdout,
as JSON. The clocks are read twice an epoch, or once.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from benchmarks.clocks import Reading
from benchmarks.turns import my_turn
from fivefold.choose import choose
from jobs.__main__ import main as jobs_main


def main(arguments: Sequence[str]) -> int:
    seen: dict[str, Any] = {}
    choose(WATCHES, "watch", arguments[0])(seen)
    code = jobs_main(arguments[1:])
    print(json.dumps(seen), flush=True)
    return code


def epochs(seen: dict[str, Any]) -> None:
    """`passes`: of each epoch the training pass with its loader, without the validation; the device is waited for.

    A pass begins when it is this process's turn.
    """
    from fivefold.training import loop

    train_epoch = loop.train_epoch

    def timed(parts: loop.Loop, progress: loop.Progress) -> Any:
        images = sum(map(len, parts.batches(progress.epoch)))
        my_turn()
        begun = Reading.now()
        result = train_epoch(parts, progress)  # it ends with figures on the CPU, so nothing is under way
        seen.setdefault("passes", []).append(begun.since(images))
        return result

    loop.train_epoch = timed


def stage(seen: dict[str, Any]) -> None:
    """`stage`: all that the stage `ensemble` does, from finding the models to the last file written.

    What it imports late is imported before: five seconds that `start` counts.
    """
    import timm  # noqa: F401

    import fivefold.committee  # noqa: F401
    from jobs import ensemble

    whole = ensemble.main

    def timed(*given: Any) -> Any:
        begun = Reading.now()
        outcome = whole(*given)
        seen["stage"] = begun.since(outcome.metrics["images"])
        return outcome

    ensemble.main = timed


def first_step(seen: dict[str, Any]) -> None:
    """`first_step`: `time.monotonic()` when the first step is done; the process ends there.

    The stage's torch is imported here, as the stage would.
    """
    updates = import_module("fivefold.training.updates")
    plain = updates.UPDATES["plain"]

    def watched(*parts: Any) -> Callable[..., Any]:
        update = plain(*parts)

        def first(rows: Any) -> Any:
            results = update(rows)
            float(results[0].loss)
            print(json.dumps({"first_step": time.monotonic()}), flush=True)
            os._exit(0)

        return first

    updates.UPDATES["plain"] = watched


WATCHES = {"epochs": epochs, "stage": stage, "first_step": first_step}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
