"""Which parameters learn how fast: the head at the full rate, the backbone at a share of it, layer by layer."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fivefold.errors import SettingsError

NUMBERED = re.compile(r"^(.*?\d)(\.|$)")


def learning_rates(backbone: nn.Module, factor: float, decay: float) -> dict[int, float]:
    """The share of the learning rate of each of the backbone's parameters, by `id`.

    factor · decay^(L - l) in layer l of 0..L-1, so the last layer has factor · decay (Bao et al.
    2022, arXiv 2106.08254, section 3.2, count the same way from the head, which has 1).
    """
    layers = layers_of(backbone) if decay != 1.0 else {}
    count = 1 + max(layers.values(), default=0)
    return {
        id(parameter): factor * (decay ** (count - layers[name]) if layers else 1.0)
        for name, parameter in backbone.named_parameters()
    }


def layers_of(backbone: nn.Module) -> dict[str, int]:
    """The layer of each parameter by name, 0 nearest to the image.

    timm's networks say themselves what their layers are. In others a layer is the first
    part of a parameter's name that ends in a number (`layer1`, `features.3`, `_blocks.7`), or else
    the module that holds it, in the order of the network.
    """
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        return _timm_layers(backbone, matcher)
    names = [name for name, _ in backbone.named_parameters()]
    order = {key: place for place, key in enumerate(dict.fromkeys(map(_layer_name, names)))}
    return {name: order[_layer_name(name)] for name in names}


def _timm_layers(backbone: nn.Module, matcher: Callable[..., Mapping[str, Any]]) -> dict[str, int]:
    from timm.models import group_parameters

    try:
        layers = group_parameters(backbone, matcher(coarse=False), reverse=True)
    except (AttributeError, AssertionError, KeyError, NotImplementedError) as error:
        raise SettingsError(f"this backbone does not say what its layers are ({error}); train.layer_decay=1") from error
    used = sorted({int(layers[name]) for name, _ in backbone.named_parameters()})
    return {name: used.index(int(layers[name])) for name, _ in backbone.named_parameters()}


def _layer_name(parameter: str) -> str:
    found = NUMBERED.match(parameter)
    return found.group(1) if found else parameter.rpartition(".")[0]
