"""The exponential moving average of a model's weights."""

import copy
from typing import Any

import torch
from torch import nn


class Ema:
    """average ← d·average + (1 - d)·weights after each step, d = min(decay, (1 + t) / (10 + t)).

    The rising d lets short runs forget the random start (Tan & Le 2019's implementation).
    BatchNorm's running statistics are averaged too; counters are copied. Decay 0 is the weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = [(own, new) for own, new in pairs if own.is_floating_point()]
        self._counters = [(own, new) for own, new in pairs if not own.is_floating_point()]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])

    @torch.no_grad()
    def __call__(self) -> None:
        """Takes the model's weights of now into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_([own for own, _ in self._floats], [new for _, new in self._floats], 1 - decay)
        for own, new in self._counters:
            own.copy_(new)
