"""Batches on the device, one ahead of the step: on CUDA the next one goes there while a step runs."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch

from fivefold.data.dataset import Batch

Sent = TypeVar("Sent")


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches in the same order; on CUDA they lie on the device, and the next is on its way before one is given out.

    It goes by a stream of its own, so that no step waits for a copy that could have been made during the one before.
    Elsewhere nothing is read ahead: a thread that loads on a CPU takes from the step what it saves.
    """
    if device.type != "cuda":
        return iter(batches)
    stream = _copying_stream(device)

    def send(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        pinned = batch if batch.images.is_pinned() else batch.pin_memory()
        with torch.cuda.stream(stream):
            return pinned.map(lambda tensor: tensor.to(device, non_blocking=True)), stream.record_event()

    def receive(sent: tuple[Batch, torch.cuda.Event]) -> Batch:
        """The batch for the stream that computes, which waits for the copy; the memory is not used anew before it is done."""
        batch, copied = sent
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in batch.tensors:
            tensor.record_stream(computing)
        return batch

    return one_ahead(batches, send, receive)


def one_ahead(
    batches: Iterable[Batch], send: Callable[[Batch], Sent], receive: Callable[[Sent], Batch]
) -> Iterator[Batch]:
    """What `receive` makes of each batch that was sent, when the next one is sent already."""
    waiting: list[Sent] = []
    for batch in batches:
        waiting.append(send(batch))
        if len(waiting) > 1:
            yield receive(waiting.pop(0))
    yield from map(receive, waiting)


@lru_cache(maxsize=16)
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all passes: a stream keeps the memory that it once had for itself."""
    return torch.cuda.Stream(device)
