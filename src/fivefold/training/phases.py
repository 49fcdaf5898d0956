"""What follows each step besides the schedule: the average of the weights, and the end of a freeze."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


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


class Freezing:
    """Keeps every parameter and every running statistic of `part` for `steps` steps, then lets them go.

    Its norms with running statistics are in eval mode whenever they run, whatever mode the loop
    sets: they normalise by what they know and learn nothing. Dropout stays as it is. To be made
    after optimiser, update and average, which know all parameters from the start.
    """

    def __init__(self, part: nn.Module, steps: int) -> None:
        self.left = steps
        self._frozen = [parameter for parameter in part.parameters() if parameter.requires_grad]
        norms = [module for module in part.modules() if isinstance(module, _NormBase)]
        self._hooks = [norm.register_forward_pre_hook(_stay) for norm in norms]
        self._learn(False)

    def __call__(self) -> None:
        """To be called after each step."""
        self.left -= 1
        if self.left == 0:
            self._let_go()

    def state_dict(self) -> dict[str, int]:
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.left = state["left"]
        if self.left <= 0:
            self._let_go()

    def _let_go(self) -> None:
        self._learn(True)
        for hook in self._hooks:
            hook.remove()

    def _learn(self, wanted: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(wanted)


def _stay(module: nn.Module, _: object) -> None:
    module.eval()
