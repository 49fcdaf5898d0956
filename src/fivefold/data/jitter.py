"""Geometry and colour in one step each, for images so small that a chain of single steps costs more than training them.

uint8 images [3, H, W] to the same; all numbers come from one draw of torch's default generator.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 127.5


def shift_scale_rotate(image: Tensor, shift: float, zoom: Sequence[float], degrees: float, stretch: float) -> Tensor:
    """A random similarity of the image, stretched: one bilinear sampling, mirrored beyond the edges.

    Moves by up to `shift` of each side, enlarges by a factor in `zoom`, turns by up to `degrees`,
    and stretches the sides against each other by up to the factor `stretch` (1: not).
    """
    across, down, size, turn, form = torch.rand(5).tolist()
    step = 1 / (zoom[0] + size * (zoom[1] - zoom[0]))
    wide = stretch ** (form - 0.5)
    angle = math.radians((2 * turn - 1) * degrees)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    height, width = image.shape[-2:]
    ratio = height / width
    grid = _positions(height, width) @ torch.tensor(
        [
            [cos * wide, sin * wide / ratio],
            [-sin * ratio / wide, cos / wide],
            [2 * shift * (2 * across - 1), 2 * shift * (2 * down - 1)],
        ]
    )
    sampled = F.grid_sample(
        image[None].float(), grid.view(1, height, width, 2), padding_mode="reflection", align_corners=False
    )
    return sampled[0].round_().to(torch.uint8)


def linear_colour_jitter(image: Tensor, brightness: float, contrast: float, saturation: float, cast: float) -> Tensor:
    """A random linear map of the colours of all pixels.

    Contrast (about middle grey) and saturation (about a pixel's mean) get factors in 1 ± their
    number; all channels together move by up to `brightness` of 255, and each by up to `cast`.
    """
    light, factor, colour, *casts = (2 * torch.rand(6) - 1).tolist()
    factor, colour = 1 + factor * contrast, 1 + colour * saturation
    mixing = torch.full((3, 3), factor * (1 - colour) / 3)
    mixing.diagonal().add_(factor * colour)
    moved = [GREY * (1 - factor) + 255 * (light * brightness + each * cast) for each in casts]
    pixels = torch.addmm(torch.tensor(moved)[:, None], mixing, image.flatten(1).float())
    return pixels.round_().clamp_(0, 255).to(torch.uint8).view_as(image)


@lru_cache(maxsize=8)
def _positions(height: int, width: int) -> Tensor:
    """(x, y, 1) of every pixel's centre, -1 to 1 from edge to edge: float [H·W, 3]."""
    y, x = ((2 * torch.arange(size) + 1) / size - 1 for size in (height, width))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
    return torch.cat([grid, torch.ones(len(grid), 1)], dim=1)
