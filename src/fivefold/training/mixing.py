"""Mixing within a batch, by name: images, targets and whatever else has a row an image.

One λ and one permutation a batch, drawn from a generator of the step's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fivefold.choose import choose

Mix = Callable[[Tensor, float, Tensor, np.random.Generator], tuple[Tensor, float]]


@dataclass(frozen=True)
class Mixing:
    """What is mixed: λ ~ Beta(alpha, alpha), with probability `p` a batch."""

    name: str
    alpha: float
    p: float

    def __call__(
        self, images: Tensor, targets: Tensor, teacher: Tensor | None, seed: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The mixed images [B, 3, H, W], targets [B, C] and teacher's probabilities [B, C]."""
        mix = choose(MIXINGS, "mixing", self.name)
        random = np.random.default_rng(seed)
        if mix is None or random.random() >= self.p:
            return images, targets, teacher
        lam = float(random.beta(self.alpha, self.alpha))
        order = torch.from_numpy(random.permutation(len(images))).to(images.device)
        images, lam = mix(images, lam, order, random)

        def blend(rows: Tensor) -> Tensor:
            return torch.lerp(rows[order], rows, lam)

        return images, blend(targets), None if teacher is None else blend(teacher)


def mixup(images: Tensor, lam: float, order: Tensor, random: np.random.Generator) -> tuple[Tensor, float]:
    """λ·image + (1 - λ)·other (Zhang et al. 2018, arXiv 1710.09412, equation 1)."""
    return torch.lerp(images[order], images, lam), lam


def cutmix(images: Tensor, lam: float, order: Tensor, random: np.random.Generator) -> tuple[Tensor, float]:
    """A box of 1 - λ of the area from the other image; λ becomes the share that is left (Yun et al. 2019, arXiv 1905.04899)."""
    height, width = images.shape[-2:]
    side = np.sqrt(1 - lam)
    y, x = int(random.integers(height)), int(random.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(y - half_y, 0), min(y + half_y, height)
    left, right = max(x - half_x, 0), min(x + half_x, width)
    mixed = images.clone(memory_format=torch.preserve_format)
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


MIXINGS: dict[str, Mix | None] = {
    "none": None,
    "mixup": mixup,
    "cutmix": cutmix,
}
