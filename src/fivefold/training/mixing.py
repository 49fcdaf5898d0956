"""Mixing within a batch, by name: images, targets and whatever else has a row an image.

One λ and one permutation a batch, drawn from a generator of the step's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fivefold.choose import choose
from fivefold.data.dataset import Stream, generator
from fivefold.training.objectives import Rows

Mix = Callable[[Tensor, float, Tensor, np.random.Generator], tuple[Tensor, float]]
"""Images, λ, the images that each is mixed with (a copy, to write to), a generator; the mixed images, and λ as it came out."""
Partners = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""The order of a batch's rows to the images and meta features that this process's own ones are mixed with."""


@dataclass(frozen=True)
class Mixing:
    """What is mixed: λ ~ Beta(alpha, alpha), with probability `p` a batch, up to epoch `last` (from 1; None: in all)."""

    name: str
    alpha: float
    p: float
    last: int | None = None

    def __call__(self, rows: Rows, epoch: int, seed: tuple[int, ...], partners: Partners | None = None) -> Rows:
        """The rows with images mixed, and all that goes with them in the same shares.

        `partners` where the rows' images are a part of the batch: what is mixed is decided for the batch.
        """
        mix = choose(MIXINGS, "mixing", self.name)
        random = generator(Stream.MIX, *seed)
        if mix is None or (self.last is not None and epoch > self.last) or random.random() >= self.p:
            return rows
        lam = float(random.beta(self.alpha, self.alpha))
        order = torch.from_numpy(random.permutation(len(rows.targets))).to(rows.images.device, non_blocking=True)
        others, others_meta = partners(order) if partners else (rows.images[order], _at(rows.meta, order))
        images, lam = mix(rows.images, lam, others, random)

        def blend(given: Tensor | None, other: Tensor | None) -> Tensor | None:
            return None if given is None or other is None else torch.lerp(other, given, lam)

        targets = torch.lerp(rows.targets[order], rows.targets, lam)
        teacher = blend(rows.teacher, _at(rows.teacher, order))
        return replace(rows, images=images, targets=targets, teacher=teacher, meta=blend(rows.meta, others_meta))


def mixup(images: Tensor, lam: float, others: Tensor, random: np.random.Generator) -> tuple[Tensor, float]:
    """λ·image + (1 - λ)·other (Zhang et al. 2018, arXiv 1710.09412, equation 1)."""
    return others.lerp_(images, lam), lam


def cutmix(images: Tensor, lam: float, others: Tensor, random: np.random.Generator) -> tuple[Tensor, float]:
    """A box of 1 - λ of the area from the other image; λ becomes the share that is left (Yun et al. 2019, arXiv 1905.04899)."""
    height, width = images.shape[-2:]
    side = np.sqrt(1 - lam)
    y, x = int(random.integers(height)), int(random.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(y - half_y, 0), min(y + half_y, height)
    left, right = max(x - half_x, 0), min(x + half_x, width)
    mixed = images.clone(memory_format=torch.preserve_format)
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _at(given: Tensor | None, order: Tensor) -> Tensor | None:
    return None if given is None else given[order]


MIXINGS: dict[str, Mix | None] = {
    "none": None,
    "mixup": mixup,
    "cutmix": cutmix,
}
