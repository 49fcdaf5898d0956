"""Order and transfer of batches: samplers by name, for which only (seed, epoch) decides, and prefetching.

On CUDA, the next batch is copied to the device while the current step runs.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from fivefold.data.pipeline.dataset import Batch, Sample, Stream, count_batches, make_generator

Sampler = Callable[..., list[list[Sample]]]
REPEAT = 1 << 32
"""Larger than any epoch. A repetition adds it to the epoch number, so that each repetition has its own augmentation."""


def shuffle(codes: np.ndarray, batch_size: int, seed: int, epoch: int, drop_last: bool = False) -> list[list[Sample]]:
    """Return every row once, in shuffled order."""
    order = np.random.default_rng([seed, epoch]).permutation(len(codes)).tolist()
    return _make_batches([(epoch, row) for row in order], batch_size, drop_last)


def balanced(codes: np.ndarray, batch_size: int, seed: int, epoch: int, drop_last: bool = False) -> list[list[Sample]]:
    """Return as many samples as there are rows, with equal counts of each class in `codes` [N] (they differ by at most one).

    A class cycles through its rows in a new order each time, so no row repeats before all were used.
    Rows without a label (-1) are used once each.
    """
    random = make_generator(Stream.BALANCE, seed, epoch)
    samples = [(epoch, int(row)) for row in np.flatnonzero(codes < 0)]
    classes = random.permutation(np.unique(codes[codes >= 0]))
    quota, more = divmod(len(codes) - len(samples), max(len(classes), 1))
    for index, code in enumerate(classes):
        rows, count = np.flatnonzero(codes == code), quota + (index < more)
        passes = range(-(-count // len(rows)))
        samples += [(epoch + REPEAT * n, int(row)) for n in passes for row in random.permutation(rows)][:count]
    return _make_batches([samples[index] for index in random.permutation(len(samples))], batch_size, drop_last)


def _make_batches(samples: list[Sample], batch_size: int, drop_last: bool) -> list[list[Sample]]:
    """Return the samples in batches, as many as `count_batches` returns."""
    count = count_batches(len(samples), batch_size, drop_last)
    return [samples[i * batch_size : (i + 1) * batch_size] for i in range(count)]


SAMPLERS: dict[str, Sampler] = {"shuffle": shuffle, "balanced": balanced}

InFlight = TypeVar("InFlight")


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Return the same batches in the same order; on CUDA they are on the device, and the next copy starts before a batch is yielded.

    The copies use a separate CUDA stream. On a CPU, a loading thread would take as much time from the step as it saves.
    """
    if device.type != "cuda":
        return iter(batches)
    stream = _copy_stream(device)

    def send(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        pinned = batch if batch.images.is_pinned() else batch.pin_memory()
        with torch.cuda.stream(stream):
            return pinned.map(lambda tensor: tensor.to(device, non_blocking=True)), stream.record_event()

    def receive(sent: tuple[Batch, torch.cuda.Event]) -> Batch:
        """Return the batch to the compute stream, which waits for the copy; the copied memory is not reused before that."""
        batch, copied = sent
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in batch.tensors:
            tensor.record_stream(computing)
        return batch

    return prefetch_one(batches, send, receive)


def prefetch_one(
    batches: Iterable[Batch], send: Callable[[Batch], InFlight], receive: Callable[[InFlight], Batch]
) -> Iterator[Batch]:
    """Yield `receive(sent)` for each batch, after the next batch was sent."""
    waiting: list[InFlight] = []
    for batch in batches:
        waiting.append(send(batch))
        if len(waiting) > 1:
            yield receive(waiting.pop(0))
    yield from map(receive, waiting)


@lru_cache(maxsize=16)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream per device for all passes, because each stream keeps the memory it once allocated."""
    return torch.cuda.Stream(device)
