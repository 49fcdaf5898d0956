"""Augmentations by name. Each maps a uint8 image [3, H, W] to a uint8 image [3, h, w].

All randomness comes from torch's default CPU generator, which the dataset seeds for each sample
from (seed, epoch, row). The four that run on every image of nearly every recipe are written here,
on uint8 and without torchvision (whose import costs as much as torch's own); the others are
torchvision's v2 transforms, imported when a recipe names one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.choose import choose
from fivefold.errors import SettingsError

Transform = Callable[[Tensor], Tensor]
Size = tuple[int, int]


@dataclass(frozen=True)
class Composed:
    """Transforms one after the other; loader workers that are spawned can be handed it."""

    steps: tuple[Transform, ...]

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


def build_transforms(specs: Sequence[str | dict[str, Any]], size: Size) -> Transform:
    """The composition of `specs`, whose result always has `size` (height, width).

    A spec is a name, or a table with `name` and that transform's parameters. Where none of them
    resizes, a plain resize comes last. Raises SettingsError for an unknown name or parameter.
    """
    steps = [_build(spec, size) for spec in specs] + [partial(resize, size=size)]

    return Composed(tuple(steps))


def _build(spec: str | dict[str, Any], size: Size) -> Transform:
    parameters = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(parameters.pop("name", ""))
    make = choose(TRANSFORMS, "transform", name)
    try:
        return make(size=size, **parameters)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"transform {name!r} with {parameters}: {error}") from error


def resize(image: Tensor, size: Size) -> Tensor:
    """The whole image [3, H, W] at `size`, bilinear with antialiasing; the aspect ratio is not kept."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def centre_crop_resize(image: Tensor, size: Size, share: float) -> Tensor:
    """The middle `share` of both sides after the shorter side was fitted to `size`."""
    height, width = image.shape[-2:]
    scale = min(height / size[0], width / size[1]) * share
    box = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    top, left = (height - box[0]) // 2, (width - box[1]) // 2
    return resize(image[:, top : top + box[0], left : left + box[1]], size)


def horizontal_flip(image: Tensor, p: float) -> Tensor:
    """Mirrors left and right with probability `p`."""
    return image.flip(-1) if torch.rand(()) < p else image


def random_crop(image: Tensor, size: Size, padding: int, mode: str) -> Tensor:
    """A crop of `size` from the image at `size` with `padding` pixels on each side (`mode` of F.pad)."""
    image = resize(image, size)
    top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
    if mode == "constant":
        padded = F.pad(image, (padding,) * 4)
    else:  # F.pad reflects floats alone
        padded = F.pad(image[None].float(), (padding,) * 4, mode=mode)[0].to(torch.uint8)
    return padded[:, top : top + size[0], left : left + size[1]]


def random_resized_crop(image: Tensor, size: Size, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """A random box of `scale` of the area and an aspect in `ratio`, resized (Szegedy et al. 2015, arXiv 1409.4842)."""
    height, width = image.shape[-2:]
    for _ in range(10):
        area = height * width * float(torch.empty(()).uniform_(scale[0], scale[1]))
        aspect = math.exp(float(torch.empty(()).uniform_(math.log(ratio[0]), math.log(ratio[1]))))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top = int(torch.randint(0, height - h + 1, ()))
            left = int(torch.randint(0, width - w + 1, ()))
            return resize(image[:, top : top + h, left : left + w], size)
    return centre_crop_resize(image, size, share=1.0)


def _own(function: Callable[..., Tensor], takes_size: bool = True, **defaults: Any) -> Callable[..., Transform]:
    """A builder for one of the functions above, with its parameters' defaults."""

    def make(size: Size, **parameters: Any) -> Transform:
        unknown = sorted(parameters.keys() - defaults.keys())
        if unknown:
            raise SettingsError(f"{function.__name__} has no parameter {unknown[0]!r}; it takes {sorted(defaults)}")
        sized = {"size": size} if takes_size else {}
        return partial(function, **sized, **{**defaults, **parameters})

    return make


def _v2(name: str, **defaults: Any) -> Callable[..., Transform]:
    """A builder for the transform `name` of torchvision.transforms.v2, which takes its parameters."""

    def make(size: Size, **parameters: Any) -> Transform:
        from torchvision.transforms import v2

        return getattr(v2, name)(**{**defaults, **parameters})

    return make


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "resize": _own(resize),
    "centre_crop": _own(centre_crop_resize, share=0.875),
    "horizontal_flip": _own(horizontal_flip, takes_size=False, p=0.5),
    "random_crop": _own(random_crop, padding=4, mode="reflect"),
    "random_resized_crop": _own(random_resized_crop, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
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
