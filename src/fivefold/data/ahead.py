"""Batches on the device, one ahead of the step: on CUDA the next one goes there while a step runs."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from fivefold.data.dataset import Batch

Sent = TypeVar("Sent")


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches in the same order; on CUDA they lie on the device, and the next is on its way before one is given out.

    It goes by a stream of its own, so that no step waits for a copy that could have been made during the one before.
    Elsewhere nothing is read ahead: a thread that loads on a CPU takes from the step what it saves.
    """
    if device.type != "cuda":
        return iter(batches)
    lane = _Lane(iter(batches), device)
    return one_ahead(lane.send, lane.receive)


def one_ahead(send: Callable[[], Sent | None], receive: Callable[[Sent], Batch]) -> Iterator[Batch]:
    """What `receive` makes of each thing that was sent, when the next one is sent already; `send` gives None at the end."""
    coming = send()
    while coming is not None:
        following = send()
        yield receive(coming)
        coming = following


class _Lane:
    """A stream beside the one that computes. What is made or copied here is waited for there, by the device alone."""

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.stream = _stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # for pixels that lie on the device already

    def send(self) -> tuple[Batch, torch.cuda.Event] | None:
        """The next batch on its way to the device, and what happens when it is there."""
        with torch.cuda.stream(self.stream):
            batch = next(self.batches, None)
            if batch is None:
                return None
            pinned = batch if batch.images.is_cuda or batch.images.is_pinned() else batch.pin_memory()
            moved = Batch(*(None if each is None else self._moved(each) for each in _tensors(pinned)))
            return moved, self.stream.record_event()

    def receive(self, sent: tuple[Batch, torch.cuda.Event]) -> Batch:
        """The batch, for the stream that computes: it waits for the event, and the memory is not used anew before it is done."""
        batch, there = sent
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(there)
        for each in _tensors(batch):
            if each is not None:
                each.record_stream(computing)
        return batch

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def _tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.images, batch.rows, batch.meta


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all passes: a stream keeps the memory that it once had for itself."""
    return torch.cuda.Stream(device)
