"""A classifier: a backbone, and a head on its features, which meta features may join.

Heads by name: features [B, F] to logits [B, C]. All take `dropout`, before their last layer.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.choose import choose
from fivefold.errors import SettingsError

CONSTANT = 1e-6
"""A standard deviation below this is rounding."""

LINKS: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits, "sigmoid": F.logsigmoid}
"""What softmax makes probabilities of, from logits [B, C], by the link of the loss that trained them.

A loss of each class against the rest trains sigmoids: they are brought to sum 1.
"""


class Classifier(nn.Module):
    """Images float [B, 3, H, W], normalised, to logits [B, C].

    With `meta` it takes meta features [B, M] too: standardised, they stand behind the backbone's.
    Both halves may be called by themselves: `head(features(…))` is the whole.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, meta: "Standardised | None" = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.meta = meta

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        return self.head(self.features(images, meta))

    def features(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        """All that the head sees [B, F]."""
        features = self.backbone(images)
        return features if self.meta is None else torch.cat([features, self.meta(meta)], dim=1)


class Standardised(nn.Module):
    """(x - mean) / std of each of M numbers; mean and std are saved with the weights, and no gradient moves them."""

    mean: Tensor
    std: Tensor

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))

    def forward(self, numbers: Tensor) -> Tensor:
        return (numbers - self.mean) / self.std

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Takes mean and std of the training rows [N, M]; a number that is the same in all of them is only centred."""
        rows = rows.double().cpu()
        std = rows.std(dim=0, correction=0)
        self.mean.copy_(rows.mean(dim=0))
        self.std.copy_(std.where(std > CONSTANT, torch.ones_like(std)))


def build_head(spec: str | dict[str, Any], features: int, classes: int, dropout: float) -> nn.Module:
    """The head `spec` for `features` inputs and `classes` outputs.

    A spec is a name, or a table with `name` and that head's parameters; `dropout` is for a spec
    that gives none. Raises SettingsError for an unknown name or parameter, or an impossible value.
    """
    parameters = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(parameters.pop("name", ""))
    make = choose(HEADS, "head", name)
    known = {each.name: each for each in signature(make).parameters.values() if each.kind is each.KEYWORD_ONLY}
    for parameter in parameters:
        choose(known, f"parameter of the head {name!r}", parameter)
    try:
        return make(features, classes, **{"dropout": dropout, **parameters})
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"head {name!r} with {parameters}: {error}") from error


def linear(features: int, classes: int, *, dropout: float) -> nn.Module:
    """Dropout, then one linear layer."""
    return nn.Sequential(nn.Dropout(_share("dropout", dropout)), nn.Linear(features, classes))


def mlp(
    features: int,
    classes: int,
    *,
    dropout: float,
    hidden: int = 512,
    norm: str = "batch",
    before: float = 0.0,
) -> nn.Module:
    """Dropout `before`, then linear to `hidden`, `norm` (batch, layer or none), ReLU, dropout and linear."""
    return nn.Sequential(
        nn.Dropout(_share("before", before)),
        nn.Linear(features, _positive("hidden", hidden)),
        choose(NORMS, "norm", str(norm))(hidden),
        nn.ReLU(),
        nn.Dropout(_share("dropout", dropout)),
        nn.Linear(hidden, classes),
    )


def convnext(features: int, classes: int, *, dropout: float) -> nn.Module:
    """LayerNorm, dropout and one linear layer (Liu et al. 2022, arXiv 2201.03545; ε = 1e-6 as in its code)."""
    return nn.Sequential(nn.LayerNorm(features, eps=1e-6), *linear(features, classes, dropout=dropout))


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not a number from 0 to below 1")
    return float(value)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number from 1")
    return value


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "none": nn.Identity,
}

HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "convnext": convnext,
}
