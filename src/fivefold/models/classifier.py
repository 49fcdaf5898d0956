"""A classifier: a backbone and a head on its features, optionally with meta features.

Heads by name map features [B, F] to logits [B, C]. Every head has `dropout` before its last layer.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivefold.errors import SettingsError
from fivefold.lookup import choose, parse_spec

MIN_STD = 1e-6
"""A standard deviation below this is a rounding error."""

LINKS: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits, "sigmoid": F.logsigmoid}
"""Functions from logits [B, C] to values whose softmax gives the probabilities, by the link of the training loss."""


class Classifier(nn.Module):
    """Images float [B, 3, H, W], normalised, to logits [B, C].

    With `meta` it also takes meta features [B, M], which are standardised and appended to the backbone's features.
    `head(features(…))` equals the whole forward pass. `initial_weights`: where the backbone's first weights come from.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, meta: "Standardize | None" = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.meta = meta
        self.initial_weights: dict[str, str] = {}

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        return self.head(self.features(images, meta))

    def features(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        features = self.backbone(images)
        return features if self.meta is None else torch.cat([features, self.meta(meta)], dim=1)


class Backbone(nn.Module):
    """Images to the features of a classifier's backbone alone; meta features are ignored."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.backbone = network.backbone

    def forward(self, images: Tensor, _: Tensor | None = None) -> Tensor:
        return self.backbone(images)


class Standardize(nn.Module):
    """(x - mean) / std of each of M features; mean and std are buffers, saved with the weights and not trained."""

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
        """Set mean and std from the training rows [N, M]; a constant feature is centred and not scaled."""
        rows = rows.double().cpu()
        std = rows.std(dim=0, correction=0)
        self.mean.copy_(rows.mean(dim=0))
        self.std.copy_(std.where(std > MIN_STD, torch.ones_like(std)))


def build_head(spec: str | dict[str, Any], features: int, classes: int, dropout: float) -> nn.Module:
    """Return the head `spec` for `features` inputs and `classes` outputs.

    A spec is a name, or a table with `name` and the head's parameters; `dropout` is the default for a spec without it.
    Raise a SettingsError for an unknown name or parameter, or an invalid value.
    """
    name, parameters = parse_spec(spec, HEADS, "head")
    try:
        return HEADS[name](features, classes, **{"dropout": dropout, **parameters})
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"head {name!r} with {parameters}: {error}") from error


def linear(features: int, classes: int, *, dropout: float) -> nn.Module:
    """Dropout, then one linear layer."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))


def mlp(
    features: int, classes: int, *, dropout: float, hidden: int = 512, norm: str = "batch", before: float = 0.0
) -> nn.Module:
    """Dropout `before`, then linear to `hidden`, `norm` (batch, layer or none), ReLU, dropout and linear."""
    if hidden < 1:
        raise ValueError(f"hidden={hidden} is not a whole number from 1")
    return nn.Sequential(
        nn.Dropout(before),
        nn.Linear(features, hidden),
        choose(NORMS, "norm", str(norm))(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


def convnext(features: int, classes: int, *, dropout: float) -> nn.Module:
    """LayerNorm, dropout and one linear layer (Liu et al. 2022, arXiv 2201.03545; ε = 1e-6 as in its code)."""
    return nn.Sequential(nn.LayerNorm(features, eps=1e-6), *linear(features, classes, dropout=dropout))


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}
HEADS: dict[str, Callable[..., nn.Module]] = {"linear": linear, "mlp": mlp, "convnext": convnext}
