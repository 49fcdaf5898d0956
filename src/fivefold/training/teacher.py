"""The teacher's softened probabilities of the training rows, and the schedules of their temperature and weight."""

import numpy as np
import torch
from torch import Tensor


class Teacher:
    """The teacher's log-probabilities [N, C] of N rows; `teacher[rows]` returns softened probabilities [B, C].

    `temperature`: T of the current epoch. `alpha`: weight of the distillation loss at the current step.
    """

    def __init__(self, log_probs: np.ndarray, alpha: float, temperature: float, device: torch.device) -> None:
        self.log_probs = log_probs
        self.alpha = alpha
        self.device = device
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature and soften all rows with it."""
        self.temperature = temperature
        self._probs = torch.from_numpy(soften(self.log_probs, temperature)).to(self.device)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._probs[rows]


class Lessons:
    """Schedule of a teacher's temperature and alpha. Call it after each step.

    In epoch e = 0, 1, … T = max(end, start · decay^e). Validation uses the labels at T = 1, so its epochs are comparable.
    alpha falls linearly to 0 over the first `falling` steps (0: constant): soft targets first, labels at the end (Clark et
    al. 2019, "BAM! Born-again multi-task networks", arXiv 1907.04829, section 3.2, whose λ is 1 - alpha).
    """

    def __init__(self, teacher: Teacher, steps_per_epoch: int, decay: float, end: float, falling: int = 0) -> None:
        self.teacher, self.alpha, self.start = teacher, teacher.alpha, teacher.temperature
        self.steps_per_epoch, self.decay, self.end, self.falling = steps_per_epoch, decay, min(end, self.start), falling
        self.step = 0

    def __call__(self) -> None:
        self.load_state_dict({"step": self.step + 1})

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
        temperature = max(self.end, self.start * self.decay ** (self.step // self.steps_per_epoch))
        if temperature != self.teacher.temperature:
            self.teacher.set_temperature(temperature)
        if self.falling:
            self.teacher.alpha = self.alpha * max(0.0, 1 - self.step / self.falling)


def soften(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(log p / T), float32 [N, C] (Hinton et al. 2015, arXiv 1503.02531, equation 1)."""
    return torch.from_numpy(log_probs).double().div(temperature).softmax(dim=1).float().numpy()
