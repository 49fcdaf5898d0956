"""The time of a run on this machine: what it has used over all its starts, and what is left for each step.

The folds get the time that is left without that of the steps after them, which those of the linear probes have shown.
Folds that run at the same time get the same share, and leave the rest to the folds that follow.
"""

import math
import time
from contextlib import suppress

from fivefold.contract.files import read_json, write_json
from fivefold.errors import DataError
from fivefold.launchers.plan import LINEAR, Plan, Step
from fivefold.launchers.status import read_step_record

FILE = "time.json"
SAVE_INTERVAL_S = 2.0
"""A killed run forgets at most this much of the time that it has used."""
MARGIN = 1.2
"""Time kept for a step divided by the time that a similar one took."""
UNKNOWN_SHARE = 0.2
"""Share of the whole time that is kept for the steps after the folds, without linear probes to compare with."""


class RunClock:
    """Counts the seconds of a run in `<run>/time.json`, so that a run that is started again has what is left.

    It counts from the making of the plan, so the checks before the first step count too.
    """

    def __init__(self, plan: Plan) -> None:
        self.path, self.steps, self.limit = plan.folder / FILE, plan.steps, plan.settings.time_limit
        self.forecast = plan.expected
        self._used = 0.0
        with suppress(OSError, DataError, KeyError, TypeError):
            self._used = float(read_json(self.path)["used_seconds"]) if self.path.is_file() else 0.0
        self._started = self._saved = plan.made
        self._timed = [step for step in plan.steps if step.timed and read_step_record(step) is None]

    @property
    def used(self) -> float:
        """Return the seconds that the run has used."""
        return self._used + time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Return the seconds that are left, infinity without a limit."""
        return self.limit - self.used

    def save(self, at_once: bool = False) -> None:
        """Store the used time, at intervals, unless `at_once`."""
        if self.limit < math.inf and (at_once or time.monotonic() - self._saved >= SAVE_INTERVAL_S):
            self._saved = time.monotonic()
            write_json(self.path, {"limit_seconds": self.limit, "used_seconds": round(self.used, 1)})

    def deadline(self, step: Step, parallel: int, workers: int) -> float:
        """Return the time (seconds since 1970) at which a `step` must end, infinity without a limit.

        Folds run in rounds of `parallel`, on so many `workers` (cores or GPUs). Each fold gets the same time of a worker, so a round
        of more folds than workers is longer.
        """
        if self.limit == math.inf:
            return math.inf
        if not step.timed:
            return time.time() + self.left
        index = self._timed.index(step) if step in self._timed else 0
        waiting = max(1, len(self._timed) - index + index % parallel)
        rounds = [min(parallel, waiting - before) for before in range(0, waiting, parallel)]
        lengths = [max(1.0, folds / workers) for folds in rounds]
        return time.time() + max(0.0, self.left - self.reserve()) * lengths[0] / sum(lengths)

    def fits(self, step: Step) -> bool:
        """Return whether the time is enough to start the step. Up to the first report it always is, so that a run has a result."""
        if self.limit == math.inf or step.name.startswith(LINEAR):
            return True
        if step.stage in ("ensemble", "evaluate") and not any(
            other.stage == "evaluate" and read_step_record(other) for other in self.steps
        ):
            return True
        needed = self.reserve() if step.timed else self._expected(step)
        return needed is None or self.left > needed

    def reserve(self) -> float:
        """Return the seconds that the steps after the folds need."""
        last = max((index for index, step in enumerate(self.steps) if step.timed), default=len(self.steps))
        expected = [self._expected(step) for step in self.steps[last + 1 :]]
        return UNKNOWN_SHARE * self.limit if None in expected else sum(map(float, filter(None, expected)))

    def _expected(self, step: Step) -> float | None:
        """Return the seconds that a step takes, by a similar one that has run, or by the forecast; None if there is neither.

        A distillation is like a fold of the linear probes. Before the final ensemble has run, its folder has the record of that
        of the linear probes, which share one pass over the images; the final one adds a pass for each fine-tuned fold.
        """
        name = f"{LINEAR}-fold-1" if step.stage == "distill" else step.stage
        similar = next((other for other in self.steps if other.name == name), None)
        record = read_step_record(similar) if similar else None
        folds = sum(other.timed for other in self.steps)
        early = record is not None and step.name == "ensemble" and record["metrics"].get("models", 0) <= folds
        if (record is None or early) and step.name in self.forecast:
            return MARGIN * self.forecast[step.name]
        if record is None:
            return None
        return MARGIN * record["wall_seconds"] * (1 + folds if early else 1)
