"""Forecast the seconds, memory and disk of a run's steps from a data set's facts and the machine's measured speed.

A step's seconds are its images divided by the measured rate, and constant parts, which are multiples of the seconds that a
process needs to load its libraries. `simulate` runs the steps as the Scheduler does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from fivefold.config.schema import Settings
from fivefold.contract.files import read_json, write_json
from fivefold.launchers.plan import Step
from fivefold.planning.facts import DataFacts
from fivefold.planning.probe import BUDGET_S, Speed
from fivefold.progress import MIB, format_duration

MEASUREMENTS = "measurements.json"
"""The file beside a planned recipe with what its forecast needs."""
GRADIENTS = 320
"""Gradients of all rows that the fit of a linear head takes, with its cross-validation; measured on 2,700 rows of 10 classes."""
TRAIN_STARTS, SCORE_STARTS, SPLIT_STARTS = 3.0, 2.0, 1.0
"""Constant seconds of a step divided by those that its process takes to load: steps that train, ensemble and evaluate, split.

Training steps also prepare the network, write the model and draw plots.
"""
TRAINING_MEMORY, LINEAR_MEMORY, SMALL_PROCESS = 1.38, 0.46, 0.32 * 2**30
"""Memory of a fold, and of a linear head from cached features, divided by that of the measured process, which ran some steps only; and
the bytes of a process without a network."""
CHECKPOINTS = 3
"""Files of a fold's checkpoints at the same time; see `training_run.check_disk`."""
STATES = 5
"""Copies of the weights in a checkpoint, and in the model folder: weights, two states of AdamW, and the best epoch's."""


@dataclass(frozen=True)
class Rates:
    """How a run uses the machine: `parallel` folds at a time on so many `workers` (cores or GPUs), and `views` in prediction.

    `gpu`: the workers are GPUs, and every step runs on one of them.
    """

    parallel: int
    workers: int
    views: int = 2
    gpu: bool = False

    @property
    def at_once(self) -> int:
        """Return the number of folds that make progress at the same time."""
        return min(self.parallel, self.workers)

    @property
    def whole(self) -> int:
        """Return the rate of a step with the whole machine, divided by that of one fold beside others."""
        return 1 if self.gpu else self.at_once


def write_measurements(path: Path, facts: DataFacts, speed: Speed, rates: Rates) -> None:
    write_json(path, {"facts": asdict(facts), "speed": asdict(speed), "rates": asdict(rates)})


def read_measurements(path: Path) -> tuple[DataFacts, Speed, Rates]:
    """Return the facts, speed and rates that `write_measurements` wrote."""
    tree = read_json(path)
    return DataFacts(**tree["facts"]), Speed(**tree["speed"]), Rates(**tree["rates"])


@dataclass(frozen=True)
class StepForecast:
    """The forecast of a step: its start and end in seconds from the start of the run, its memory and its files in bytes."""

    name: str
    start: float
    end: float
    memory: float
    disk: float


def head_seconds(speed: Speed, facts: DataFacts, rates: Rates) -> float:
    """Return the seconds of one process to fit a linear head to the features of a fold's training rows."""
    return GRADIENTS * speed.gradient_seconds * facts.train_rows * rates.views * facts.classes


def features_seconds(speed: Speed, facts: DataFacts, rates: Rates) -> float:
    """Return the seconds to decode all images and compute their features, by one process with all cores."""
    decoding = facts.decode_seconds * facts.rows / rates.workers
    return decoding + facts.rows * rates.views / (speed.frozen * rates.whole)


def fold_seconds(speed: Speed, facts: DataFacts, rates: Rates, epochs: float) -> float:
    """Return the seconds of a fold of `epochs`; after the last one its rows are validated, and predicted in all views."""
    training = epochs * facts.train_rows / speed.train
    return TRAIN_STARTS * speed.start_seconds + training + facts.valid_rows * (1 + rates.views) / speed.predict


def rounds(rates: Rates, folds: int) -> float:
    """Return the time of all folds divided by that of one, in the order in which a run starts them."""
    full, rest = divmod(folds, rates.parallel)
    return full * max(1.0, rates.parallel / rates.workers) + (max(1.0, rest / rates.workers) if rest else 0.0)


def fine_tuning_seconds(speed: Speed, facts: DataFacts, rates: Rates, epochs: float) -> float:
    """Return the seconds of the training steps of `epochs` of all folds."""
    return epochs * facts.train_rows / speed.train * rounds(rates, facts.folds)


def linear_seconds(speed: Speed, facts: DataFacts, rates: Rates) -> float:
    """Return the seconds of linear probes, their ensemble and their report."""
    start, head = speed.start_seconds, head_seconds(speed, facts, rates)
    folds = (head + TRAIN_STARTS * start) * (1 + rounds(rates, facts.folds - 1))
    scored = facts.eval_images * rates.views / (speed.predict * rates.whole)
    return features_seconds(speed, facts, rates) + folds + scored + 2 * SCORE_STARTS * start


def other_seconds(speed: Speed, facts: DataFacts, rates: Rates) -> float:
    """Return the seconds of a run with linear probes first, without the epochs of fine-tuning."""
    start, head = speed.start_seconds, head_seconds(speed, facts, rates)
    folds = fold_seconds(speed, facts, rates, 0) * rounds(rates, facts.folds)
    scored = facts.eval_images * rates.views * (facts.folds + 2) / (speed.predict * rates.whole)
    student = head + TRAIN_STARTS * start
    return linear_seconds(speed, facts, rates) + folds + scored + student + 4 * SCORE_STARTS * start


def forecast_steps(
    steps: Sequence[Step], settings: Settings, facts: DataFacts, speed: Speed, rates: Rates, limit: float = math.inf
) -> list[StepForecast]:
    """Return the forecast of each step, in the order of `steps`; a `limit` of seconds shortens the folds."""
    seconds = {step.name: _seconds(step, settings, facts, speed, rates) for step in steps}
    if limit < math.inf:
        timed = [step.name for step in steps if step.timed]
        low, high = 0.0, 1.0
        for _ in range(30):  # the folds' share of their time that ends in time, by bisection
            share = (low + high) / 2
            shortened = seconds | {name: share * seconds[name] for name in timed}
            low, high = (share, high) if _end(simulate(steps, shortened, rates)) <= limit else (low, share)
        share = 1.0 if _end(simulate(steps, seconds, rates)) <= limit else low
        seconds |= {name: share * seconds[name] for name in timed}
    times = simulate(steps, seconds, rates)
    return [
        StepForecast(
            step.name, *times[step.name], _memory(step, settings, facts, speed), _disk(step, facts, speed, rates)
        )
        for step in steps
    ]


def describe(steps: Sequence[StepForecast], hourly_price: float = 0.0, used: float = 0.0) -> str:
    """Return a table of the steps with their sums; `used`: seconds that the run has used before, `hourly_price`: of the machine."""
    rows = [[each.name, format_duration(each.start), each.end - each.start, each.memory, each.disk] for each in steps]
    end = max(each.end for each in steps)
    rows.append(["all steps", "", end, peak_memory(steps), sum(each.disk for each in steps)])
    table = pd.DataFrame(rows, columns=["step", "starts at", "seconds", "memory MiB", "disk MiB"])
    table[["memory MiB", "disk MiB"]] /= MIB
    text = table.to_string(index=False, float_format="{:,.0f}".format)
    text += f"\nabout {format_duration(used + end)} in all" + (
        f", {format_duration(used)} of it so far" if used >= 1 else ""
    )
    return text + (f", for {(used + end) / 3600 * hourly_price:.2f}" if hourly_price else "")


def peak_memory(steps: Sequence[StepForecast]) -> float:
    """Return the largest memory in bytes of steps that run at the same time."""
    return max(sum(other.memory for other in steps if other.start <= step.start < other.end) for step in steps)


def simulate(steps: Sequence[Step], seconds: Mapping[str, float], rates: Rates) -> dict[str, tuple[float, float]]:
    """Return the start and end of each step: a step starts when those it needs have ended and one of the `parallel` places is free."""
    waiting, running, times, now = list(steps), {}, {}, 0.0
    cores = {step.name: 1 if rates.gpu or not _uses_all_cores(step) else rates.workers for step in steps}
    while waiting or running:
        for step in [step for step in waiting if all(need in times and need not in running for need in step.needs)]:
            if len(running) < rates.parallel:
                waiting.remove(step)
                running[step.name], times[step.name] = seconds[step.name], (now, math.inf)
        if not running:
            raise ValueError(f"steps that wait for missing ones: {', '.join(step.name for step in waiting)}")
        slowdown = max(1.0, sum(cores[name] for name in running) / rates.workers)
        shortest = min(running.values())
        now += shortest * slowdown
        for name in list(running):
            running[name] -= shortest
            if running[name] <= 1e-9:
                del running[name]
                times[name] = (times[name][0], now)
    return times


def _uses_all_cores(step: Step) -> bool:
    """Return whether the step's process has a thread for each core. Reports hardly compute."""
    return step.all_cores or step.stage in ("ensemble", "distill")


def _end(times: Mapping[str, tuple[float, float]]) -> float:
    return max(end for _, end in times.values())


def _seconds(step: Step, settings: Settings, facts: DataFacts, speed: Speed, rates: Rates) -> float:
    start, head = speed.start_seconds, head_seconds(speed, facts, rates)
    constant = TRAIN_STARTS * start
    if step.stage == "split":
        return SPLIT_STARTS * start + facts.decode_seconds * (facts.rows + facts.eval_images) / rates.workers
    if step.stage == "plan":
        return constant + BUDGET_S
    if step.stage in ("ensemble", "evaluate"):
        if step.stage == "evaluate" or step.name == "ensemble-student":
            passes = 0 if step.stage == "evaluate" else 1
        else:
            passes = 1 if _is_linear(step, settings) else 1 + facts.folds
        return SCORE_STARTS * start + passes * facts.eval_images * rates.views / (speed.predict * rates.whole)
    if step.stage == "distill" or _is_linear(step, settings):
        return constant + head + (features_seconds(speed, facts, rates) if step.all_cores else 0.0)
    return fold_seconds(speed, facts, rates, settings.train.epochs)


def _is_linear(step: Step, settings: Settings) -> bool:
    return step.name.startswith("linear-") or settings.train.method == "linear_probe"


def _memory(step: Step, settings: Settings, facts: DataFacts, speed: Speed) -> float:
    """Return the peak bytes of a step's process: a share of the measured one's, and the images and features that it maps or keeps."""
    if step.stage in ("split", "plan", "evaluate"):
        return SMALL_PROCESS
    features = 4 * facts.rows * speed.features
    images = facts.image_bytes * facts.rows
    if step.stage == "train-fold" and not _is_linear(step, settings):
        kept = facts.valid_rows * 3 * settings.model.size[0] * settings.model.size[1]
        return TRAINING_MEMORY * speed.memory + images + kept
    if step.stage == "ensemble" or step.all_cores:
        return speed.memory + (images if step.all_cores else 0.0)
    return LINEAR_MEMORY * speed.memory + 3 * features


def _disk(step: Step, facts: DataFacts, speed: Speed, rates: Rates) -> float:
    """Return the bytes that a step writes, with its checkpoints, and with the caches that it is the first to write."""
    if step.stage in ("split", "plan", "evaluate", "ensemble"):
        return 2**20
    caches = facts.rows * (facts.image_bytes + 4 * rates.views * speed.features)
    if step.stage == "train-fold" and step.timed:
        return (1 + CHECKPOINTS * STATES) * speed.weights
    return speed.weights + (caches if step.all_cores else 0.0)
