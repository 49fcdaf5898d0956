"""Augmentations by name. Each maps a uint8 image [3, H, W] to a uint8 image [3, h, w] without modifying its input.

All random numbers come from torch's default CPU generator, which the dataset seeds for each sample
from (seed, epoch, row). The four that most recipes run on every image are implemented here, on
uint8 and without torchvision (importing it takes as long as importing torch). `functional.py` has those
that torchvision lacks; the others are torchvision v2 transforms, imported when a recipe uses one.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from fivefold.config.schema import Spec
from fivefold.data.transforms import functional
from fivefold.data.transforms.functional import Fraction, number, span
from fivefold.errors import SettingsError
from fivefold.lookup import choose, parse_spec

Transform = Callable[[Tensor], Tensor]
Size = tuple[int, int]
Box = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""


def apply_all(steps: Sequence[Transform], image: Tensor) -> Tensor:
    """Apply the transforms in sequence."""
    for step in steps:
        image = step(image)
    return image


def apply_randomly(step: Transform, p: float, image: Tensor) -> Tensor:
    """Apply the transform with probability `p`."""
    return step(image) if torch.rand(()).item() < p else image


def build_transforms(specs: Sequence[Spec], size: Size, evaluation: bool = False) -> Transform:
    """Return the composition of `specs`, whose result always has `size` (height, width).

    A spec is a name in TRANSFORMS or PRESETS, or a table with `name` and that transform's parameters; each accepts a
    probability `p`. A plain resize is always the last step, and does nothing at the right size. With `evaluation`, use only
    the deterministic parts of a preset. Raise a SettingsError for an unknown name or parameter, and for a random transform
    in an evaluation.
    """
    steps = [_build(spec, size) for spec in expand_presets(specs, evaluation)]
    return partial(apply_all, [*steps, partial(resize, size=size)])


def expand_presets(specs: Sequence[Spec], evaluation: bool) -> list[Spec]:
    """Return the specs with every preset replaced by its parts, in an evaluation by its deterministic parts."""
    result: list[Spec] = []
    for spec in specs:
        name, parameters = parse_spec(spec, TRANSFORMS | PRESETS, "transform")
        if name in PRESETS and parameters:
            raise SettingsError(f"{name} is a set of transforms and takes no parameters; name its parts instead")
        if evaluation and name not in PRESETS and not _is_deterministic(spec):
            raise SettingsError(
                f"augment.eval: {name!r} is random, so predictions would not be reproducible; "
                f"an evaluation may use {', '.join(sorted(DETERMINISTIC))}"
            )
        result += [part for part in PRESETS.get(name, (spec,)) if not evaluation or _is_deterministic(part)]
    return result


def _is_deterministic(spec: Spec) -> bool:
    name, parameters = parse_spec(spec, TRANSFORMS | PRESETS, "transform")
    return name in DETERMINISTIC and parameters.get("p", 1) == 1


def _build(spec: Spec, size: Size) -> Transform:
    name, parameters = parse_spec(spec, TRANSFORMS | PRESETS, "transform")
    p = parameters.get("p", 1)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise SettingsError(f"transform {name!r}: p={p!r}, but a probability from 0 to 1 is needed")
    try:
        return TRANSFORMS[name](size=size, **parameters)
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][0]
        raise SettingsError(f"transform {name!r}: {key}={parameters[key]!r} is invalid: {problem['msg']}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"transform {name!r} with {parameters}: {error}") from error


def resize(image: Tensor, size: Size) -> Tensor:
    """Resize the whole image [3, H, W] to `size`, bilinear with antialiasing; the aspect ratio is not kept."""
    if tuple(image.shape[-2:]) == size:
        return image
    # Keep channels-last memory: torch does not detect it in image[None], and then takes twice as long.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]


def centre_crop_resize(image: Tensor, size: Size, share: number(float, 0.01, 1) = 0.875) -> Tensor:
    """Crop the middle `share` of both sides after fitting the shorter side to `size`."""
    return _resized_box(image, centre_box(*image.shape[-2:], size, share), size)


def centre_box(height: int, width: int, size: Size, share: float) -> Box:
    """Return the box in the middle of an image that `centre_crop_resize` crops."""
    scale = min(height / size[0], width / size[1]) * share
    box = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return (height - box[0]) // 2, (width - box[1]) // 2, *box


def horizontal_flip(image: Tensor, p: Fraction = 0.5) -> Tensor:
    """Mirror left and right with probability `p`."""
    return image.flip(-1) if torch.rand(()).item() < p else image


def random_crop(
    image: Tensor,
    size: Size,
    padding: number(int, 0, 4096) = 4,
    mode: Literal["constant", "reflect", "replicate", "circular"] = "reflect",
) -> Tensor:
    """Return a crop of `size` from the image resized to `size` and padded by `padding` pixels on each side (`mode` of F.pad)."""
    image = resize(image, size)
    top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
    if mode == "constant":
        padded = F.pad(image, (padding,) * 4)
    else:  # F.pad supports these modes only for floats
        padded = F.pad(image[None].float(), (padding,) * 4, mode=mode)[0].to(torch.uint8)
    return padded[:, top : top + size[0], left : left + size[1]]


def random_resized_crop(
    image: Tensor, size: Size, scale: span(float, 1e-4, 1) = (0.08, 1.0), ratio: span(float, 0.01, 100) = (3 / 4, 4 / 3)
) -> Tensor:
    """Crop a random box of `scale` of the area and an aspect in `ratio`, and resize it (Szegedy et al. 2015, arXiv 1409.4842)."""
    return _resized_box(image, random_box(*image.shape[-2:], size, scale, ratio), size)


def random_box(height: int, width: int, size: Size, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """Return the box that `random_resized_crop` crops; if ten draws do not fit, the largest box in the middle."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # one draw of four numbers takes a quarter of the time of four draws
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


def _local_transform(function: Callable[..., Tensor], /, *, size: Size, **parameters: Any) -> Transform:
    """Return an image function with its parameters, validated by its annotations; `p` is added if it has none."""
    fields = {
        name: (parameter.annotation, parameter.default) for name, parameter in signature(function).parameters.items()
    }
    sized = {"size": size} if fields.pop("size", None) else {}
    del fields["image"]
    p = None if "p" in fields else parameters.pop("p", None)
    for key in parameters:
        choose(fields, f"parameter of transform {function.__name__}:", key)
    kind = create_model(function.__name__, __config__=ConfigDict(strict=True), **fields)
    return _with_probability(partial(function, **sized, **dict(kind(**parameters))), p)


def _torchvision_transform(name: str, /, *, size: Size, **parameters: Any) -> Transform:
    """Return the transform `name` of torchvision.transforms.v2; `interpolation` by name, `p` added if it has none.

    Try the transform on a black image, because some transforms validate parameters only when they run.
    """
    from torchvision.transforms import v2

    if parameters.get("inplace"):
        raise ValueError("inplace=true would modify the image that other epochs use too; remove it")
    transform_class = getattr(v2, name)
    p = None if "p" in signature(transform_class).parameters else parameters.pop("p", None)
    if "interpolation" in parameters:
        parameters["interpolation"] = v2.InterpolationMode(parameters["interpolation"])
    step = transform_class(**parameters)
    with torch.random.fork_rng(devices=[]):
        step(torch.zeros(3, *size, dtype=torch.uint8))
    return _with_probability(step, p)


def _with_probability(step: Transform, p: float | None) -> Transform:
    return step if p is None or p == 1 else partial(apply_randomly, step, p)


NORMAL_NOISE = {"name": "gaussian_noise", "sigma": 0.243}
"""Noise with standard deviation 1 after the mask system's normalisation, averaged over the channels."""

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "resize": partial(_local_transform, resize),
    "centre_crop": partial(_local_transform, centre_crop_resize),
    "horizontal_flip": partial(_local_transform, horizontal_flip),
    "random_crop": partial(_local_transform, random_crop),
    "random_resized_crop": partial(_local_transform, random_resized_crop),
    "centre_crop_pixels": partial(_local_transform, functional.centre_crop_pixels),
    "brightness": partial(_local_transform, functional.brightness),
    "unsharp_mask": partial(_local_transform, functional.unsharp_mask),
    "coarse_dropout": partial(_local_transform, functional.coarse_dropout),
    "grid_distortion": partial(_local_transform, functional.grid_distortion),
    "shift_scale_rotate": partial(_local_transform, functional.shift_scale_rotate),
    "linear_colour_jitter": partial(_local_transform, functional.linear_colour_jitter),
    "gaussian_noise": partial(_torchvision_transform, "GaussianNoise"),
    "vertical_flip": partial(_torchvision_transform, "RandomVerticalFlip"),
    "rotation": partial(_torchvision_transform, "RandomRotation", degrees=15),
    "affine": partial(_torchvision_transform, "RandomAffine", degrees=0),
    "perspective": partial(_torchvision_transform, "RandomPerspective", distortion_scale=0.2),
    "color_jitter": partial(_torchvision_transform, "ColorJitter"),
    "grayscale": partial(_torchvision_transform, "RandomGrayscale"),
    "gaussian_blur": partial(_torchvision_transform, "GaussianBlur", kernel_size=5),
    "trivial_augment": partial(_torchvision_transform, "TrivialAugmentWide"),
    "rand_augment": partial(_torchvision_transform, "RandAugment"),
    "auto_contrast": partial(_torchvision_transform, "RandomAutocontrast"),
    "random_erasing": partial(_torchvision_transform, "RandomErasing"),
}

DETERMINISTIC = {"resize", "centre_crop", "centre_crop_pixels", "brightness", "unsharp_mask"}
"""Deterministic transforms (at p = 1), which an evaluation may use."""

PRESETS: dict[str, tuple[Spec, ...]] = {
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
"""The mask system's augmentations under their original names; `model.mean` and `model.std` set the normalisation."""
