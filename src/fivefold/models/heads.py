"""Heads by name: features [B, F] to logits [B, C]."""

from collections.abc import Callable

from torch import nn

from fivefold.choose import choose


def build_head(name: str, features: int, classes: int, dropout: float) -> nn.Module:
    """The head `name` for `features` inputs and `classes` outputs."""
    return choose(HEADS, "head", name)(features, classes, dropout)


def linear(features: int, classes: int, dropout: float) -> nn.Module:
    """Dropout, then one linear layer."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))


HEADS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "linear": linear,
}
