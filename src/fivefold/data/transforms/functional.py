"""Augmentations missing from torchvision: uint8 images [3, H, W] to uint8 images [3, h, w], drawn from torch's default generator.

The annotation of a parameter gives the values that a recipe may set; the default applies otherwise.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

GREY = 127.5


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


def coarse_dropout(
    image: Tensor,
    holes: span(int, 0, 1000) = (8, 8),
    height: Sides = (1, 16),
    width: Sides = (1, 16),
    fill: Colour = 0,
) -> Tensor:
    """Fill random boxes of the image with `fill` (DeVries & Taylor 2017, arXiv 1708.04552).

    The number of boxes and their sides in pixels are drawn from ranges, both ends included; a box is always
    inside the image, and never larger than it.
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
    planes = torch.empty(1, *image.shape).copy_(
        image
    )  # channels first in memory, which makes sampling three times as fast
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
        plane += np.float32(GREY * (1 - factor) + 255 * (light * brightness + channel_cast * cast))
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
