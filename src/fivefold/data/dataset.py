"""Images as batches: read, decode, check, transform; the same bytes with any number of workers."""

import hashlib
import logging
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from fivefold.data.image_cache import Cache
from fivefold.data.images import Pixels, in_threads
from fivefold.data.meta import count_numbers, measure
from fivefold.data.store import ImageStore, read_unchanged
from fivefold.data.transforms import Transform
from fivefold.progress import stoppable, track

log = logging.getLogger("fivefold")

MEMORY_LIMIT = 1 << 30
"""Bytes of decoded images that are kept at most."""
SAMPLE = 256
"""Images by whose heads is told whether all of them are too large."""
PREFETCHED = 4
"""Batches that each loader process reads ahead."""
LOADER_TIMEOUT_S = 600
"""Seconds without a batch after which reading has failed: torch loses a batch for which the shared memory has no room."""
Sample = tuple[int, int]
"""(epoch, row)."""


@dataclass(frozen=True)
class Batch:
    """`images` uint8 [B, 3, H, W], channels last in memory; `rows` int64 [B]: where each stands in the dataset; `meta` float [B, M] or None."""

    images: Tensor
    rows: Tensor
    meta: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.images, self.rows, *([] if self.meta is None else [self.meta])]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch of what `change` makes of each tensor."""
        return Batch(*map(change, self.tensors))

    def pin_memory(self) -> "Batch":
        """For the loader's `pin_memory`, which asks an unknown class for this method."""
        return self.map(Tensor.pin_memory)


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of several, in their order."""
    return Batch(*map(torch.cat, zip(*(batch.tensors for batch in batches), strict=True)))


class ImageSet(Dataset):
    """The images of N rows of a store, each by (epoch, row).

    `sha256`: the digests that the split took, checked at every read; None where it took none.
    `pixels`: what pixels of a file count. Images that the store's caches hold as these are read from there.
    `meta`: names of the meta features that go with each image, measured before the transform.
    A sample's randomness comes from (seed, epoch, row) alone, never from a worker or its order.
    """

    def __init__(
        self,
        store: ImageStore,
        paths: Sequence[str],
        transform: Transform,
        seed: int = 0,
        sha256: Sequence[str | None] | None = None,
        meta: Sequence[str] = (),
        pixels: Pixels = Pixels(),  # noqa: B008
    ) -> None:
        self.store = store
        self.paths = paths
        self.transform = transform
        self.seed = seed
        self.sha256 = sha256
        self.meta = tuple(meta)
        self.pixels = pixels
        digests = [None] * len(paths) if sha256 is None else sha256
        self.cached = [(cache, cache.find(digests)) for cache in getattr(store, "caches", ()) if cache.pixels == pixels]
        self.kept: list[np.ndarray] | None = None
        self.measured: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def count_cached(self) -> int:
        """How many rows are known to be in a cache; those without a digest are not, before they are read."""
        return int(np.any([at >= 0 for _, at in self.cached], axis=0).sum())

    def keep_in_memory(self) -> bool:
        """Decodes all images once and keeps them, if they fit; whether they do. Forked workers share them.

        Those that lie in a cache need not be kept.
        """
        if self.count_cached() == len(self):
            return True
        expected = self.expected_bytes()
        kept: list[np.ndarray] = []
        size = 0
        with closing(in_threads(self.image, range(len(self)))) as decoded:
            for image in stoppable(decoded if expected <= MEMORY_LIMIT else ()):
                kept.append(image)
                size += image.nbytes
                if size > MEMORY_LIMIT:
                    break
        if max(expected, size) > MEMORY_LIMIT:
            log.info("%d images are too many to keep decoded; they are read at each epoch", len(self))
            return False
        self.kept = kept
        return True

    def expected_bytes(self, most: int = SAMPLE) -> float:
        """About the bytes of all decoded images, by the heads of `most` of their files; 0 where a cache has all."""
        if self.count_cached() == len(self):
            return 0.0
        sample = np.linspace(0, len(self) - 1, min(most, len(self)), dtype=int)
        with closing(in_threads(self._stored_bytes, sample.tolist())) as sizes:
            return sum(stoppable(sizes)) / max(1, len(sample)) * len(self)

    def _stored_bytes(self, row: int) -> int:
        """Bytes of the stored pixels of a row, of its file's head."""
        digest = None if self.sha256 is None else self.sha256[row]
        content, _ = read_unchanged(self.store, self.paths[row], digest)
        return 3 * math.prod(self.pixels.size_of(content, self.paths[row]))

    def measure(self) -> np.ndarray:
        """The meta features float32 [N, M] of all rows, measured once and kept."""
        if self.measured is None:
            found = np.empty((len(self), count_numbers(self.meta)), np.float32)
            with closing(in_threads(lambda row: measure(self.image(row), self.meta), range(len(self)))) as rows:
                for row, numbers in enumerate(track(rows, len(self), "meta features")):
                    found[row] = numbers
            self.measured = found
        return self.measured

    def image(self, row: int) -> np.ndarray:
        """The stored pixels uint8 [H, W, 3] of a row, not to be written to; a DataError if it changed since the split."""
        if self.kept is not None:
            return self.kept[row]
        for cache, at in self.cached:
            if at[row] >= 0:
                return _held(cache, int(at[row]))
        digest = None if self.sha256 is None else self.sha256[row]
        if digest is None and not self.cached:
            return self.pixels.decode(self.store.read(self.paths[row]), self.paths[row])
        content, digest = read_unchanged(self.store, self.paths[row], digest)
        for cache, _ in self.cached:
            (at,) = cache.find([digest])
            if at >= 0:
                return _held(cache, int(at))
        return self.pixels.decode(content, self.paths[row])

    def __getitems__(self, samples: Sequence[tuple[int, int]]) -> Batch:
        """The batch of the given (epoch, row) pairs; torch's global random state stays as it was."""
        state = torch.get_rng_state()
        images, meta = None, []
        for at, (epoch, row) in enumerate(samples):
            pixels = self.image(row)
            # default_generator, since torch.manual_seed would reseed CUDA's generators at every sample
            torch.default_generator.manual_seed(derive_seed(self.seed, epoch, row))
            image = self.transform(torch.from_numpy(pixels).permute(2, 0, 1))
            if images is None:
                # Channels last, each image copied as its pixels lie: stacking took half as long again.
                images = torch.empty((len(samples), *image.shape[1:], 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            images[at].copy_(image)
            meta.append(self._meta(row, pixels))
        torch.set_rng_state(state)
        rows = torch.tensor([row for _, row in samples])
        return Batch(images, rows, torch.from_numpy(np.stack(meta)) if self.meta else None)

    def seen(self, row: int) -> Batch:
        """A row as an evaluation sees it, a batch of one; for several threads at once, since nothing is drawn at random."""
        pixels = self.image(row)
        meta = torch.from_numpy(self._meta(row, pixels)[None]) if self.meta else None
        return Batch(self.transform(torch.from_numpy(pixels).permute(2, 0, 1))[None], torch.tensor([row]), meta)

    def _meta(self, row: int, pixels: np.ndarray) -> np.ndarray | None:
        if not self.meta:
            return None
        return measure(pixels, self.meta) if self.measured is None else self.measured[row]


def _held(cache: Cache, at: int) -> np.ndarray:
    _take_read_only()
    return cache.image(at)


@lru_cache(maxsize=1)
def _take_read_only() -> None:
    """Has torch say now, and to nobody, what it says once a process of an array that may not be written to.

    A cache's images are such arrays; no transform writes to the image that it is given.
    """
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


class Stream(IntEnum):
    """What NumPy draws in training beside the order of `epoch_batches`, whose key is (seed, epoch) alone."""

    BALANCE = 1
    MIX = 2


def generator(stream: Stream, *parts: int) -> np.random.Generator:
    """The generator of a stream at integers below 2³² such as (seed, epoch), epochs from 1.

    NumPy fills up short keys with zeros. With the stream in front, and the epoch in the third place, where the key of
    `epoch_batches` has such a zero, no two keys of a run are the same.
    """
    return np.random.default_rng([stream, *parts])


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, such as (seed, epoch, row)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_batches(
    rows: int, batch_size: int, seed: int, epoch: int, drop_last: bool = False
) -> list[list[tuple[int, int]]]:
    """A shuffled epoch of (epoch, row) pairs in batches, as many as `count_batches` says."""
    order = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
    batches = [[(epoch, row) for row in order[i : i + batch_size]] for i in range(0, rows, batch_size)]
    return batches[: count_batches(rows, batch_size, drop_last)]


def count_batches(rows: int, batch_size: int, drop_last: bool = False) -> int:
    """The batches of a training epoch: a last one that is not full is left out with `drop_last`.

    Else one of a single row, which BatchNorm cannot take, or of less than an eighth of a batch, whose step would be as
    long as a full one's. Each epoch leaves out other rows.
    """
    whole, rest = divmod(rows, batch_size)
    least = batch_size if drop_last else max(2, batch_size / 8)
    return whole + (rest > 0 and (rest >= least or whole == 0))


def in_order(rows: int, batch_size: int, start: int = 0) -> list[list[tuple[int, int]]]:
    """The rows from `start` to below `rows` in order, in batches, as epoch 0."""
    return [[(0, row) for row in range(i, min(i + batch_size, rows))] for i in range(start, rows, batch_size)]


def load(images: ImageSet, batches: list[list[tuple[int, int]]], workers: int, pin: bool = False) -> Iterator[Batch]:
    """The given batches, read by `workers` processes (0: by this one)."""
    return iter(
        DataLoader(
            images,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=default_convert,
            worker_init_fn=_leave_the_group,
            pin_memory=pin,
            # A generator of its own: the loader draws a base seed, which must not move the model's randomness.
            generator=torch.Generator().manual_seed(0),
            prefetch_factor=PREFETCHED if workers else None,
            timeout=LOADER_TIMEOUT_S if workers else 0,
        )
    )


def batches_in_shared_memory(workers: int) -> int:
    """Return how many batches the shared memory holds at most: those prefetched, one being read and one in use."""
    return workers * PREFETCHED + 2 if workers else 0


def _leave_the_group(worker: int) -> None:
    """Makes a worker a process group of its own: what is sent to the group (^C, `timeout`) is for the process that keeps a checkpoint.

    Killed with it, the worker would end the training by torch's error of a lost worker.
    """
    os.setpgid(0, 0)
