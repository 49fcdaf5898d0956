"""Training images that lie on the device, where batches are made of them: the same bytes as the loader's."""

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fivefold.data.dataset import Batch, ImageSet, Sample, derive_seed
from fivefold.data.geometry import obstacle, sight_of
from fivefold.data.resampling import Boxes, resampled
from fivefold.progress import track

log = logging.getLogger("fivefold")

POINTS_AT_ONCE = 1 << 22
"""Of images that are made together, rows of their boxes × columns of the result: about 150 MB for the while."""
SHARE_OF_FREE = 3
"""With `auto` images take at most this part (1/3) of what training leaves free."""
COMPARED = 8
"""Rows that are made both ways before the device is trusted."""
MIB = 2**20


class Resident:
    """The stored pixels of an ImageSet's N images on a device, uint8 [P, 3], and batches that its transform makes of them there.

    `sizes` int64 [N, 2] are their heights and widths. What is random is drawn here, by (seed, epoch, row), as the set
    itself draws it. `at_once`: points that are made at once.
    """

    def __init__(
        self, images: ImageSet, sizes: np.ndarray, device: torch.device, at_once: int = POINTS_AT_ONCE
    ) -> None:
        self.images, self.sizes, self.device, self.at_once = images, sizes, device, at_once
        self.size: tuple[int, int] = images.transform.steps[-1].keywords["size"]
        ends = np.cumsum(sizes.prod(axis=1))
        self.begins = ends - sizes.prod(axis=1)
        self.pixels = torch.empty((int(ends[-1]), 3), dtype=torch.uint8, device=device)
        for row in track(range(len(images)), len(images), f"images to {device}"):
            image = torch.from_numpy(images.image(row)).view(-1, 3)
            self.pixels[self.begins[row] : ends[row]].copy_(image)
        self.meta = images.measure() if images.meta else None

    def batches(self, batches: Sequence[Sequence[Sample]]) -> Iterator[Batch]:
        """The given batches of (epoch, row), as `load` gives them."""
        return map(self._batch, batches)

    def agrees(self) -> bool:
        """Whether the images of a few rows are the loader's: another machine's torch might resize in its own way."""
        samples = [(1, int(row)) for row in np.unique(np.linspace(0, len(self.sizes) - 1, COMPARED).astype(np.int64))]
        return torch.equal(self._batch(samples).images.cpu(), self.images.__getitems__(samples).images)

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        rows = np.array([row for _, row in samples])
        numbers = self._drawn(samples)
        tallest = int(numbers[:, 2].max())
        count = max(1, self.at_once // (tallest * self.size[1]))
        parts = [self._made(numbers[start : start + count]) for start in range(0, len(numbers), count)]
        # of one part no copy; of several `cat` keeps the channels last
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        meta = None if self.meta is None else torch.from_numpy(self.meta[rows])
        return Batch(images, self._sent(torch.from_numpy(rows)), None if meta is None else self._sent(meta))

    def _drawn(self, samples: Sequence[Sample]) -> np.ndarray:
        """A row a sample: origin, stride, height and width of its box, and what is seen of it resized; torch's random state stays."""
        state = torch.get_rng_state()
        numbers = np.empty((len(samples), 4 + sum(self.size)), np.int64)
        for each, (epoch, row) in zip(numbers, samples, strict=True):
            torch.default_generator.manual_seed(derive_seed(self.images.seed, epoch, row))
            height, width = self.sizes[row].tolist()
            sight = sight_of(self.images.transform, height, width)
            each[:4] = self.begins[row] + sight.top * width + sight.left, width, sight.height, sight.width
            each[4 : 4 + self.size[0]], each[4 + self.size[0] :] = sight.rows, sight.columns
        torch.set_rng_state(state)
        return numbers

    def _made(self, numbers: np.ndarray) -> Tensor:
        tallest, widest = numbers[:, 2:4].max(axis=0).tolist()
        sent = self._sent(torch.from_numpy(numbers))
        origin, stride, height, width = sent[:, :4].unbind(dim=1)
        rows, columns = sent[:, 4:].split(self.size, dim=1)
        return resampled(self.pixels, Boxes(origin, stride, height, width, rows, columns, tallest, widest, self.size))

    def _sent(self, tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)


def made_resident(images: ImageSet, wanted: bool | Literal["auto"], device: torch.device, free: int) -> Resident | None:
    """The images on the device, if that is wanted and can be; else None, and the log says why.

    `auto` wants it on CUDA, where they take no more than a part of the bytes that are `free`. They must lie decoded in a
    cache or in memory, their transforms be geometry that `geometry.py` knows, and the results be the same.
    """
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return None
    sizes = sizes_of(images)
    room = free if wanted is True else free // SHARE_OF_FREE
    reason = _reason_against(images, sizes, device, room)
    if reason:
        log.log(logging.INFO if wanted == "auto" else logging.WARNING, "images stay off the device: %s", reason)
        return None
    try:
        found = Resident(images, sizes, device)
        agrees = found.agrees()
    except torch.OutOfMemoryError:
        log.warning("images stay off the device: its memory is taken meanwhile")
        return None
    if not agrees:
        log.warning("images stay off the device: what it makes of them is not what the loader makes")
        return None
    log.info("%d images lie on %s: %.1f MiB", len(images), device, _bytes(sizes) / MIB)
    return found


def sizes_of(images: ImageSet) -> np.ndarray | None:
    """Heights and widths int64 [N, 2] of the stored pixels; None unless all lie decoded in caches, or in memory."""
    if images.kept is not None:
        return np.array([pixels.shape[:2] for pixels in images.kept], np.int64)
    if images.count_cached() < len(images):
        return None
    found = np.zeros((len(images), 2), np.int64)
    for cache, at in reversed(images.cached):  # where several have an image it is read from the first
        entries = cache.index[at[at >= 0]]
        found[at >= 0] = np.stack([entries["height"], entries["width"]], axis=1)
    return found


def _reason_against(images: ImageSet, sizes: np.ndarray | None, device: torch.device, room: int) -> str:
    """Why the images cannot lie on the device; "" if they can."""
    step = obstacle(images.transform)
    if device.type not in ("cpu", "cuda"):
        return f"{device.type} has no float64"
    if step:
        return f"augment.train has {step}, which is made on the host"
    if sizes is None:
        return "they do not all lie decoded in a cache (data.cache) or in memory"
    if _bytes(sizes) > room:
        return f"they would take {_bytes(sizes) / MIB:.1f} MiB, and there is room for {max(room, 0) / MIB:.1f}"
    return ""


def _bytes(sizes: np.ndarray) -> int:
    return int(sizes.prod(axis=1).sum()) * 3
