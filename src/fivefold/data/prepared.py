"""Images as an evaluation sees them, made once for every model, view and epoch that looks at them.

Decoding, meta features and the evaluation transform draw nothing at random, so what they make of an
image can be kept: in memory up to a limit, beyond it in one file of a scratch folder.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch

from fivefold.contract.files import reserve
from fivefold.data.dataset import MEMORY_LIMIT, Batch, ImageSet, Sample, load
from fivefold.data.images import in_threads
from fivefold.machine import free_memory
from fivefold.progress import track

log = logging.getLogger("fivefold")

SHARE_OF_FREE = 4
"""Kept images take at most this part (1/4) of the memory that is free."""


class Prepared:
    """What the evaluation makes of the N images of a set, by row; made when a row is first asked for.

    `pixels`: uint8 [N, H, W, 3], which batches show as [B, 3, H, W]. Batches are the same, byte for byte, as
    `load` gives of the set itself. Where they fit neither `limit` bytes of memory nor a file in `scratch` (None:
    there is to be none), they are read anew each time, as `load` does.
    """

    def __init__(self, images: ImageSet, scratch: Path | None = None, limit: int | None = None) -> None:
        self.images = images
        self.scratch = scratch
        self.limit = limit
        self.pixels: np.ndarray | None = None
        self.meta: np.ndarray | None = None
        self.done = np.zeros(len(images), bool)
        self.fits = True

    def __len__(self) -> int:
        return len(self.images)

    @property
    def in_memory(self) -> int:
        """Bytes of memory that are, or will be, taken."""
        return 0 if self.pixels is None or isinstance(self.pixels, np.memmap) else self.pixels.nbytes

    def batches(self, batches: list[list[Sample]], workers: int, label: str = "") -> Iterator[Batch]:
        """The given batches of (epoch, row), in their order; what is not made yet is made first, by all threads.

        Shows a progress bar where there is a `label`. Raises DataError for an image that cannot be read.
        """
        rows = np.array([row for batch in batches for _, row in batch], np.int64)
        if len(rows) and not self._make(rows, label):
            return load(self.images, batches, workers)
        return map(self._batch, batches)

    def _batch(self, samples: list[Sample]) -> Batch:
        rows = np.array([row for _, row in samples], np.int64)
        start = int(rows[0])
        together = np.array_equal(rows, np.arange(start, start + len(rows)))
        chosen = slice(start, start + len(rows)) if together else rows
        meta = None if self.meta is None else torch.from_numpy(self.meta[chosen].copy())
        images = torch.from_numpy(self.pixels[chosen]).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(rows), meta)

    def _make(self, rows: np.ndarray, label: str) -> bool:
        """Makes those of `rows` that are not made yet; whether there is room for them."""
        missing = rows[~self.done[rows]]
        if not len(missing) or not self.fits:
            return self.fits
        if self.pixels is None:
            self.fits = self._find_room(int(missing[0]))
        if not self.fits:
            return False
        with closing(in_threads(self._keep, missing.tolist())) as made:
            for row in track(made, len(missing), f"{label}: images") if label else made:
                self.done[row] = True
        return True

    def _keep(self, row: int) -> int:
        batch = self.images.seen(row)
        self.pixels[row] = batch.images[0].permute(1, 2, 0).numpy()
        if self.meta is not None:
            self.meta[row] = batch.meta[0].numpy()
        return row

    def _find_room(self, row: int) -> bool:
        """Room for all images, each as large as that of `row`; whether there is any."""
        first = self.images.seen(row)
        _, depth, height, width = first.images.shape
        shape = (len(self), height, width, depth)
        if np.prod(shape) <= (memory_limit() if self.limit is None else self.limit):
            self.pixels = np.empty(shape, np.uint8)  # pages that nobody writes to take no memory
        elif self.scratch is not None:
            self.pixels = _in_file(shape, self.scratch)
        if self.pixels is None:
            return False
        self.meta = None if first.meta is None else np.empty((len(self), first.meta.shape[1]), np.float32)
        return True


def memory_limit() -> int:
    """Bytes that kept images may take on this machine now."""
    return min(MEMORY_LIMIT, free_memory() // SHARE_OF_FREE)


def _in_file(shape: tuple[int, ...], folder: Path) -> np.ndarray | None:
    """An array in a file of `folder` that is gone when nobody holds it; None, told, where the disk has no room."""
    size = int(np.prod(shape))
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            reserve(file.fileno(), size)
        except OSError as error:
            with suppress(OSError):
                file.truncate(0)
            log.warning(
                "%d images are read anew by each model: their pixels take %.1f GiB, and %s has no room (%s); "
                "TMPDIR names another folder",
                shape[0],
                size / 2**30,
                folder,
                error.strerror,
            )
            return None
        return np.memmap(file, np.uint8, "r+", shape=shape)
