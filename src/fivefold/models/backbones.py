"""Backbones by `family/name`: images [B, 3, H, W] to pooled features [B, num_features].

Families: `timm/…` and `torchvision/…` (their classifiers), `efficientnet_pytorch/…`,
`fivefold/…` (small networks of our own). `pretrained` asks the family's own hub for weights.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from fivefold.choose import choose, did_you_mean
from fivefold.errors import RetryableError, SettingsError


def build_backbone(
    name: str, pretrained: bool, options: Mapping[str, Any], drop_path: float | None = None
) -> nn.Module:
    """The backbone `family/name` without its classifier; random weights come from torch's global generator.

    `drop_path`: the share of stochastic depth (Huang et al. 2016, arXiv 1603.09382), under
    whatever name the family has for it; None leaves it at the network's own. Raises SettingsError
    for an unknown family, name or option, RetryableError when the hub cannot be reached.
    """
    family, _, rest = name.partition("/")
    if not rest:
        raise SettingsError(
            f"backbone {name!r} names no family; write one of {', '.join(f'{f}/NAME' for f in FAMILIES)}"
        )
    build = choose(FAMILIES, "family of backbones", family)
    options = dict(options)
    if drop_path is not None:
        options[choose(DROP_PATHS, "family of backbones for drop_path", family)] = drop_path
    try:
        return build(rest, pretrained, dict(options))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"backbone {name!r} with options {options}: {error}") from error


@torch.no_grad()
def count_features(backbone: nn.Module, size: tuple[int, ...]) -> int:
    """The number of features of an image of `size`, by running one; it also proves that the size works."""
    was_training = backbone.training
    try:
        features = backbone.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SettingsError(f"the backbone cannot take images of {size[0]}x{size[1]} pixels: {error}") from error
    finally:
        backbone.train(was_training)
    if features.ndim != 2:
        raise SettingsError(f"the backbone gives features of shape {tuple(features.shape)}, not [B, F]")
    return int(features.shape[1])


def _timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise SettingsError(f"timm has no model {name!r}{did_you_mean(name.split('.')[0], timm.list_models())}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (OSError, RuntimeError) as error:
        raise _no_weights(f"timm/{name}", error) if pretrained else SettingsError(f"timm/{name}: {error}") from error


def _torchvision(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Without the last linear layer; with the option `bare` without all that stands between pooling and it."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise SettingsError(f"torchvision has no classifier {name!r}{did_you_mean(name, known)}")
    bare = options.pop("bare", False)
    try:
        model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    except OSError as error:
        raise _no_weights(f"torchvision/{name}", error) from error
    known = {*signature(type(model)).parameters, *signature(models.get_model_builder(name)).parameters}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"it takes no option {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or getattr(model, "aux_logits", False):
        raise SettingsError(
            f"torchvision/{name} has {'a second head' if linear else 'no linear layer'} to take off; use timm/{name}"
        )
    if bare and not isinstance(getattr(model, "classifier", None), nn.Sequential):
        raise SettingsError(f"torchvision/{name} has nothing before its last layer that bare=true could leave out")
    if bare:
        model.classifier = nn.Flatten()
    else:
        model.set_submodule(linear[-1], nn.Identity())
    return model


def _efficientnet_pytorch(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    from efficientnet_pytorch import VALID_MODELS, EfficientNet

    if name not in VALID_MODELS:
        raise SettingsError(f"efficientnet_pytorch has no model {name!r}{did_you_mean(name, VALID_MODELS)}")
    make = EfficientNet.from_pretrained if pretrained else EfficientNet.from_name
    try:
        model = make(name, **options)
    except OSError as error:
        raise _no_weights(f"efficientnet_pytorch/{name}", error) from error
    model._fc = nn.Identity()
    return _padding_inside(model)


def _padding_inside(model: nn.Module) -> nn.Module:
    """The network with each convolution that writes a padded copy of its images, alike on both sides, made one that pads itself.

    Nearly all are of stride 1. They become torch's own class, with the same output and names.
    """
    from efficientnet_pytorch.utils import Conv2dStaticSamePadding

    for module in model.modules():
        if isinstance(module, Conv2dStaticSamePadding):
            left, right, top, bottom = getattr(module.static_padding, "padding", (0, 0, 0, 0))
            if left == right and top == bottom:
                del module.static_padding
                module.padding, module.stride = (top, left), tuple(module.stride)  # its class makes lists of some
                module.__class__ = nn.Conv2d
    return model


def _fivefold(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    from fivefold.models.small import SMALL

    if pretrained:
        raise SettingsError(f"fivefold/{name} has no hub weights; set model.pretrained=false or give model.weights")
    return choose(SMALL, "fivefold backbone", name)(**options)


def _no_weights(name: str, error: Exception) -> RetryableError:
    return RetryableError(
        f"the pretrained weights of {name} cannot be downloaded ({type(error).__name__}); without internet "
        "give a file: model.pretrained=false model.weights=PATH, or its name in SM_CHANNEL_WEIGHTS"
    )


FAMILIES: dict[str, Callable[[str, bool, dict[str, Any]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "efficientnet_pytorch": _efficientnet_pytorch,
    "fivefold": _fivefold,
}

DROP_PATHS = {
    "timm": "drop_path_rate",
    "torchvision": "stochastic_depth_prob",
    "efficientnet_pytorch": "drop_connect_rate",
}
"""What each family calls the share of stochastic depth."""
