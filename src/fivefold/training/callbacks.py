"""Callbacks after each optimiser step: the moving average of the weights, and unfreezing."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle


class Ema:
    """average ← d·average + (1 - d)·weights after each step, d = min(decay, (1 + t) / (10 + t)).

    The increasing d lets short runs forget the random initialisation (implementation of Tan & Le 2019).
    BatchNorm's running statistics are averaged too; counters are copied. With decay 0 the average equals the weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = list(zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True))
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])

    @torch.no_grad()
    def __call__(self) -> None:
        """Update the average with the model's current weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(*self._floats, 1 - decay)
        for average, new in self._counters:
            average.copy_(new)


class FreezeBackbone:
    """Freeze the parameters and running statistics of `part` for `steps` steps, then unfreeze them.

    Norms with running statistics run in eval mode, whatever mode the loop sets: they use their statistics and do not
    update them. Dropout does not change. Create it after optimiser, update and average, which need all parameters from
    the start.
    """

    def __init__(self, part: nn.Module, steps: int) -> None:
        self.left = steps
        self._frozen = [parameter for parameter in part.parameters() if parameter.requires_grad]
        self._hooks = freeze_norms(part)
        self._set_trainable(False)

    def __call__(self) -> None:
        """Count a step, and unfreeze after the last one."""
        self.left -= 1
        if self.left == 0:
            self._unfreeze()

    def state_dict(self) -> dict[str, int]:
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.left = state["left"]
        if self.left <= 0:
            self._unfreeze()

    def _unfreeze(self) -> None:
        self._set_trainable(True)
        for hook in self._hooks:
            hook.remove()

    def _set_trainable(self, trainable: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(trainable)


def freeze_norms(part: nn.Module) -> list[RemovableHandle]:
    """Let norms with running statistics run in eval mode, whatever mode the loop sets; return the hooks that do it."""
    norms = [module for module in part.modules() if isinstance(module, _NormBase)]
    return [norm.register_forward_pre_hook(_set_eval) for norm in norms]


def _set_eval(module: nn.Module, _: object) -> None:
    module.eval()
