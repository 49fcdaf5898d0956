"""Cache of transformed evaluation images, shared by all models, views and epochs that use them.

Decoding, meta features and the evaluation transform are deterministic, so their results are kept:
in memory up to a limit, and beyond it in one file of a scratch folder.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fivefold.contract.files import preallocate
from fivefold.data.image_io import map_in_threads
from fivefold.data.pipeline.dataset import MEMORY_LIMIT, Batch, ImageDataset, Sample, count_stats, load_batches
from fivefold.data.split.verify import describe_failures
from fivefold.errors import DataError
from fivefold.log import log
from fivefold.progress import track
from fivefold.system import free_memory

FREE_MEMORY_DIVISOR = 4
"""The cached images take at most 1/4 of the free memory."""


@dataclass(eq=False, repr=False)
class EvalImageCache:
    """Evaluation inputs of the N images of a set, by row, computed when a row is first requested.

    `pixels`: uint8 [N, H, W, 3], returned in batches as [B, 3, H, W]. Batches are identical, byte for byte, to those of
    `load_batches` on the set itself. If the images fit neither in `limit` bytes of memory nor in a file in `scratch` (None: no
    file), they are read again each time, as in `load_batches`.

    With `use_placeholders`, an unreadable image is not an error: another image takes its place, and `unreadable` maps its row to
    the reason.
    """

    images: ImageDataset
    scratch: Path | None = None
    limit: int | None = None
    use_placeholders: bool = False
    unreadable: dict[int, str] = field(default_factory=dict, init=False)
    pixels: np.ndarray | None = field(default=None, init=False)
    meta: np.ndarray | None = field(default=None, init=False)
    fits: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.done = np.zeros(len(self.images), bool)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of memory that the cache takes, or will take when it is full."""
        return 0 if self.pixels is None or isinstance(self.pixels, np.memmap) else self.pixels.nbytes

    def batches(self, batches: list[list[Sample]], workers: int, label: str = "") -> Iterator[Batch]:
        """Return the given batches of (epoch, row) in order, after computing all missing rows in threads.

        Show a progress bar if `label` is set. Raise one DataError for all unreadable images.
        """
        rows = np.array([row for batch in batches for _, row in batch], np.int64)
        if not len(rows) or self._make(rows, label):
            return map(self._batch, batches)
        if self.use_placeholders:
            readable = next(row for row in rows.tolist() if row not in self.unreadable)
            batches = [[(epoch, readable if row in self.unreadable else row) for epoch, row in b] for b in batches]
        return load_batches(self.images, batches, workers)

    def _make(self, rows: np.ndarray, label: str) -> bool:
        """Compute the missing ones of `rows`, or only find the unreadable ones; return whether there is room for them."""
        missing = rows[~self.done[rows]]
        if len(missing) and self.pixels is None and self.fits:
            self.fits = self._allocate()
        if self.fits or self.use_placeholders:
            with closing(map_in_threads(self._store, missing.tolist())) as results:
                for row, reason in track(results, len(missing), f"{label}: images") if label else results:
                    self.done[row] = True
                    if reason:
                        self.unreadable[row] = reason
            self._check(rows)
        return self.fits

    def _check(self, rows: np.ndarray) -> None:
        """Raise a DataError for unreadable images in `rows`; with `use_placeholders`, only if all of them are unreadable."""
        bad = {row: self.unreadable[row] for row in rows.tolist() if row in self.unreadable}
        if bad and not (self.use_placeholders and len(bad) < len(set(rows.tolist()))):
            reasons = describe_failures(bad, self.images.paths)
            raise DataError(reasons if len(bad) == 1 else f"{len(bad)} of {len(rows)} images cannot be used: {reasons}")

    def _batch(self, samples: list[Sample]) -> Batch:
        rows = np.array([row for _, row in samples], np.int64)
        meta = None if self.meta is None else torch.from_numpy(self.meta[rows])
        return Batch(torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2), torch.from_numpy(rows), meta)

    def _store(self, row: int) -> tuple[int, str]:
        """Keep the evaluation input of a row, if there is room; return the row, and the reason if it is unreadable."""
        try:
            batch = self.images.eval_batch(row)
        except DataError as error:
            return row, str(error)
        if self.pixels is not None:
            self.pixels[row] = batch.images[0].permute(1, 2, 0).numpy()
            if self.meta is not None:
                self.meta[row] = batch.meta[0].numpy()
        return row, ""

    def _allocate(self) -> bool:
        """Allocate room for the transformed images, which have one size; return whether there is any."""
        depth, height, width = self.images.transform(torch.zeros(3, 64, 64, dtype=torch.uint8)).shape
        shape = (len(self), height, width, depth)
        if np.prod(shape) <= (memory_limit() if self.limit is None else self.limit):
            self.pixels = np.zeros(shape, np.uint8)  # pages that are never written take no memory
        elif self.scratch is not None:
            self.pixels = _temporary_array(shape, self.scratch)
        if self.images.meta:
            self.meta = np.zeros((len(self), count_stats(self.images.meta)), np.float32)
        return self.pixels is not None


def memory_limit() -> int:
    """Return the bytes that cached images may take on this machine now."""
    return min(MEMORY_LIMIT, free_memory() // FREE_MEMORY_DIVISOR)


def _temporary_array(shape: tuple[int, ...], folder: Path) -> np.ndarray | None:
    """Return an array in a temporary file of `folder`, deleted when released; log a warning and return None if the disk is full."""
    size = int(np.prod(shape))
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            preallocate(file.fileno(), size)
        except OSError as error:
            with suppress(OSError):
                file.truncate(0)
            log.warning(
                "each model reads %d images again: their pixels take %.1f GiB, and %s has not enough space (%s); "
                "set TMPDIR to another folder",
                shape[0],
                size / 2**30,
                folder,
                error.strerror,
            )
            return None
        return np.memmap(file, np.uint8, "r+", shape=shape)
