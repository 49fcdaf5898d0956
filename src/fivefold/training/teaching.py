"""What a teacher says of the training rows: softened by a temperature that may cool, with a weight that may fall."""

import numpy as np
import torch
from torch import Tensor

from fivefold.recipe import Distill


class Teacher:
    """The teacher's log-probabilities [N, C] of N rows; `teacher[rows]` are its softened probabilities [B, C].

    `temperature` is T of the epoch that runs, `alpha` the weight of the teacher's term at the step that runs.
    """

    def __init__(self, log_probs: np.ndarray, alpha: float, temperature: float, device: torch.device) -> None:
        self.log_probs = log_probs
        self.alpha = alpha
        self.device = device
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float) -> None:
        """Softens all rows anew."""
        self.temperature = temperature
        self._probs = torch.from_numpy(soften(self.log_probs, temperature)).to(self.device)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._probs[rows]


class Cooling:
    """Sets T = max(end, start · decay^e) of epoch e = 0, 1, … after the last step of the one before.

    Validation scores labels at T = 1, so its epochs compare, whatever T the student is taught at.
    """

    def __init__(self, teacher: Teacher, decay: float, end: float, steps_per_epoch: int) -> None:
        self.teacher = teacher
        self.start, self.decay, self.end = teacher.temperature, decay, end
        self.steps_per_epoch = steps_per_epoch
        self.step = 0

    def __call__(self) -> None:
        """To be called after each step."""
        self.step += 1
        if self.step % self.steps_per_epoch == 0 and self.teacher.temperature > self.end:
            self._cool()

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
        if self.start > self.end:
            self._cool()

    def _cool(self) -> None:
        epochs = self.step // self.steps_per_epoch
        self.teacher.set_temperature(max(self.end, self.start * self.decay**epochs))


class Annealing:
    """Lets the teacher's alpha fall to 0 in equal parts over the first `steps` steps: soft targets first, labels at last.

    Teacher annealing of Clark et al. 2019, "BAM! Born-again multi-task networks" (arXiv 1907.04829,
    section 3.2), whose λ is 1 - alpha.
    """

    def __init__(self, teacher: Teacher, steps: int) -> None:
        self.teacher, self.start, self.steps = teacher, teacher.alpha, steps
        self.step = 0

    def __call__(self) -> None:
        """To be called after each step."""
        self.step += 1
        self._weigh()

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
        self._weigh()

    def _weigh(self) -> None:
        self.teacher.alpha = self.start * max(0.0, 1 - self.step / self.steps)


def lesson_plan(teacher: Teacher, chosen: Distill, steps: int, epochs: int) -> list[Cooling | Annealing]:
    """What changes of the teacher over `epochs` of so many steps."""
    falling = round(chosen.annealing * epochs * steps)
    cooling = Cooling(teacher, chosen.temperature_decay, chosen.temperature_end, steps)
    return [*([cooling] if chosen.temperature_decay < 1 else []), *([Annealing(teacher, falling)] if falling else [])]


def soften(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T) float32 [N, C] (Hinton et al. 2015, arXiv 1503.02531, equation 1)."""
    return torch.from_numpy(log_probs).double().div(temperature).softmax(dim=1).float().numpy()
