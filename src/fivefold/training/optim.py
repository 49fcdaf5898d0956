"""Optimisers and learning-rate schedules by name."""

import inspect
import math
from collections.abc import Callable, Mapping
from types import MethodType

import torch
from torch import nn
from torch.optim import Optimizer

from fivefold.choose import choose
from fivefold.errors import SettingsError
from fivefold.training.muon import Muon, hidden_weights


def build_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    momentum: float,
    shares: Mapping[int, float] | None = None,
) -> Optimizer:
    """The optimiser `name` over the model's parameters; norms and biases (fewer than two dimensions) do not decay.

    `shares`: the share of `lr` of a parameter, by its `id`; 1 where it names none. The groups stand
    in falling order of their rates.
    """
    groups: dict[tuple[float, bool, bool], dict] = {}
    hidden = hidden_weights(model) if name == "muon" else set()
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (shares or {}).get(id(parameter), 1.0), parameter.ndim >= 2, id(parameter) in hidden
            group = {"params": [], "lr": lr * key[0], "weight_decay": weight_decay if key[1] else 0.0}
            groups.setdefault(key, group | ({"orthogonal": True} if key[2] else {}))["params"].append(parameter)
    _leave_the_compiler_out()
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    optimizer = choose(OPTIMIZERS, "optimizer", name)(ordered, lr, momentum)
    # The bare step: torch's wrapper around it imports the compiler, to break graphs that nobody compiles here.
    optimizer.step = MethodType(torch.no_grad()(inspect.unwrap(type(optimizer).step)), optimizer)
    return optimizer


def _leave_the_compiler_out() -> None:
    """Lets an optimiser be made without importing torch's compiler, which takes as long as torch itself.

    `torch._compile._disable_dynamo` wraps these methods, and imports the compiler when one is first
    called, unless the function already carries what it would run.
    """
    for method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
        function = inspect.unwrap(method)
        function.__dict__.setdefault("__dynamo_disable", function)


def _adamw(groups: list[dict], lr: float, momentum: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr=lr, fused=_fusable(groups))


def _adam(groups: list[dict], lr: float, momentum: float) -> Optimizer:
    return torch.optim.Adam(groups, lr=lr, fused=_fusable(groups))


def _sgd(groups: list[dict], lr: float, momentum: float) -> Optimizer:
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=_fusable(groups))
    # The fused step knows no parameters that join later, as frozen ones do: all start with the momentum 0.
    for parameter in (each for group in groups if momentum for each in group["params"]):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _muon(groups: list[dict], lr: float, momentum: float) -> Optimizer:
    return Muon(groups, lr, momentum)


def _fusable(groups: list[dict]) -> bool:
    return groups[0]["params"][0].device.type in ("cpu", "cuda")


OPTIMIZERS: dict[str, Callable[[list[dict], float, float], Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "muon": _muon,
}
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 1, "muon": 1}
"""Tensors the size of the weights that an optimiser keeps."""


def check_warmup(warmup_epochs: float, epochs: float) -> None:
    """Raises a SettingsError for a warm-up that leaves no step of the training."""
    if warmup_epochs >= epochs:
        raise SettingsError(
            f"train.warmup_epochs={warmup_epochs:g} leaves nothing of train.epochs={epochs:g}: "
            "give more epochs, or a shorter warm-up (0: none)"
        )


class Schedule:
    """Sets the learning rate of each step: a linear warm-up, then a factor by name."""

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        total: int,
        steps_per_epoch: int,
        warmup_epochs: float = 0.0,
        step_epochs: int = 10,
        gamma: float = 0.5,
    ) -> None:
        self.factor = choose(SCHEDULES, "schedule", name)
        self.optimizer = optimizer
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.total = total
        self.warmup = round(warmup_epochs * steps_per_epoch)
        check_warmup(self.warmup / steps_per_epoch, total / steps_per_epoch)
        self.drop_steps = step_epochs * steps_per_epoch
        self.patience = step_epochs
        self.gamma = gamma
        self.step = 0
        self.drops = 0
        self.bad_epochs = 0
        self._set()

    def __call__(self) -> None:
        """To be called after each step."""
        self.step += 1
        self._set()

    def after_epoch(self, improved: bool | None) -> None:
        """Counts epochs without improvement, for `plateau`; None: it was not looked at, and decides nothing."""
        self.bad_epochs = 0 if improved else self.bad_epochs + 1
        if improved is not None and self.bad_epochs >= self.patience:
            self.drops, self.bad_epochs = self.drops + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "drops": self.drops, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.drops, self.bad_epochs = state["step"], state["drops"], state["bad_epochs"]
        self._set()

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _set(self) -> None:
        if self.step < self.warmup:
            factor = (self.step + 1) / self.warmup
        else:
            factor = self.factor(self, (self.step - self.warmup) / (self.total - self.warmup))
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor


def constant(schedule: Schedule, progress: float) -> float:
    return 1.0


def cosine(schedule: Schedule, progress: float) -> float:
    """½(1 + cos πt), t from 0 to 1 (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5)."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def step(schedule: Schedule, progress: float) -> float:
    """γ^⌊epochs / step_epochs⌋."""
    return schedule.gamma ** (schedule.step // schedule.drop_steps)


def plateau(schedule: Schedule, progress: float) -> float:
    """γ once for every `step_epochs` epochs in a row without improvement."""
    return schedule.gamma**schedule.drops


SCHEDULES: dict[str, Callable[[Schedule, float], float]] = {
    "constant": constant,
    "cosine": cosine,
    "step": step,
    "plateau": plateau,
}
