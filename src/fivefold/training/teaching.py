"""What a teacher says of the training rows, softened by a temperature that may cool from epoch to epoch."""

import numpy as np
import torch
from torch import Tensor


class Teacher:
    """The teacher's log-probabilities [N, C] of N rows; `teacher[rows]` are its softened probabilities [B, C].

    `temperature` is T of the epoch that runs.
    """

    def __init__(self, log_probs: np.ndarray, temperature: float, device: torch.device) -> None:
        self.log_probs = log_probs
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


def soften(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T) float32 [N, C] (Hinton et al. 2015, arXiv 1503.02531, equation 1)."""
    scaled = log_probs.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    powers = np.exp(scaled)
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
