"""Prefetch batches to the device: on CUDA, copy the next batch while the current step runs."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch

from fivefold.data.pipeline.dataset import Batch

InFlight = TypeVar("Sent")


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Return the same batches in the same order; on CUDA they are on the device, and the next copy starts before a batch is yielded.

    The copies use a separate CUDA stream, so a step does not wait for a copy that can run during the previous step.
    On other devices nothing is prefetched: on a CPU, a loading thread takes as much time from the step as it saves.
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

    return one_ahead(batches, send, receive)


def one_ahead(
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
