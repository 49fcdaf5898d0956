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
from fivefold.data.opening import reasons_in_words
from fivefold.errors import DataError
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

    With `stand_in` an image that cannot be read is no error: another image stands in its place, and `unreadable` has
    the reason by row.
    """

    def __init__(
        self, images: ImageSet, scratch: Path | None = None, limit: int | None = None, stand_in: bool = False
    ) -> None:
        self.images = images
        self.scratch = scratch
        self.limit = limit
        self.stand_in = stand_in
        self.unreadable: dict[int, str] = {}
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

        Shows a progress bar where there is a `label`. Raises one DataError for all images that cannot be read.
        """
        rows = np.array([row for batch in batches for _, row in batch], np.int64)
        if len(rows) and not self._make(rows, label):
            return load(self.images, self._readable(batches, rows) if self.stand_in else batches, workers)
        return map(self._batch, batches)

    def _readable(self, batches: list[list[Sample]], rows: np.ndarray) -> list[list[Sample]]:
        """The batches, with a readable row in the place of each that is not; all are tried first, once."""
        with closing(in_threads(self._tried, rows[~self.done[rows]].tolist())) as tried:
            for row, _, reason in tried:
                self._note(row, reason)
        self._check(rows)
        other = next(row for row in rows.tolist() if row not in self.unreadable)
        return [[(epoch, other if row in self.unreadable else row) for epoch, row in batch] for batch in batches]

    def _tried(self, row: int) -> tuple[int, Batch | None, str]:
        """A row, what the evaluation sees of it, and why that is nothing."""
        try:
            return row, self.images.seen(row), ""
        except DataError as error:
            return row, None, str(error)

    def _note(self, row: int, reason: str) -> None:
        self.done[row] = True
        if reason:
            self.unreadable[row] = reason

    def _check(self, rows: np.ndarray) -> None:
        """Raises a DataError for those of `rows` that cannot be read, or where none of them can."""
        bad = {row: self.unreadable[row] for row in rows.tolist() if row in self.unreadable}
        if not bad or (self.stand_in and len(bad) < len(set(rows.tolist()))):
            return
        told = reasons_in_words(list(bad.values()), [self.images.paths[row] for row in bad])
        raise DataError(told if len(bad) == 1 else f"{len(bad)} of {len(rows)} images cannot be used: {told}")

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
        if not self.fits:
            return False
        if not len(missing):
            self._check(rows)
            return True
        if self.pixels is None:
            self.fits = self._find_room(missing)
        if not self.fits:
            return False
        with closing(in_threads(self._keep, missing.tolist())) as made:
            for row, reason in track(made, len(missing), f"{label}: images") if label else made:
                self._note(row, reason)
        self._check(rows)
        return True

    def _keep(self, row: int) -> tuple[int, str]:
        _, batch, reason = self._tried(row)
        self.pixels[row] = 0 if batch is None else batch.images[0].permute(1, 2, 0).numpy()
        if self.meta is not None:
            self.meta[row] = 0 if batch is None else batch.meta[0].numpy()
        return row, reason

    def _find_room(self, rows: np.ndarray) -> bool:
        """Room for all images, each as large as the first of `rows` that can be read; whether there is any."""
        for row in rows.tolist():
            _, first, reason = self._tried(row)
            if first is not None:
                break
            self.unreadable[row] = reason
        else:
            self._check(rows)
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
