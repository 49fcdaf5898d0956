"""Batches go to a GPU one ahead of the step that has them; on a CPU nothing is read ahead."""

from collections.abc import Iterator

import pytest
import torch

from fivefold.data.pipeline.dataset import Batch
from fivefold.data.pipeline.loader import prefetch_one, prefetch_to_device
from fivefold.errors import DataError


def batches(count: int, read: list[int], meta: bool = False) -> Iterator[Batch]:
    """Batches of 4 images, channels last; `read` is told of each."""
    drawn = torch.Generator().manual_seed(0)
    for number in range(count):
        read.append(number)
        pixels = torch.randint(0, 256, (4, 96, 80, 3), dtype=torch.uint8, generator=drawn)
        company = torch.randn(4, 2, generator=drawn) if meta else None
        yield Batch(pixels.permute(0, 3, 1, 2), torch.arange(4) + 4 * number, company)


def test_on_a_cpu_a_batch_is_read_when_it_is_asked_for_and_given_as_it_is():
    read: list[int] = []
    given = batches(3, read)
    assert prefetch_to_device(given, torch.device("cpu")) is given
    next(given)
    assert read == [0]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_is_sent_before_the_one_before_it_is_given_out_and_none_twice_or_lost(count):
    events: list[str] = []
    stepping = prefetch_one(
        range(count),
        lambda number: events.append(f"send {number}") or number,
        lambda number: events.append(f"receive {number}") or number,
    )
    assert list(stepping) == list(range(count))
    sent = [f"send {number}" for number in range(count)]
    received = [f"receive {number}" for number in range(count)]
    pairs = [event for pair in zip(sent[1:], received, strict=False) for event in pair]
    assert events == sent[:1] + pairs + received[-1:]


def test_what_cannot_be_read_is_said_by_the_step_before():
    def broken() -> Iterator[Batch]:
        yield from batches(2, [])
        raise DataError("2.png cannot be decoded")

    stepping = prefetch_one(broken(), lambda batch: batch, lambda batch: batch)
    next(stepping)
    with pytest.raises(DataError, match=r"2\.png"):
        next(stepping)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [True, False])
def test_on_a_gpu_the_batches_are_the_same_while_others_are_copied_and_memory_is_used_anew(pinned):
    cuda = torch.device("cuda")
    given = (batch.pin_memory() if pinned else batch for batch in batches(40, [], meta=True))
    kept = []
    for batch in prefetch_to_device(given, cuda):
        assert batch.images.is_cuda
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        torch.cuda._sleep(2_000_000)  # the step is still to begin when the next ones are copied
        kept.append((batch.images.float().sum(dim=(1, 2, 3)), batch.rows + 0, batch.meta * 1))
        del batch
    for (sums, rows, meta), expected in zip(kept, batches(40, [], meta=True), strict=True):
        assert torch.equal(sums.cpu(), expected.images.float().sum(dim=(1, 2, 3)))
        assert torch.equal(rows.cpu(), expected.rows)
        assert torch.equal(meta.cpu(), expected.meta)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_batch_waits_for_the_device():
    given = [batch.pin_memory() for batch in batches(6, [], meta=True)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(prefetch_to_device(given, torch.device("cuda")))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 6
