"""End a training run at a given time: the learning rate falls with the time, so that it reaches its end in time.

The budgeted schedule of Li et al. 2020 (arXiv 1905.04753), with seconds for the budget: the progress of a run is the
larger of the fraction of its steps and the fraction of its time. A machine that slows down makes fewer steps.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

EXIT_SECONDS = 8.0
"""Seconds kept for writing the model and plots and for the end of the process."""
FORWARD_SHARE = 0.36
"""Time of an image in prediction divided by its time in training, at the same size; measured: 0.26 to 0.36."""
MAX_SHARE = 0.5
"""The predictions after the last step get at most this share of the time."""


@dataclass
class TimeLimit:
    """The time of a training run that must end at `deadline`, in seconds since 1970.

    Without a deadline it never ends. `images_after`: the number of predictions that follow the last step, counted in images of
    the training size. `done`: the progress 0..1 when this process starts, above 0 if the run resumes.
    """

    deadline: float = math.inf
    images_after: float = 0.0
    clock: Callable[[], float] = time.time
    done: float = 0.0
    started: float = field(init=False)
    _counted: float = field(init=False)
    _seconds: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.started = self._counted = self.clock()

    @property
    def progress(self) -> float:
        """Return the fraction 0..1 of the time for steps that has passed."""
        now, whole = self.clock(), self.deadline - self.started
        # The median, because the first steps warm up.
        image = statistics.median(self._seconds) if self._seconds else 0.0
        after = min(FORWARD_SHARE * image * self.images_after, MAX_SHARE * whole) if whole < math.inf else 0.0
        end = self.deadline - EXIT_SECONDS - after
        if now >= end:
            return 1.0
        return self.done + (1 - self.done) * (now - self.started) / (end - self.started)

    def count(self, images: int) -> None:
        """Count a step of so many images, which has just ended."""
        now = self.clock()
        self._seconds.append((now - self._counted) / images)
        self._counted = now

    def state_dict(self) -> dict[str, float]:
        return {"done": self.progress}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.done = min(state["done"], 1.0)
