"""End a training run at a given time: the learning rate falls with the time, so that it reaches its end in time.

The budgeted schedule of Li et al. 2020 (arXiv 1905.04753), with seconds for the budget: the progress of a run is the
larger of the fraction of its steps and the fraction of its time. A machine that slows down makes fewer steps.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

EXIT_SECONDS = 8.0
"""Seconds kept for writing the model and plots and for the end of the process."""
FORWARD_SHARE = 0.45
"""Time of an image in prediction divided by its time in training, at the same size; a forward pass is a third of a step."""


@dataclass
class TimeLimit:
    """The time of a training run that must end at `deadline`, in seconds since 1970.

    Without a deadline it never ends. `images_after`: the number of predictions that follow the last step, counted in images of the training size.
    `done`: the progress 0..1 when this process starts, above 0 if the run resumes.
    """

    deadline: float = math.inf
    images_after: float = 0.0
    clock: Callable[[], float] = time.time
    done: float = 0.0
    images: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def progress(self) -> float:
        """Return the fraction 0..1 of the time for steps that has passed. Before the first step the whole time counts."""
        now = self.clock()
        speed = (now - self.started) / self.images if self.images else 0.0
        end = self.deadline - EXIT_SECONDS - FORWARD_SHARE * speed * self.images_after
        if now >= end:
            return 1.0
        return self.done + (1 - self.done) * (now - self.started) / (end - self.started)

    def count(self, images: int) -> None:
        """Count the images of a step."""
        self.images += images

    def state_dict(self) -> dict[str, float]:
        return {"done": self.progress}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.done = min(state["done"], 1.0)
