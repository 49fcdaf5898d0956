"""What a chain of transforms shows of an image, as numbers: a box of it, resized, and which rows and columns of that.

The numbers are drawn as the transforms draw them, on the host, by their own functions and in their order, so whoever
makes the pixels of them (`resampling.py`, on a device) shows what the transforms would show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from fivefold.data.transforms import (
    Composed,
    Sometimes,
    Transform,
    centre_box,
    centre_crop_resize,
    horizontal_flip,
    random_box,
    random_corner,
    random_crop,
    random_resized_crop,
    resize,
)

Size = tuple[int, int]


@dataclass
class Sight:
    """What is seen of an image of `height` × `width` pixels.

    The box from (`top`, `left`) on, `mirrored` or not; once it is resized, of its `rows` and `columns` the ones that are
    seen, int64, in their order; -1 stands for black.
    """

    height: int
    width: int
    top: int = 0
    left: int = 0
    mirrored: bool = False
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def crop(self, top: int, left: int, height: int, width: int) -> None:
        """That box of what was seen so far, which is not resized yet."""
        self.top += top
        self.left += self.width - width - left if self.mirrored else left
        self.height, self.width = height, width

    def resize(self, size: Size) -> None:
        """All of it at `size`; where it was resized before, it was to the same size."""
        if self.rows is None:
            self.rows, self.columns = _numbers(size[0]), _numbers(size[1])
            if self.mirrored:
                self.columns = self.columns[::-1]

    def mirror(self) -> None:
        if self.columns is None:
            self.mirrored = not self.mirrored
        else:
            self.columns = self.columns[::-1]

    def pick(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """Of what is seen those rows and columns, -1 for black."""
        self.rows = np.where(rows < 0, -1, self.rows[rows])
        self.columns = np.where(columns < 0, -1, self.columns[columns])


def obstacle(transform: Transform) -> str:
    """The name of the first step that is no such geometry; "" where the whole chain is.

    Flips may stand anywhere, and a box that is resized where nothing was resized before: two resizings in a row round twice.
    """
    if not isinstance(transform, Composed):
        return _name(transform)
    resized = False
    for step in map(_certain, transform.steps):
        function = step.func if isinstance(step, partial) else None
        if function not in GEOMETRY or (resized and function in (random_resized_crop, centre_crop_resize)):
            return _name(step)
        resized = resized or function is not horizontal_flip
    return ""


def sight_of(transform: Composed, height: int, width: int) -> Sight:
    """What the chain shows of an image of that size; draws from torch's generator what the transforms draw."""
    sight = Sight(height, width)
    for step in transform.steps:
        if isinstance(step, Sometimes) and torch.rand(()).item() >= step.p:
            continue
        chosen = _certain(step)
        GEOMETRY[chosen.func](sight, **chosen.keywords)
    return sight


def _certain(step: Transform) -> Transform:
    return step.step if isinstance(step, Sometimes) else step


def _name(step: Transform) -> str:
    return step.func.__name__ if isinstance(step, partial) else type(step).__name__


def _random_resized_crop(sight: Sight, size: Size, **bounds: tuple[float, float]) -> None:
    sight.crop(*random_box(sight.height, sight.width, size, **bounds))
    sight.resize(size)


def _centre_crop(sight: Sight, size: Size, share: float) -> None:
    sight.crop(*centre_box(sight.height, sight.width, size, share))
    sight.resize(size)


def _horizontal_flip(sight: Sight, p: float) -> None:
    if torch.rand(()).item() < p:
        sight.mirror()


def _random_crop(sight: Sight, size: Size, padding: int, mode: str) -> None:
    sight.resize(size)
    corner = random_corner(padding)
    sight.pick(*(padded(n, padding, mode)[at : at + n] for n, at in zip(size, corner, strict=True)))


@lru_cache(maxsize=16)
def padded(count: int, padding: int, mode: str) -> np.ndarray:
    """Where each of `count` pixels in a row and those padded beside it come from; -1: from nowhere."""
    if mode == "constant":
        return np.pad(_numbers(count), padding, constant_values=-1)
    return np.pad(_numbers(count), padding, mode=MODES[mode])


@lru_cache(maxsize=16)
def _numbers(count: int) -> np.ndarray:
    return np.arange(count)


MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""Modes of torch's padding, by what numpy calls them."""

GEOMETRY: dict[Callable[..., torch.Tensor], Callable[..., None]] = {
    resize: Sight.resize,
    centre_crop_resize: _centre_crop,
    horizontal_flip: _horizontal_flip,
    random_crop: _random_crop,
    random_resized_crop: _random_resized_crop,
}
"""Each transform that is geometry alone, and what it does to a Sight."""
