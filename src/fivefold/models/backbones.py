"""Backbones by `family/name`: images [B, 3, H, W] to pooled features [B, num_features].

Families: `timm/…` and `torchvision/…` (their classifiers), `efficientnet_pytorch/…`, `fivefold/…` (our own small
networks). All begin with random weights; `pretrained.py` finds trained ones.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fivefold.errors import SettingsError
from fivefold.lookup import choose, did_you_mean


def build_backbone(name: str, options: Mapping[str, Any], drop_path: float | None = None) -> nn.Module:
    """Return the backbone `family/name` without its classifier; random weights come from torch's global generator.

    `drop_path`: stochastic depth rate (Huang et al. 2016, arXiv 1603.09382), passed by the family's name for it; None
    keeps the network's default. Raise a SettingsError for an unknown family, name or option, and a RetryableError if the
    hub cannot be reached.
    """
    family, _, rest = name.partition("/")
    if not rest:
        raise SettingsError(f"backbone {name!r} names no family; use one of {', '.join(f'{f}/NAME' for f in FAMILIES)}")
    build = choose(FAMILIES, "family of backbones", family)
    options = dict(options)
    if drop_path is not None:
        options[choose(DROP_PATHS, "family of backbones for drop_path", family)] = drop_path
    try:
        return build(rest, options)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise SettingsError(f"backbone {name!r} with options {options}: {error}") from error


@torch.no_grad()
def count_features(backbone: nn.Module, size: tuple[int, ...]) -> int:
    """Run the backbone on one image of `size` and return its number of features; this also checks the size."""
    was_training = backbone.training
    try:
        features = backbone.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SettingsError(f"the backbone cannot take images of {size[0]}x{size[1]} pixels: {error}") from error
    finally:
        backbone.train(was_training)
    if features.ndim != 2:
        raise SettingsError(f"the backbone returns features of shape {tuple(features.shape)}, not [B, F]")
    return int(features.shape[1])


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise SettingsError(f"timm has no model {name!r}{did_you_mean(name.split('.')[0], timm.list_models())}")
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    """Return the network without its last linear layer; with the option `bare`, without anything after the pooling."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise SettingsError(f"torchvision has no classifier {name!r}{did_you_mean(name, known)}")
    bare = options.pop("bare", False)
    model = models.get_model(name, weights=None, **options)
    known = {*signature(type(model)).parameters, *signature(models.get_model_builder(name)).parameters}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or getattr(model, "aux_logits", False):
        raise SettingsError(
            f"torchvision/{name} has {'a second head' if linear else 'no linear layer'} to remove; use timm/{name}"
        )
    if bare and not isinstance(getattr(model, "classifier", None), nn.Sequential):
        raise SettingsError(f"torchvision/{name} has nothing before its last layer that bare=true could remove")
    if bare:
        model.classifier = nn.Flatten()
    else:
        model.set_submodule(linear[-1], nn.Identity())
    return model


def _efficientnet_pytorch(name: str, options: dict[str, Any]) -> nn.Module:
    from efficientnet_pytorch import VALID_MODELS, EfficientNet

    choose(dict.fromkeys(VALID_MODELS), "efficientnet_pytorch model", name)
    model = EfficientNet.from_name(name, **options)
    model._fc = nn.Identity()
    return _use_builtin_padding(model)


def _use_builtin_padding(model: nn.Module) -> nn.Module:
    """Replace convolutions that copy their images to pad them equally on both sides by nn.Conv2d, which pads by itself."""
    from efficientnet_pytorch.utils import Conv2dStaticSamePadding

    for module in model.modules():
        if isinstance(module, Conv2dStaticSamePadding):
            left, right, top, bottom = getattr(module.static_padding, "padding", (0, 0, 0, 0))
            if left == right and top == bottom:
                del module.static_padding
                module.padding, module.stride = (top, left), tuple(module.stride)  # some strides are lists
                module.__class__ = nn.Conv2d
    return model


def _fivefold(name: str, options: dict[str, Any]) -> nn.Module:
    return choose(SMALL, "fivefold backbone", name)(**options)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class SmallNet(nn.Module):
    """Images [B, 3, H, W] to features [B, num_features]: a 2x2 stem, then blocks that halve the image.

    Each item of `widths` is a block: a 3x3 convolution, a 2x2 max-pool, BatchNorm and an activation, then a second 3x3
    convolution, BatchNorm and activation (`gelu`, or `relu`, which is faster). An image of 2^n pixels allows at most n - 1
    blocks. All convolutions are dense, because grouped ones are slow in bf16 on CPUs. The design follows Jordan 2024
    (arXiv 2404.00498), including the Dirac initialisation (section 3.3): a convolution initially passes its input through.
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 256), stem: int = 32, activation: str = "gelu") -> None:
        super().__init__()
        activation_class = choose(ACTIVATIONS, "activation", activation)
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 2, bias=False), nn.BatchNorm2d(stem), activation_class())
        channels = [stem, *widths]
        self.blocks = nn.Sequential(*(_block(a, b, activation_class) for a, b in pairwise(channels)))
        self.num_features = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images)).amax(dim=(2, 3))


def _block(inputs: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        _init_identity(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs),
        activation(),
        _init_identity(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)),
        nn.BatchNorm2d(outputs),
        activation(),
    )


@torch.no_grad()
def _init_identity(convolution: nn.Conv2d) -> nn.Conv2d:
    """Initialise the first `in_channels` filters as the identity; the others keep their random initialisation."""
    nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return convolution


def baseline_cnn(dropout: float = 0.25) -> nn.Module:
    """Images [B, 3, H, W] to features [B, 128]: a 7x7 and two 3x3 convolutions, then the mean over the image.

    A 2x2 max-pool and dropout follow the second and the third. It is the baseline of the recipe `mask_profile`.
    """
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 7), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        *(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


SMALL: dict[str, Callable[..., nn.Module]] = {"small_net": SmallNet, "base_model": baseline_cnn}
"""Our own small networks, for example for images of 8 to 96 pixels, which ImageNet networks downsample too much."""

FAMILIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
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
"""The option of each family for the stochastic depth rate."""
