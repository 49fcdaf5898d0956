"""Geometry and colour in one step each, for images so small that a chain of single steps costs more than training them.

Each is drawn for one image, from torch's default generator in one draw, and done to many at once: uint8 images
[N, 3, H, W] to the same. Every value is made of sums and products of its own numbers, in one order, so an image
becomes the same bytes alone and among others.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 127.5
Numbers = tuple[float, ...]


def shift_scale_rotate(image: Tensor, shift: float, zoom: Sequence[float], degrees: float, stretch: float) -> Tensor:
    """A random similarity of the image [3, H, W], stretched: one bilinear sampling, mirrored beyond the edges.

    Moves by up to `shift` of each side, enlarges by a factor in `zoom`, turns by up to `degrees`,
    and stretches the sides against each other by up to the factor `stretch` (1: not).
    """
    return sampled(image[None], torch.tensor([drawn_similarity(shift, zoom, degrees, stretch)]))[0]


def drawn_similarity(shift: float, zoom: Sequence[float], degrees: float, stretch: float) -> Numbers:
    """The six numbers of a random similarity: what x, y and 1 count in where a pixel's x comes from, then in its y."""
    across, down, size, turn, form = torch.rand(5).tolist()
    step = 1 / (zoom[0] + size * (zoom[1] - zoom[0]))
    wide = stretch ** (form - 0.5)
    angle = math.radians((2 * turn - 1) * degrees)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    return (
        *(cos * wide, -sin / wide, 2 * shift * (2 * across - 1)),
        *(sin * wide, cos / wide, 2 * shift * (2 * down - 1)),
    )


def sampled(images: Tensor, numbers: Tensor) -> Tensor:
    """Images as `numbers` [N, 6] of `drawn_similarity` move them. The sides of an image are 2 long, whatever its shape."""
    height, width = images.shape[-2:]
    x, y = _positions(height, width)
    from_x, from_y, shift_x, to_x, to_y, shift_y = numbers.float()[:, :, None].unbind(dim=1)
    ratio = height / width  # a turn keeps angles of pixels
    grid = torch.stack(
        [from_x * x + from_y * ratio * y + shift_x, to_x / ratio * x + to_y * y + shift_y],
        dim=-1,
    )
    found = F.grid_sample(
        _planes(images), grid.view(-1, height, width, 2), padding_mode="reflection", align_corners=False
    )
    return found.round_().to(torch.uint8)


def linear_colour_jitter(image: Tensor, brightness: float, contrast: float, saturation: float, cast: float) -> Tensor:
    """A random linear map of the colours of all pixels of the image [3, H, W].

    Contrast (about middle grey) and saturation (about a pixel's mean) get factors in 1 ± their
    number; all channels together move by up to `brightness` of 255, and each by up to `cast`.
    """
    return recoloured(image[None], torch.tensor([drawn_colours(brightness, contrast, saturation, cast)]))[0]


def drawn_colours(brightness: float, contrast: float, saturation: float, cast: float) -> Numbers:
    """The five numbers of a random map of colours: what a colour counts in itself, what the sum of all, what each gets added."""
    light, factor, colour, *casts = (2 * number - 1 for number in torch.rand(6).tolist())
    factor, colour = 1 + factor * contrast, 1 + colour * saturation
    moved = (GREY * (1 - factor) + 255 * (light * brightness + each * cast) for each in casts)
    return factor * colour, factor * (1 - colour) / 3, *moved


def recoloured(images: Tensor, numbers: Tensor) -> Tensor:
    """Images as `numbers` [N, 5] of `drawn_colours` change their colours."""
    itself, of_all, *moved = numbers.float()[:, :, None, None].unbind(dim=1)
    planes = _planes(images)
    colours = planes.unbind(dim=1)
    grey = (colours[0] + colours[1]).add_(colours[2]).mul_(of_all)
    for colour, more in zip(colours, moved, strict=True):
        colour.mul_(itself).add_(grey).add_(more)
    return planes.round_().clamp_(0, 255).to(torch.uint8)


def _planes(images: Tensor) -> Tensor:
    """Floats, colour by colour in memory: sampling and sums over pixels whose colours alternate took three times as long."""
    return torch.empty(images.shape).copy_(images)


@lru_cache(maxsize=8)
def _positions(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x and y of every pixel's centre, -1 to 1 from edge to edge: float [H·W] each."""
    y, x = ((2 * torch.arange(size) + 1) / size - 1 for size in (height, width))
    down, across = torch.meshgrid(y, x, indexing="ij")
    return across.flatten(), down.flatten()
