"""Noise, holes, distortion, sharpening and the like: uint8 images [3, H, W] to uint8 images [3, h, w].

What torchvision lacks. Positions and counts are drawn from torch's default generator.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Colour = float | Sequence[float]


def gaussian_noise(image: Tensor, mean: Colour, std: Colour) -> Tensor:
    """Normal noise in every value; `mean` and `std` as shares of 255, one number or one a channel."""
    noise = torch.randn(image.shape) * _colour(std) + _colour(mean)
    return _as_uint8(image + noise * 255)


def coarse_dropout(
    image: Tensor, holes: Sequence[int], height: Sequence[int], width: Sequence[int], fill: Colour
) -> Tensor:
    """Boxes of `fill` (0 to 255) in the image (DeVries & Taylor 2017, arXiv 1708.04552).

    Their number and sides in pixels are drawn from ranges, both ends included; a box always lies
    within the image, and is no larger than it.
    """
    rows, columns = image.shape[-2:]
    image = image.clone()
    colour = _colour(fill).to(torch.uint8)
    for _ in range(_draw(holes)):
        h, w = min(_draw(height), rows), min(_draw(width), columns)
        top, left = _draw((0, rows - h)), _draw((0, columns - w))
        image[:, top : top + h, left : left + w] = colour
    return image


def grid_distortion(image: Tensor, steps: int, limit: Sequence[float], fill: Colour) -> Tensor:
    """The image stretched by 1 + d, with another d ~ U(limit) in each of `steps` columns and rows.

    The stretches add up from the top left corner; what would come from outside is `fill` (0 to 255).
    """
    stretches = [1 + torch.empty(steps).uniform_(*limit) for _ in range(2)]
    return stretched(image, *stretches, fill)


def stretched(image: Tensor, rows: Tensor, columns: Tensor, fill: Colour) -> Tensor:
    """The image read faster or slower: pixel x comes from the integral of its columns' factors from 0 to x."""
    height, width = image.shape[-2:]
    y, x = _integral(rows, height), _integral(columns, width)
    grid = torch.stack(torch.meshgrid((2 * y + 1) / height - 1, (2 * x + 1) / width - 1, indexing="ij")[::-1], dim=-1)
    colour = _colour(fill)
    moved = F.grid_sample((image - colour)[None], grid[None], align_corners=False)[0]
    return _as_uint8(moved + colour)


def unsharp_mask(image: Tensor, kernel: int, sigma: float, amount: float, threshold: float) -> Tensor:
    """The image plus `amount` times what a Gaussian blur of `kernel` pixels takes from it.

    With `threshold` (levels of 255) above 0 only where the difference is larger, softly bounded.
    """
    pixels = image.float()
    weights = gaussian(kernel, sigma)
    detail = pixels - blurred(pixels, weights)
    sharp = (pixels + amount * detail).clamp(0, 255)
    if threshold > 0:
        where = blurred((detail.abs() > threshold).float(), weights)
        sharp = where * sharp + (1 - where) * pixels
    return _as_uint8(sharp)


def brightness(image: Tensor, amount: float) -> Tensor:
    """Every value moved by `amount` of 255, the same for each image."""
    return (image.to(torch.int16) + round(amount * 255)).clamp_(0, 255).to(torch.uint8)


def centre_crop_pixels(image: Tensor, height: int, width: int, pad: bool) -> Tensor:
    """The middle `height` x `width` pixels.

    Of an image that is smaller, all there is on that side; with `pad` black borders make up for it.
    """
    rows, columns = image.shape[-2:]
    h, w = min(height, rows), min(width, columns)
    top, left = round((rows - h) / 2), round((columns - w) / 2)
    middle = image[:, top : top + h, left : left + w]
    if not pad or (h, w) == (height, width):
        return middle
    above, before = (height - h) // 2, (width - w) // 2
    return F.pad(middle, (before, width - w - before, above, height - h - above))


def gaussian(kernel: int, sigma: float) -> Tensor:
    """`kernel` weights of a normal density, float, with sum 1."""
    at = torch.arange(kernel) - (kernel - 1) / 2
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    return weights / weights.sum()


def blurred(pixels: Tensor, weights: Tensor) -> Tensor:
    """Float images [3, H, W] blurred by an odd number of weights along both sides, mirrored at the edges.

    As a sum of moved images, which for a few weights takes a fraction of a convolution's time.
    """
    for side in (-2, -1):
        size, reach = pixels.shape[side], len(weights) // 2
        wide = pixels.index_select(side, reflected(torch.arange(-reach, size + reach), size))
        pixels = sum(weight * wide.narrow(side, at, size) for at, weight in enumerate(weights.tolist()))
    return pixels


def reflected(at: Tensor, size: int) -> Tensor:
    """Positions in 0 to size - 1 for any whole positions: mirrored at the ends, which are not repeated."""
    last = max(1, size - 1)
    return (last - (at % (2 * last) - last).abs()).clamp(max=size - 1)


def _integral(factors: Tensor, size: int) -> Tensor:
    """For 0 to size - 1: the integral from 0 of factors that hold for equal parts of the size."""
    at = torch.arange(size, dtype=torch.float32)
    part = size / len(factors)
    start = torch.arange(len(factors)) * part
    return (factors * (at[:, None] - start).clamp(0, part)).sum(dim=1)


def _draw(bounds: Sequence[int]) -> int:
    return int(torch.randint(bounds[0], bounds[1] + 1, ()))


def _colour(value: Colour) -> Tensor:
    """A colour as a float [3, 1, 1], or [1, 1, 1] for one number."""
    return torch.tensor([value] if isinstance(value, int | float) else list(value), dtype=torch.float32)[:, None, None]


def _as_uint8(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255).to(torch.uint8)
