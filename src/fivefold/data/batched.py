"""Chains of transforms that work on a whole batch at once: for small images the calls cost more than the pixels.

What is random is drawn for each sample, in the order in which the chain draws it for one image, so a sample looks the
same bytes alone and in a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fivefold.data.geometry import padded
from fivefold.data.jitter import (
    Numbers,
    drawn_colours,
    drawn_similarity,
    linear_colour_jitter,
    recoloured,
    sampled,
    shift_scale_rotate,
)
from fivefold.data.transforms import (
    Composed,
    Size,
    Sometimes,
    Transform,
    horizontal_flip,
    random_corner,
    random_crop,
    resize,
)


class Work(Protocol):
    """What a step does to images [N, 3, H, W], uint8, by its numbers [N, K] float64, one row an image."""

    def __call__(self, images: Tensor, numbers: Tensor, **parameters: Any) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """A transform in two: `draw` gives the numbers of one image, `work` does it to many. `p`: how probable it is; None: certain."""

    draw: Callable[..., Numbers]
    work: Work
    parameters: dict[str, Any]
    p: float | None

    def drawn(self) -> Numbers | None:
        """The numbers of one image; None where the step leaves it out."""
        if self.p is not None and torch.rand(()).item() >= self.p:
            return None
        return self.draw(**self.parameters)

    def done(self, images: Tensor, drawn: Sequence[Numbers | None]) -> Tensor:
        rows = [row for row, numbers in enumerate(drawn) if numbers is not None]
        if not rows:
            return images
        numbers = torch.tensor([drawn[row] for row in rows], dtype=torch.float64).view(len(rows), -1)
        if len(rows) == len(images):
            return self.work(images, numbers, **self.parameters)
        images[rows] = self.work(images[rows], numbers, **self.parameters)
        return images


@dataclass(frozen=True)
class Together:
    """Steps that all work on images of one `size` (height, width)."""

    steps: tuple[Step, ...]
    size: Size

    def drawn(self) -> list[Numbers | None]:
        """The numbers of one sample, of all steps in their order, from torch's default generator."""
        return [step.drawn() for step in self.steps]

    def fitted(self, image: Tensor) -> Tensor:
        """An image [3, H, W] as the first step takes it."""
        return resize(image, self.size)

    def done(self, images: Tensor, drawn: Sequence[list[Numbers | None]]) -> Tensor:
        """Fitted images [N, 3, height, width] after all steps; the given ones may be written to."""
        for step, numbers in zip(self.steps, zip(*drawn, strict=True), strict=True):
            images = step.done(images, numbers)
        return images


def together(transform: Transform) -> Together | None:
    """The chain in this form; None where it has a step that is not in TOGETHER, or does not begin with the size it ends with."""
    if not isinstance(transform, Composed):
        return None
    steps = []
    for step in transform.steps:
        chosen, p = (step.step, step.p) if isinstance(step, Sometimes) else (step, None)
        if not isinstance(chosen, partial) or chosen.func not in TOGETHER:
            return None
        steps.append(Step(*TOGETHER[chosen.func], chosen.keywords, p))
    first = transform.steps[0]
    fits = isinstance(first, partial) and first.func in FITTING
    return Together(tuple(steps), first.keywords["size"]) if fits else None


def _no_numbers(**_: Any) -> Numbers:
    return ()


def _as_it_is(images: Tensor, numbers: Tensor, size: Size) -> Tensor:
    return images


def _drawn_flip(p: float) -> Numbers:
    return (float(torch.rand(()).item() < p),)


def _flipped(images: Tensor, numbers: Tensor, p: float) -> Tensor:
    rows = numbers[:, 0].bool()
    images[rows] = images[rows].flip(-1)
    return images


def _drawn_corner(size: Size, padding: int, mode: str) -> Numbers:
    return random_corner(padding)


def _cropped(images: Tensor, numbers: Tensor, size: Size, padding: int, mode: str) -> Tensor:
    rows, columns = _around(size, padding, mode)
    top, left = numbers.long().numpy().T[:, :, None]
    down, across = rows[top + np.arange(size[0])], columns[left + np.arange(size[1])]
    first = np.arange(len(images))[:, None] * size[0] + down
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy().view("V3").reshape(-1)
    found = pixels.take(first[:, :, None] * size[1] + across[:, None, :], mode="clip")[..., None].view(np.uint8)
    if mode == "constant":
        found *= ((down >= 0)[:, :, None] & (across >= 0)[:, None, :])[..., None]
    return torch.from_numpy(found).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _around(size: Size, padding: int, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Which rows and which columns the padded image has; -1: none."""
    return padded(size[0], padding, mode), padded(size[1], padding, mode)


def _sampled(images: Tensor, numbers: Tensor, **_: Any) -> Tensor:
    return sampled(images, numbers)


def _recoloured(images: Tensor, numbers: Tensor, **_: Any) -> Tensor:
    return recoloured(images, numbers)


FITTING = (resize, random_crop)
"""Transforms that begin with resizing the image to the size that the chain ends with."""

TOGETHER: dict[Callable[..., Tensor], tuple[Callable[..., Numbers], Work]] = {
    resize: (_no_numbers, _as_it_is),
    horizontal_flip: (_drawn_flip, _flipped),
    random_crop: (_drawn_corner, _cropped),
    shift_scale_rotate: (drawn_similarity, _sampled),
    linear_colour_jitter: (drawn_colours, _recoloured),
}
"""Each transform that works on a batch: what it draws for one image, what it does to many."""
