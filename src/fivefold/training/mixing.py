"""Mixing within a batch, by name: images, targets, teacher and meta features.

One λ and one permutation per batch, drawn from a generator seeded by the step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fivefold.data.pipeline.dataset import Stream, make_generator
from fivefold.lookup import choose
from fivefold.training.objectives import MicroBatch

MixFn = Callable[[Tensor, float, Tensor, np.random.Generator], tuple[Tensor, float]]
"""Maps images, λ, the partner of each image (a writable copy) and a generator to the mixed images and the actual λ."""
PartnerFn = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Maps a permutation of the batch's rows to the partners' images and meta features for this rank's rows."""


@dataclass(frozen=True)
class Mixing:
    """Mixing by `name` with λ ~ Beta(alpha, alpha), in a batch with probability `p`, up to epoch `last` (from 1; None: all)."""

    name: str
    alpha: float
    p: float
    last: int | None = None

    def __call__(
        self, rows: MicroBatch, epoch: int, seed: tuple[int, ...], partners: PartnerFn | None = None
    ) -> MicroBatch:
        """Return the rows with mixed images, and with targets, teacher and meta features mixed in the same ratio.

        `partners`: set if several ranks share the batch; the permutation is drawn for the whole batch.
        """
        mix = choose(MIXINGS, "mixing", self.name)
        random = make_generator(Stream.MIX, *seed)
        if mix is None or (self.last is not None and epoch > self.last) or random.random() >= self.p:
            return rows
        lam = float(random.beta(self.alpha, self.alpha))
        order = torch.from_numpy(random.permutation(len(rows.targets))).to(rows.images.device, non_blocking=True)
        if partners:
            others, others_meta = partners(order)
        else:
            others, others_meta = rows.images[order], None if rows.meta is None else rows.meta[order]
        images, lam = mix(rows.images, lam, others, random)
        targets = torch.lerp(rows.targets[order], rows.targets, lam)
        teacher = None if rows.teacher is None else torch.lerp(rows.teacher[order], rows.teacher, lam)
        meta = None if rows.meta is None else torch.lerp(others_meta, rows.meta, lam)
        return replace(rows, images=images, targets=targets, teacher=teacher, meta=meta)


def mixup(images: Tensor, lam: float, others: Tensor, random: np.random.Generator) -> tuple[Tensor, float]:
    """λ·image + (1 - λ)·other (Zhang et al. 2018, arXiv 1710.09412, equation 1)."""
    return others.lerp_(images, lam), lam


def cutmix(images: Tensor, lam: float, others: Tensor, random: np.random.Generator) -> tuple[Tensor, float]:
    """Paste a box of area fraction 1 - λ of the other image; return the actual λ (Yun et al. 2019, arXiv 1905.04899)."""
    height, width = images.shape[-2:]
    side = np.sqrt(1 - lam)
    y, x = int(random.integers(height)), int(random.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(y - half_y, 0), min(y + half_y, height)
    left, right = max(x - half_x, 0), min(x + half_x, width)
    mixed = images.clone(memory_format=torch.preserve_format)
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


MIXINGS: dict[str, MixFn | None] = {"none": None, "mixup": mixup, "cutmix": cutmix}
