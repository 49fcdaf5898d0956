"""Optimisers and learning-rate schedules by name, and the learning-rate factor of each parameter."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fivefold.errors import SettingsError
from fivefold.lookup import choose


def build_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    momentum: float,
    scales: Mapping[int, float] | None = None,
) -> Optimizer:
    """Return the optimiser `name` over the model's parameters; norms, biases, scales and tokens have no weight decay.

    Those are the parameters with fewer than two dimensions of size above 1, and those that a timm backbone exempts.

    `scales`: factor of `lr` per parameter, by its `id`; 1 if it is missing. Groups are in descending order of their
    learning rates.
    """
    groups: dict[tuple[float, bool, bool], dict] = {}
    hidden = muon_params(model) if name == "muon" else set()
    backbone = getattr(model, "backbone", model)
    names = getattr(backbone, "no_weight_decay", tuple)()
    exempt = {id(parameter) for name, parameter in backbone.named_parameters() if name in names}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = sum(size > 1 for size in parameter.shape) >= 2 and id(parameter) not in exempt
            key = (scales or {}).get(id(parameter), 1.0), decays, id(parameter) in hidden
            group = {"params": [], "lr": lr * key[0], "weight_decay": weight_decay if key[1] else 0.0}
            groups.setdefault(key, group | ({"use_muon": True} if key[2] else {}))["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    return choose(OPTIMIZERS, "optimizer", name)(ordered, lr, momentum)


def lr_scales(backbone: nn.Module, factor: float, decay: float) -> dict[int, float]:
    """Return the learning-rate factor of each backbone parameter, by `id`: factor · decay^(L - l) in layer l of 0..L-1.

    So the last layer has factor · decay, and the head 1 (Bao et al. 2022, arXiv 2106.08254, section 3.2). timm defines
    the layers. Raise a SettingsError if the backbone does not define layers and `decay` is not 1.
    """
    if decay == 1.0:
        return {id(parameter): factor for parameter in backbone.parameters()}
    from timm.optim import param_groups_layer_decay

    try:
        backbone.group_matcher(coarse=False)
        groups = param_groups_layer_decay(backbone, layer_decay=decay)
    except (AttributeError, AssertionError, KeyError, NotImplementedError) as error:
        raise SettingsError(
            f"this backbone does not define its layers ({error}); use a timm/… backbone, or set train.layer_decay=1"
        ) from error
    return {id(parameter): factor * decay * group["lr_scale"] for group in groups for parameter in group["params"]}


def muon_params(model: nn.Module) -> set[int]:
    """Return the `id`s of the weights that Muon optimises: those of the backbone's layers after the first, without the head.

    Depthwise convolutions and position embeddings are excluded, because they are not matrices between features.
    """
    layers = [m.weight for m in getattr(model, "backbone", model).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {id(weight) for weight in layers[1:] if weight.shape[1] > 1}


def _sgd(groups: list[dict], lr: float, momentum: float) -> Optimizer:
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=_supports_fused(groups))
    # The fused step needs the momentum of parameters that are unfrozen later: start all momenta at 0.
    for parameter in (parameter for group in groups if momentum for parameter in group["params"]):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _muon(groups: list[dict], lr: float, momentum: float) -> Optimizer:
    """Return timm's Muon with Nesterov momentum and the step size of AdamW (Liu et al. 2025, arXiv 2502.16982, equation 4)."""
    from timm.optim import Muon

    for group in groups:  # set `nesterov` for Muon's groups only: in the other groups it would select NAdamW
        group.update({"nesterov": True} if group.get("use_muon") else {"use_fallback": True, "eps": 1e-8})
    return Muon(groups, lr, momentum=momentum, ns_coefficients="original")


def _supports_fused(groups: list[dict]) -> bool:
    return groups[0]["params"][0].device.type in ("cpu", "cuda")


OPTIMIZERS: dict[str, Callable[[list[dict], float, float], Optimizer]] = {
    "adamw": lambda groups, lr, momentum: torch.optim.AdamW(groups, lr=lr, fused=_supports_fused(groups)),
    "adam": lambda groups, lr, momentum: torch.optim.Adam(groups, lr=lr, fused=_supports_fused(groups)),
    "sgd": _sgd,
    "muon": _muon,
}
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 1, "muon": 1}
"""Number of state tensors of the weights' size per optimiser."""


def check_warmup(warmup_epochs: float, epochs: float) -> None:
    """Raise a SettingsError if the warm-up takes all epochs."""
    if warmup_epochs >= epochs:
        raise SettingsError(
            f"train.warmup_epochs={warmup_epochs:g} must be less than train.epochs={epochs:g}: "
            "set more epochs, or a shorter warm-up (0: none)"
        )


class Schedule(LambdaLR):
    """Learning rate of each of `total` steps: a linear warm-up, then a schedule by name. Call it after each step.

    `passed` returns the fraction of the time that has passed; if it is more than that of the steps, it sets the rate.
    """

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        total: int,
        steps_per_epoch: int,
        warmup_epochs: float = 0.0,
        lr_step_epochs: int = 10,
        gamma: float = 0.5,
        passed: Callable[[], float] = lambda: 0.0,
    ) -> None:
        schedule = choose(SCHEDULES, "schedule", name)
        check_warmup(warmup_epochs, total / steps_per_epoch)
        warmup = min(round(warmup_epochs * steps_per_epoch), total - 1)
        drop_steps = lr_step_epochs * steps_per_epoch

        def factor(step: int) -> float:
            step = max(step, math.floor(passed() * total))
            if step < warmup:
                return (step + 1) / warmup
            return schedule(min((step - warmup) / (total - warmup), 1.0), step // drop_steps, gamma)

        super().__init__(optimizer, factor)

    def __call__(self) -> None:
        self.step()

    @property
    def lr(self) -> float:
        """Return the learning rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])


SCHEDULES: dict[str, Callable[[float, int, float], float]] = {
    "constant": lambda progress, drops, gamma: 1.0,
    "cosine": lambda progress, drops, gamma: 0.5 * (1 + math.cos(math.pi * progress)),
    "step": lambda progress, drops, gamma: gamma**drops,
}
"""Factor of the learning rate, by the progress 0..1 since the warm-up, the number of drops since step 0, and `train.lr_gamma`.

cosine: Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5.
"""
