"""Prefetch copies the next batch to a GPU during the current step; on a CPU it reads nothing ahead."""

from collections.abc import Iterator

import pytest
import torch

from fivefold.data.pipeline.dataset import Batch
from fivefold.data.pipeline.loader import prefetch_one, prefetch_to_device


def make_batches(count: int, read: list[int], meta: bool = False) -> Iterator[Batch]:
    """Yield batches of 4 images, channels last; append the number of each to `read`."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        read.append(number)
        pixels = torch.randint(0, 256, (4, 96, 80, 3), dtype=torch.uint8, generator=generator)
        features = torch.randn(4, 2, generator=generator) if meta else None
        yield Batch(pixels.permute(0, 3, 1, 2), torch.arange(4) + 4 * number, features)


def test_cpu_prefetch_returns_the_source_unchanged():
    read: list[int] = []
    source = make_batches(3, read)
    assert prefetch_to_device(source, torch.device("cpu")) is source
    next(source)
    assert read == [0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_prefetch_sends_each_item_once_before_returning_the_previous_one(count):
    events: list[str] = []
    prefetched = prefetch_one(
        range(count),
        lambda number: events.append(f"send {number}") or number,
        lambda number: events.append(f"receive {number}") or number,
    )
    assert list(prefetched) == list(range(count))
    sent = [f"send {number}" for number in range(count)]
    received = [f"receive {number}" for number in range(count)]
    pairs = [event for pair in zip(sent[1:], received, strict=False) for event in pair]
    assert events == sent[:1] + pairs + received[-1:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [True, False])
def test_gpu_batches_are_correct_while_others_are_copied_and_memory_is_reused(pinned):
    cuda = torch.device("cuda")
    source = (batch.pin_memory() if pinned else batch for batch in make_batches(40, [], meta=True))
    results = []
    for batch in prefetch_to_device(source, cuda):
        assert batch.images.is_cuda
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        torch.cuda._sleep(2_000_000)  # the step has not begun when the next batches are copied
        results.append((batch.images.float().sum(dim=(1, 2, 3)), batch.rows + 0, batch.meta * 1))
        del batch
    for (sums, rows, meta), expected in zip(results, make_batches(40, [], meta=True), strict=True):
        assert torch.equal(sums.cpu(), expected.images.float().sum(dim=(1, 2, 3)))
        assert torch.equal(rows.cpu(), expected.rows)
        assert torch.equal(meta.cpu(), expected.meta)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_prefetch_does_not_synchronize_with_the_device():
    source = [batch.pin_memory() for batch in make_batches(6, [], meta=True)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefetched = list(prefetch_to_device(source, torch.device("cuda")))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(prefetched) == 6
