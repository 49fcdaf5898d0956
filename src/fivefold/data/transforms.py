"""Augmentations by name. Each maps a uint8 image [3, H, W] to a uint8 image [3, h, w], and leaves the given one as it is.

All randomness comes from torch's default CPU generator, which the dataset seeds for each sample
from (seed, epoch, row). The four that run on every image of nearly every recipe are written here,
on uint8 and without torchvision (whose import costs as much as torch's own); what torchvision lacks
is in `effects.py`; the others are torchvision's v2 transforms, imported when a recipe names one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from fivefold.choose import choose
from fivefold.data import effects
from fivefold.data.effects import Share, number, span
from fivefold.errors import SettingsError
from fivefold.recipe import Spec

Transform = Callable[[Tensor], Tensor]
Size = tuple[int, int]
Box = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""


@dataclass(frozen=True)
class Composed:
    """Transforms one after the other; loader workers that are spawned can be handed it."""

    steps: tuple[Transform, ...]

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


@dataclass(frozen=True)
class Sometimes:
    """A transform that is applied with probability `p`."""

    step: Transform
    p: float

    def __call__(self, image: Tensor) -> Tensor:
        return self.step(image) if torch.rand(()).item() < self.p else image


def build_transforms(specs: Sequence[Spec], size: Size, evaluation: bool = False) -> Transform:
    """The composition of `specs`, whose result always has `size` (height, width).

    A spec is a name of TRANSFORMS or SETS, or a table with `name` and that transform's parameters;
    each takes a probability `p`. Where none of them resizes, a plain resize comes last. In an
    `evaluation` a set gives its fixed parts alone. Raises SettingsError for an unknown name or
    parameter, and for a transform of an evaluation that draws at random.
    """
    return Composed((*(_build(spec, size) for spec in expanded(specs, evaluation)), partial(resize, size=size)))


def expanded(specs: Sequence[Spec], evaluation: bool) -> list[Spec]:
    """The specs with every named set replaced by its parts, in an evaluation by its fixed parts."""
    found: list[Spec] = []
    for spec in specs:
        name, parameters = _taken_apart(spec)
        if name in SETS and parameters:
            raise SettingsError(f"{name} is a set of transforms and takes no parameters; name its parts instead")
        if name not in SETS and evaluation and not _is_fixed(name, parameters):
            raise SettingsError(
                f"augment.eval: {name!r} draws at random, so that no two predictions would agree; "
                f"an evaluation may have {', '.join(sorted(FIXED))}"
            )
        parts = SETS.get(name, (spec,))
        found += [part for part in parts if not evaluation or _is_fixed(*_taken_apart(part))]
    return found


def _is_fixed(name: str, parameters: dict[str, Any]) -> bool:
    choose(TRANSFORMS | SETS, "transform", name)
    return name in FIXED and parameters.get("p", 1) == 1


def _taken_apart(spec: Spec) -> tuple[str, dict[str, Any]]:
    parameters = {"name": spec} if isinstance(spec, str) else dict(spec)
    return str(parameters.pop("name", "")), parameters


def _build(spec: Spec, size: Size) -> Transform:
    name, parameters = _taken_apart(spec)
    make = choose(TRANSFORMS | SETS, "transform", name)
    p = parameters.get("p", 1)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise SettingsError(f"transform {name!r}: p={p!r}, but a probability from 0 to 1 is needed")
    try:
        return make(size=size, **parameters)
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][0]
        raise SettingsError(f"transform {name!r}: {key}={parameters[key]!r} cannot be: {problem['msg']}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"transform {name!r} with {parameters}: {error}") from error


def resize(image: Tensor, size: Size) -> Tensor:
    """The whole image [3, H, W] at `size`, bilinear with antialiasing; the aspect ratio is not kept."""
    if tuple(image.shape[-2:]) == size:
        return image
    # As a batch of rows of colours where it is one: of image[None] torch sees no channels-last memory, and takes twice as long.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]


def centre_crop_resize(image: Tensor, size: Size, share: number(float, 0.01, 1) = 0.875) -> Tensor:
    """The middle `share` of both sides after the shorter side was fitted to `size`."""
    return _resized_box(image, centre_box(*image.shape[-2:], size, share), size)


def centre_box(height: int, width: int, size: Size, share: float) -> Box:
    """The box in the middle of an image that `centre_crop_resize` shows."""
    scale = min(height / size[0], width / size[1]) * share
    box = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return (height - box[0]) // 2, (width - box[1]) // 2, *box


def horizontal_flip(image: Tensor, p: Share = 0.5) -> Tensor:
    """Mirrors left and right with probability `p`."""
    return image.flip(-1) if torch.rand(()).item() < p else image


def random_crop(
    image: Tensor,
    size: Size,
    padding: number(int, 0, 4096) = 4,
    mode: Literal["constant", "reflect", "replicate", "circular"] = "reflect",
) -> Tensor:
    """A crop of `size` from the image at `size` with `padding` pixels on each side (`mode` of F.pad)."""
    image = resize(image, size)
    top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
    if mode == "constant":
        padded = F.pad(image, (padding,) * 4)
    else:  # F.pad reflects floats alone
        padded = F.pad(image[None].float(), (padding,) * 4, mode=mode)[0].to(torch.uint8)
    return padded[:, top : top + size[0], left : left + size[1]]


def random_resized_crop(
    image: Tensor, size: Size, scale: span(float, 1e-4, 1) = (0.08, 1.0), ratio: span(float, 0.01, 100) = (3 / 4, 4 / 3)
) -> Tensor:
    """A random box of `scale` of the area and an aspect in `ratio`, resized (Szegedy et al. 2015, arXiv 1409.4842)."""
    return _resized_box(image, random_box(*image.shape[-2:], size, scale, ratio), size)


def random_box(height: int, width: int, size: Size, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """The box of an image that `random_resized_crop` shows; where ten draws do not fit, the largest in the middle."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # one draw of four numbers below 1: four draws of one took four times as long
        of_scale, of_ratio, down, across = torch.rand(4).tolist()
        area = height * width * (scale[0] + of_scale * (scale[1] - scale[0]))
        aspect = math.exp(low + of_ratio * (high - low))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(across * (width - w + 1)), h, w
    return centre_box(height, width, size, share=1.0)


def _resized_box(image: Tensor, box: Box, size: Size) -> Tensor:
    top, left, height, width = box
    return resize(image[:, top : top + height, left : left + width], size)


def _own(function: Callable[..., Tensor]) -> Callable[..., Transform]:
    """A builder for a function of images, whose annotations say what its parameters may be; a `p` that it lacks is added."""

    def make(size: Size, **parameters: Any) -> Transform:
        fields = {name: (each.annotation, each.default) for name, each in signature(function).parameters.items()}
        sized = {"size": size} if fields.pop("size", None) else {}
        del fields["image"]
        p = None if "p" in fields else parameters.pop("p", None)
        for key in parameters:
            choose(fields, f"parameter of transform {function.__name__}:", key)
        kind = create_model(function.__name__, __config__=ConfigDict(strict=True), **fields)
        return _with_probability(partial(function, **sized, **dict(kind(**parameters))), p)

    return make


def _v2(name: str, **defaults: Any) -> Callable[..., Transform]:
    """A builder for the transform `name` of torchvision.transforms.v2; `interpolation` by name, `p` added if it lacks one.

    It is tried on a black image, since not all of them check what they are given before they see one.
    """

    def make(size: Size, **parameters: Any) -> Transform:
        from torchvision.transforms import v2

        if parameters.get("inplace"):
            raise ValueError("inplace=true would change the image that other epochs see too; leave it out")
        kind = getattr(v2, name)
        p = None if "p" in signature(kind).parameters else parameters.pop("p", None)
        if "interpolation" in parameters:
            parameters["interpolation"] = v2.InterpolationMode(parameters["interpolation"])
        step = kind(**{**defaults, **parameters})
        with torch.random.fork_rng(devices=[]):
            step(torch.zeros(3, *size, dtype=torch.uint8))
        return _with_probability(step, p)

    return make


def _with_probability(step: Transform, p: float | None) -> Transform:
    return step if p is None or p == 1 else Sometimes(step, p)


NORMAL_NOISE = {"name": "gaussian_noise", "sigma": 0.243}
"""Noise of standard deviation 1 after the mask system's normalisation, in the mean of its channels."""

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "resize": _own(resize),
    "centre_crop": _own(centre_crop_resize),
    "horizontal_flip": _own(horizontal_flip),
    "random_crop": _own(random_crop),
    "random_resized_crop": _own(random_resized_crop),
    "centre_crop_pixels": _own(effects.centre_crop_pixels),
    "brightness": _own(effects.brightness),
    "unsharp_mask": _own(effects.unsharp_mask),
    "coarse_dropout": _own(effects.coarse_dropout),
    "grid_distortion": _own(effects.grid_distortion),
    "shift_scale_rotate": _own(effects.shift_scale_rotate),
    "linear_colour_jitter": _own(effects.linear_colour_jitter),
    "gaussian_noise": _v2("GaussianNoise"),
    "vertical_flip": _v2("RandomVerticalFlip"),
    "rotation": _v2("RandomRotation", degrees=15),
    "affine": _v2("RandomAffine", degrees=0),
    "perspective": _v2("RandomPerspective", distortion_scale=0.2),
    "color_jitter": _v2("ColorJitter"),
    "grayscale": _v2("RandomGrayscale"),
    "gaussian_blur": _v2("GaussianBlur", kernel_size=5),
    "trivial_augment": _v2("TrivialAugmentWide"),
    "rand_augment": _v2("RandAugment"),
    "auto_contrast": _v2("RandomAutocontrast"),
    "random_erasing": _v2("RandomErasing"),
}

FIXED = {"resize", "centre_crop", "centre_crop_pixels", "brightness", "unsharp_mask"}
"""Transforms that draw nothing, or nothing at p = 1: what an evaluation may have."""

SETS: dict[str, tuple[Spec, ...]] = {
    "BaseAugmentation": ("resize",),
    "AddGaussianNoise": ("resize", NORMAL_NOISE),
    "CustomAugmentation": (
        {"name": "centre_crop_pixels", "height": 320, "width": 256},
        "resize",
        {"name": "color_jitter", "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.1},
        NORMAL_NOISE,
    ),
    "bestAugmentation": (
        {"name": "centre_crop_pixels", "height": 380, "width": 380},
        "resize",
        {"name": "color_jitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2},
        "horizontal_flip",
    ),
}
"""The mask system's augmentations under their own names; the normalisation is `model.mean` and `model.std`."""
