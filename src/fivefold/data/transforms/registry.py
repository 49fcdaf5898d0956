"""Augmentations by name. Each maps a uint8 image [3, H, W] to a uint8 image [3, h, w] without modifying its input.

All random numbers come from torch's default CPU generator, which the dataset seeds for each sample from (seed, epoch, row).
The transforms that most recipes run on every image are implemented here without torchvision (importing it takes as long as
importing torch), and so are those that it lacks; the others are torchvision v2 transforms, imported when a recipe uses one.
The annotation of a parameter gives the values that a recipe may set.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from fivefold.config.schema import Spec
from fivefold.errors import SettingsError
from fivefold.lookup import choose, parse_spec

Transform = Callable[[Tensor], Tensor]
Size = tuple[int, int]
Filter = Literal["bilinear", "bicubic"]
Box = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""


def apply_all(steps: Sequence[Transform], image: Tensor) -> Tensor:
    for step in steps:
        image = step(image)
    return image


def apply_randomly(step: Transform, p: float, image: Tensor) -> Tensor:
    return step(image) if torch.rand(()).item() < p else image


def build_transforms(
    specs: Sequence[Spec], size: Size, evaluation: bool = False, interpolation: Filter = "bilinear"
) -> Transform:
    """Return the composition of `specs`, whose result always has `size` (height, width); images are resized by `interpolation`.

    A spec is a name in TRANSFORMS or PRESETS, or a table with `name` and that transform's parameters; each accepts a
    probability `p`. A plain resize is always the last step, and does nothing at the right size. With `evaluation`, use only
    the deterministic parts of a preset. Raise a SettingsError for an unknown name or parameter, and for a random transform
    in an evaluation.
    """
    steps = [_build(spec, size, interpolation) for spec in expand_presets(specs, evaluation)]
    return partial(apply_all, [*steps, partial(resize, size=size, interpolation=interpolation)])


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


def _build(spec: Spec, size: Size, interpolation: Filter) -> Transform:
    name, parameters = parse_spec(spec, TRANSFORMS | PRESETS, "transform")
    p = parameters.get("p", 1)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise SettingsError(f"transform {name!r}: p={p!r}, but a probability from 0 to 1 is needed")
    if name in RESIZING:
        parameters = {"interpolation": interpolation, **parameters}
    try:
        return TRANSFORMS[name](size=size, **parameters)
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][0]
        raise SettingsError(f"transform {name!r}: {key}={parameters[key]!r} is invalid: {problem['msg']}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"transform {name!r} with {parameters}: {error}") from error


def number(kind: type, minimum: float, maximum: float) -> Any:
    """Return the type of a parameter from `minimum` to `maximum`."""
    return Annotated[kind, Field(ge=minimum, le=maximum)]


def span(kind: type, minimum: float, maximum: float) -> Any:
    """Return the type of a parameter that is a pair of ascending numbers from `minimum` to `maximum`."""
    return Annotated[
        list[number(kind, minimum, maximum)], Field(min_length=2, max_length=2), AfterValidator(_check_ascending)
    ]


def _check_ascending(ends: list[float]) -> list[float]:
    if ends[0] > ends[1]:
        raise ValueError("the first number is larger than the second")
    return ends


def _check_odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("an odd number is needed")
    return kernel


Fraction = number(float, 0, 1)
Side, Sides = number(int, 1, 65535), span(int, 1, 65535)
Level = number(float, 0, 255)
Colour = Level | Annotated[list[Level], Field(min_length=3, max_length=3)]
"""One number for all channels, or one per channel."""


def resize(image: Tensor, size: Size, interpolation: Filter = "bilinear") -> Tensor:
    """Resize the whole image [3, H, W] to `size`, with antialiasing; the aspect ratio is not kept."""
    if tuple(image.shape[-2:]) == size:
        return image
    # Keep channels-last memory: torch does not detect it in image[None], and then takes twice as long.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size=size, mode=interpolation, antialias=True)[0]


def centre_crop(
    image: Tensor, size: Size, share: number(float, 0.01, 1) = 0.875, interpolation: Filter = "bilinear"
) -> Tensor:
    """Crop the middle `share` of both sides after fitting the shorter side to `size`."""
    return _resized_box(image, centre_box(*image.shape[-2:], size, share), size, interpolation)


def centre_box(height: int, width: int, size: Size, share: float) -> Box:
    """Return the box in the middle of an image that `centre_crop` crops."""
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
    interpolation: Filter = "bilinear",
) -> Tensor:
    """Return a crop of `size` from the image resized to `size` and padded by `padding` pixels on each side (`mode` of F.pad)."""
    image = resize(image, size, interpolation)
    top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
    if mode == "constant":
        padded = F.pad(image, (padding,) * 4)
    else:  # F.pad supports these modes only for floats
        padded = F.pad(image[None].float(), (padding,) * 4, mode=mode)[0].to(torch.uint8)
    return padded[:, top : top + size[0], left : left + size[1]]


def random_resized_crop(
    image: Tensor,
    size: Size,
    scale: span(float, 1e-4, 1) = (0.08, 1.0),
    ratio: span(float, 0.01, 100) = (3 / 4, 4 / 3),
    interpolation: Filter = "bilinear",
) -> Tensor:
    """Crop a random box of `scale` of the area and an aspect in `ratio`, and resize it (Szegedy et al. 2015, arXiv 1409.4842)."""
    return _resized_box(image, random_box(*image.shape[-2:], size, scale, ratio), size, interpolation)


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


def _resized_box(image: Tensor, box: Box, size: Size, interpolation: Filter) -> Tensor:
    top, left, height, width = box
    return resize(image[:, top : top + height, left : left + width], size, interpolation)


def coarse_dropout(
    image: Tensor,
    holes: span(int, 0, 1000) = (8, 8),
    height: Sides = (1, 16),
    width: Sides = (1, 16),
    fill: Colour = 0,
) -> Tensor:
    """Fill random boxes of the image with `fill` (DeVries & Taylor 2017, arXiv 1708.04552).

    The number of boxes and their sides in pixels are drawn from ranges, both ends included; a box is inside the image.
    """
    rows, columns = image.shape[-2:]
    image = image.clone()
    colour = _colour(fill).to(torch.uint8)
    for _ in range(_draw(holes)):
        h, w = min(_draw(height), rows), min(_draw(width), columns)
        top, left = _draw((0, rows - h)), _draw((0, columns - w))
        image[:, top : top + h, left : left + w] = colour
    return image


def grid_distortion(
    image: Tensor, steps: number(int, 1, 100) = 5, limit: span(float, -0.99, 10) = (-0.3, 0.3), fill: Colour = 255
) -> Tensor:
    """Stretch the image by 1 + d, with a separate d ~ U(limit) for each of `steps` columns and rows.

    The stretches accumulate from the top left corner; pixels from outside the image are `fill`.
    """
    stretches = [1 + torch.empty(steps).uniform_(*limit) for _ in range(2)]
    return remap_axes(image, *stretches, fill)


def remap_axes(image: Tensor, rows: Tensor, columns: Tensor, fill: Colour) -> Tensor:
    """Resample the image at varying speed: output pixel x comes from the integral of the column factors from 0 to x."""
    height, width = image.shape[-2:]
    y, x = _integral(rows, height), _integral(columns, width)
    grid = torch.stack(torch.meshgrid((2 * y + 1) / height - 1, (2 * x + 1) / width - 1, indexing="ij")[::-1], dim=-1)
    colour = _colour(fill)
    moved = F.grid_sample((image - colour)[None], grid[None], align_corners=False)[0]
    return (moved + colour).round_().clamp_(0, 255).to(torch.uint8)


def unsharp_mask(
    image: Tensor,
    kernel: Annotated[number(int, 1, 99), AfterValidator(_check_odd)] = 7,
    sigma: number(float, 0.01, 100) = 1.5,
    amount: number(float, -100, 100) = 1.5,
    threshold: Level = 0,
) -> Tensor:
    """Add to the image `amount` times its difference from a Gaussian blur of `kernel` pixels.

    With `threshold` (0 to 255) above 0, sharpen only where the difference is larger, with soft borders.
    """
    from scipy.ndimage import gaussian_filter

    blur = {"sigma": sigma, "radius": kernel // 2, "mode": "mirror", "axes": (1, 2)}
    pixels = image.numpy().astype(np.float32)
    detail = pixels - gaussian_filter(pixels, **blur)
    sharp = (pixels + amount * detail).clip(0, 255)
    if threshold > 0:
        weights = gaussian_filter((np.abs(detail) > threshold).astype(np.float32), **blur)
        sharp = weights * sharp + (1 - weights) * pixels
    return _as_image(sharp)


def brightness(image: Tensor, amount: number(float, -1, 1) = 0.0) -> Tensor:
    """Add `amount` × 255 to every value, the same for each image."""
    return (image.to(torch.int16) + round(amount * 255)).clamp_(0, 255).to(torch.uint8)


def centre_crop_pixels(image: Tensor, height: Side = 224, width: Side = 224) -> Tensor:
    """Return the middle `height` × `width` pixels; pad a smaller image with black."""
    from torchvision.transforms.v2.functional import center_crop

    return center_crop(image, [height, width])


def shift_scale_rotate(
    image: Tensor,
    shift: Fraction = 0.0,
    zoom: span(float, 0.1, 10) = (0.9, 1.1),
    degrees: number(float, 0, 180) = 15.0,
    stretch: number(float, 1, 10) = 1.0,
) -> Tensor:
    """Apply a random similarity transform and stretch: one bilinear sampling, mirrored beyond the edges.

    Shift by up to `shift` of each side, enlarge by a factor in `zoom`, rotate by up to `degrees`,
    and stretch the sides relative to each other by up to the factor `stretch` (1: no stretch).
    """
    across, down, size, turn, form = torch.rand(5).tolist()
    step = 1 / (zoom[0] + size * (zoom[1] - zoom[0]))
    wide = stretch ** (form - 0.5)
    angle = math.radians((2 * turn - 1) * degrees)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    moves = np.float32([2 * shift * (2 * across - 1), 2 * shift * (2 * down - 1)])
    (x_of_x, x_of_y), (y_of_x, y_of_y) = np.float32([[cos * wide, -sin / wide], [sin * wide, cos / wide]])
    height, width = image.shape[-2:]
    x = (2 * np.arange(width, dtype=np.float32) + 1) / width - 1
    y = ((2 * np.arange(height, dtype=np.float32) + 1) / height - 1)[:, None]
    ratio = height / width  # a rotation preserves angles in pixels
    grid = np.empty((1, height, width, 2), np.float32)
    grid[0, ..., 0] = x_of_x * x + x_of_y * ratio * y + moves[0]
    grid[0, ..., 1] = y_of_x / ratio * x + y_of_y * y + moves[1]
    # Channels first in memory makes sampling three times as fast.
    planes = torch.empty(1, *image.shape).copy_(image)
    moved = F.grid_sample(planes, torch.from_numpy(grid), padding_mode="reflection", align_corners=False)
    return moved[0].round_().to(torch.uint8)


def linear_colour_jitter(
    image: Tensor,
    brightness: Fraction = 0.1,
    contrast: Fraction = 0.2,
    saturation: Fraction = 0.2,
    cast: Fraction = 0.0,
) -> Tensor:
    """Apply one random linear colour transform to all pixels of the image.

    Contrast (about middle grey) and saturation (about a pixel's mean) are scaled by factors in 1 ± their parameter;
    all channels together shift by up to `brightness` of 255, and each channel by up to `cast`.
    """
    light, factor, colour, *casts = (2 * value - 1 for value in torch.rand(6).tolist())
    factor, colour = 1 + factor * contrast, 1 + colour * saturation
    pixels = np.array(image.numpy(), np.float32, order="C")
    mean = (pixels[0] + pixels[1] + pixels[2]) * np.float32(factor * (1 - colour) / 3)
    pixels *= np.float32(factor * colour)
    pixels += mean
    for plane, channel_cast in zip(pixels, casts, strict=True):
        plane += np.float32(127.5 * (1 - factor) + 255 * (light * brightness + channel_cast * cast))
    return _as_image(pixels)


def _integral(factors: Tensor, size: int) -> Tensor:
    """Return for 0 to size - 1 the integral from 0 of factors that each apply to an equal part of the size."""
    positions = torch.arange(size, dtype=torch.float32)
    part = size / len(factors)
    start = torch.arange(len(factors)) * part
    return (factors * (positions[:, None] - start).clamp(0, part)).sum(dim=1)


def _draw(bounds: Sequence[int]) -> int:
    return int(torch.randint(bounds[0], bounds[1] + 1, ()))


def _colour(value: float | Sequence[float]) -> Tensor:
    """Return a colour as a float [3, 1, 1], or [1, 1, 1] for one number."""
    return torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)


def _as_image(pixels: np.ndarray) -> Tensor:
    """Return float pixels [3, H, W] as a uint8 image."""
    return torch.from_numpy(np.rint(pixels).clip(0, 255).astype(np.uint8))


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

LOCAL = (
    *(resize, centre_crop, horizontal_flip, random_crop, random_resized_crop, centre_crop_pixels, brightness),
    *(unsharp_mask, coarse_dropout, grid_distortion, shift_scale_rotate, linear_colour_jitter),
)
TRANSFORMS: dict[str, Callable[..., Transform]] = {
    **{function.__name__: partial(_local_transform, function) for function in LOCAL},
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

RESIZING = {"resize", "centre_crop", "random_crop", "random_resized_crop"}
"""Transforms that resize by `model.interpolation`, unless they have an `interpolation` of their own."""

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
