"""Batches of images: read, decode, verify and transform; the bytes do not depend on the number of workers.

`STATS` are image statistics by name: a few numbers of the decoded image before any augmentation.
"""

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from fivefold.data.image_io import DecodeOptions, map_in_threads
from fivefold.data.readers.stores import ImageStore, read_verified
from fivefold.data.transforms.registry import Transform
from fivefold.log import log
from fivefold.lookup import choose
from fivefold.progress import interruptible, track

MEMORY_LIMIT = 1 << 30
"""Maximum bytes of decoded images to keep in memory."""
HEADER_SAMPLE = 256
"""Images whose headers are read to estimate the size of all images."""
PREFETCH_FACTOR = 4
"""Batches that each loader worker prefetches."""
LOADER_TIMEOUT_S = 600
"""Seconds without a batch after which reading has failed: torch loses a batch if the shared memory has no room for it."""
Sample = tuple[int, int]
"""(epoch, row)."""


@dataclass(frozen=True)
class Batch:
    """`images` uint8 [B, 3, H, W], channels last in memory; `rows` int64 [B], the indices in the dataset; `meta` float [B, M] or None."""

    images: Tensor
    rows: Tensor
    meta: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.images, self.rows, *([] if self.meta is None else [self.meta])]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*map(function, self.tensors))

    def pin_memory(self) -> "Batch":
        """Pin the tensors; the loader calls this method of custom batch classes for its option `pin_memory`."""
        return self.map(Tensor.pin_memory)


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches in order."""
    return Batch(*map(torch.cat, zip(*(batch.tensors for batch in batches), strict=True)))


@dataclass(eq=False, repr=False)
class ImageDataset(Dataset):
    """The images of N rows of a store, each requested by (epoch, row).

    `sha256`: the digests that the split recorded, checked at every read; None if unknown.
    Images that a cache of the store holds with the same `decode_options` are read from it.
    `meta`: names of the meta features of each image, measured before the transform.
    The random numbers of a sample depend only on (seed, epoch, row), not on the worker or the order.
    """

    store: ImageStore
    paths: Sequence[str]
    transform: Transform
    seed: int = 0
    sha256: Sequence[str | None] | None = None
    meta: Sequence[str] = ()
    decode_options: DecodeOptions = DecodeOptions()  # noqa: RUF009
    kept: list[np.ndarray] | None = field(default=None, init=False)
    measured: np.ndarray | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.sha256 = [None] * len(self.paths) if self.sha256 is None else self.sha256
        caches = [cache for cache in self.store.caches if cache.decode_options == self.decode_options]
        self.cached = [(cache, cache.find(self.sha256)) for cache in caches]

    def __len__(self) -> int:
        return len(self.paths)

    def count_cached(self) -> int:
        """Return how many rows are known to be in a cache; rows without a digest are unknown until they are read."""
        return int(np.any([indices >= 0 for _, indices in self.cached], axis=0).sum())

    def cache_in_memory(self) -> None:
        """Decode all images once and keep them, unless all are in a cache or they do not fit. Forked workers share them."""
        if self.count_cached() == len(self):
            return
        images, size = [], 0
        if self.expected_bytes() <= MEMORY_LIMIT:
            with closing(map_in_threads(self.image, range(len(self)))) as decoded:
                for image in interruptible(decoded):
                    images.append(image)
                    size += image.nbytes
                    if size > MEMORY_LIMIT:
                        break
                else:
                    self.kept = images
                    return
        log.info("%d decoded images do not fit in memory; they are read in each epoch", len(self))

    def expected_bytes(self, max_files: int = HEADER_SAMPLE) -> float:
        """Estimate the bytes of all decoded images from the headers of `max_files` files; 0 if all images are in a cache."""
        if self.count_cached() == len(self):
            return 0.0
        sample = np.linspace(0, len(self) - 1, min(max_files, len(self)), dtype=int)
        with closing(map_in_threads(self._stored_bytes, sample.tolist())) as sizes:
            return sum(interruptible(sizes)) / max(1, len(sample)) * len(self)

    def _stored_bytes(self, row: int) -> int:
        content, _ = read_verified(self.store, self.paths[row], self.sha256[row])
        return 3 * math.prod(self.decode_options.stored_size(content, self.paths[row]))

    def compute_image_stats(self) -> np.ndarray:
        """Return the meta features float32 [N, M] of all rows, measured once and then cached."""
        if self.measured is None:
            with closing(map_in_threads(lambda row: image_stats(self.image(row), self.meta), range(len(self)))) as rows:
                features = list(track(rows, len(self), "meta features"))
            self.measured = np.array(features, np.float32).reshape(len(self), count_stats(self.meta))
        return self.measured

    def image(self, row: int) -> np.ndarray:
        """Return the stored pixels uint8 [H, W, 3] of a row, not to be modified; raise a DataError if it changed since the split."""
        if self.kept is not None:
            return self.kept[row]
        for cache, indices in self.cached:
            if indices[row] >= 0:
                return cache.image(indices[row])
        content, digest = read_verified(self.store, self.paths[row], self.sha256[row])
        for cache, _ in self.cached:
            (index,) = cache.find([digest])
            if index >= 0:
                return cache.image(index)
        return self.decode_options.decode(content, self.paths[row])

    def __getitems__(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of the given (epoch, row) pairs; keep torch's global random state."""
        state = torch.get_rng_state()
        images, meta = None, []
        for index, (epoch, row) in enumerate(samples):
            pixels = self.image(row)
            # default_generator, because torch.manual_seed would also reseed CUDA's generators at every sample
            torch.default_generator.manual_seed(derive_seed(self.seed, epoch, row))
            image = self.transform(torch.from_numpy(pixels).permute(2, 0, 1))
            if images is None:
                # Channels last, so that each image is one contiguous copy; stacking takes 50 % longer.
                images = torch.empty((len(samples), *image.shape[1:], 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            images[index].copy_(image)
            meta.append(self._meta(row, pixels))
        torch.set_rng_state(state)
        rows = torch.tensor([row for _, row in samples])
        return Batch(images, rows, torch.from_numpy(np.stack(meta)) if self.meta else None)

    def eval_batch(self, row: int) -> Batch:
        """Return the evaluation input of a row as a batch of one; thread-safe, because nothing is random."""
        pixels = self.image(row)
        meta = torch.from_numpy(self._meta(row, pixels)[None]) if self.meta else None
        return Batch(self.transform(torch.from_numpy(pixels).permute(2, 0, 1))[None], torch.tensor([row]), meta)

    def _meta(self, row: int, pixels: np.ndarray) -> np.ndarray | None:
        if not self.meta:
            return None
        return image_stats(pixels, self.meta) if self.measured is None else self.measured[row]


class Stream(IntEnum):
    """NumPy random streams of training, except that of the sampler `shuffle`, whose key is only (seed, epoch)."""

    BALANCE = 1
    MIX = 2


def make_generator(stream: Stream, *parts: int) -> np.random.Generator:
    """Return the generator of a stream for integers below 2³² such as (seed, epoch), with epochs from 1.

    NumPy pads short keys with zeros. No two keys of a run are equal, because the stream comes first and the epoch third,
    where the key of `shuffle` has a zero.
    """
    return np.random.default_rng([stream, *parts])


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed derived from integers such as (seed, epoch, row)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def count_batches(rows: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the number of batches of a training epoch; with `drop_last`, without a last batch that is not full.

    Otherwise drop a last batch of one row, which BatchNorm cannot handle, or of less than an eighth of a batch, whose step
    takes as long as a full one. Each epoch drops different rows.
    """
    full, remainder = divmod(rows, batch_size)
    minimum = batch_size if drop_last else max(2, batch_size / 8)
    return full + (remainder > 0 and (remainder >= minimum or full == 0))


def sequential_batches(rows: int, batch_size: int, start: int = 0) -> list[list[Sample]]:
    """Return the rows from `start` to `rows` - 1 in order, in batches, with epoch 0."""
    return [[(0, row) for row in range(i, min(i + batch_size, rows))] for i in range(start, rows, batch_size)]


def load_batches(images: ImageDataset, batches: list[list[Sample]], workers: int, pin: bool = False) -> Iterator[Batch]:
    """Load the given batches with `workers` processes (0: in this process)."""
    return iter(
        DataLoader(
            images,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=default_convert,
            worker_init_fn=_start_process_group,
            pin_memory=pin,
            # A separate generator: the loader draws a base seed, which must not change the model's random state.
            generator=torch.Generator().manual_seed(0),
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            timeout=LOADER_TIMEOUT_S if workers else 0,
        )
    )


def batches_in_shared_memory(workers: int) -> int:
    """Return the maximum number of batches in shared memory: those prefetched, one being read and one in use."""
    return workers * PREFETCH_FACTOR + 2 if workers else 0


def _start_process_group(worker: int) -> None:
    """Move a worker to its own process group: a ^C or `timeout` that killed it would end the training without a checkpoint."""
    os.setpgid(0, 0)


def image_stats(pixels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the features `names` of an image uint8 [H, W, 3], concatenated in this order: float32 [M]."""
    features = [choose(STATS, "meta feature", name)(pixels) for name in names]
    return np.concatenate([np.zeros(0), *features]).astype(np.float32)


def count_stats(names: Sequence[str]) -> int:
    """Return the length M of the features `names` together; raise a SettingsError for an unknown name."""
    return len(image_stats(np.zeros((1, 1, 3), np.uint8), names))


def aspect(pixels: np.ndarray) -> np.ndarray:
    """Return width over height, [1]."""
    return np.array([pixels.shape[1] / pixels.shape[0]])


def color_mean(pixels: np.ndarray) -> np.ndarray:
    """Return the mean red, green and blue of the image resized to 16x16 pixels, [3] in 0..1."""
    small = Image.fromarray(pixels).resize((16, 16))
    return np.asarray(small, np.float64).mean(axis=(0, 1)) / 255


STATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"aspect": aspect, "color_mean": color_mean}
