"""Run a stage and time a part of it: `python -m benchmarks.instrumented_stage WATCH STAGE KEY=VALUE…`.

The stage runs in this process, as in `python -m jobs STAGE …`. The last line on stdout has the times as JSON.
"""

import importlib
import json
import sys
from typing import Any

from benchmarks.processes import Timer, wait_for_turn
from jobs.__main__ import main as jobs_main


def watch_epochs(readings: dict[str, Any]) -> None:
    """Add `passes` to `readings`: the training pass of each epoch, with its loader and without validation, each in its turn."""
    loop = importlib.import_module("fivefold.training.trainer")
    train_epoch = loop.train_epoch

    def timed(trainer: Any, progress: Any) -> Any:
        images = sum(map(len, trainer.batches(progress.epoch)))
        wait_for_turn()
        timer = Timer()
        result = train_epoch(trainer, progress)  # returns numbers on the CPU, so the device is idle
        readings.setdefault("passes", []).append(timer.stop(images))
        return result

    loop.train_epoch = timed


def watch_stage(readings: dict[str, Any]) -> None:
    """Add `passes` to `readings`: one pass, the whole stage `ensemble`. Late imports happen before."""
    importlib.import_module("timm")
    importlib.import_module("fivefold.ensemble")
    ensemble = importlib.import_module("jobs.ensemble")
    main = ensemble.main

    def timed(*arguments: Any) -> Any:
        timer = Timer()
        outcome = main(*arguments)
        readings["passes"] = [timer.stop(outcome.metrics["images"])]
        return outcome

    ensemble.main = timed


WATCHES = {"epochs": watch_epochs, "stage": watch_stage}

if __name__ == "__main__":
    readings: dict[str, Any] = {}
    WATCHES[sys.argv[1]](readings)
    code = jobs_main(sys.argv[2:])
    print(json.dumps(readings), flush=True)
    sys.exit(code)
