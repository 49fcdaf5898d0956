"""The thread that runs the model: who shares a batch, who waits, who is left out, and what a failure does to others."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from fivefold.serving.batching import Batcher

T = TypeVar("T")
LONG = 5.0
"""Seconds that no test would wait if it had to."""


class Network:
    """A model whose word on the number x is [x, 2x], and the batches that it was given; it stops at `gate`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, numbers: Sequence[int]) -> np.ndarray:
        self.gate.wait(LONG)
        self.batches.append(list(numbers))
        if any(number < 0 for number in numbers):
            raise ValueError("a number below 0")
        return np.array([[number, 2 * number] for number in numbers], np.float32)


def with_batcher(
    work: Callable[[Batcher, Network], Awaitable[T]], size: int = 4, wait: float = LONG, under_way: int = 9
) -> tuple[T, Network]:
    """What `work` gives with a batcher that is closed after it."""

    async def whole() -> tuple[T, Network]:
        network = Network()
        batcher = Batcher(network, size, wait, lambda: under_way, lambda _: None)
        try:
            return await asyncio.wait_for(work(batcher, network), LONG), network
        finally:
            network.gate.set()
            batcher.close()

    return asyncio.run(whole())


async def answers(batcher: Batcher, numbers: Sequence[int]) -> list[Any]:
    rows = await asyncio.gather(*map(batcher.submit, numbers), return_exceptions=True)
    return [each if isinstance(each, Exception) else each.tolist() for each in rows]


def test_each_gets_its_own_row_in_batches_no_larger_than_the_limit() -> None:
    found, network = with_batcher(lambda batcher, _: answers(batcher, range(20)))
    assert found == [[number, 2 * number] for number in range(20)]
    assert [len(batch) for batch in network.batches] == [4] * 5
    assert [number for batch in network.batches for number in batch] == list(range(20))


def test_the_first_waits_for_others_and_no_longer_than_it_may() -> None:
    async def work(batcher: Batcher, network: Network) -> list[Any]:
        first = batcher.submit(1)
        await asyncio.sleep(0.05)
        return [row.tolist() for row in (await first, await batcher.submit(2))]

    begun = time.monotonic()
    found, network = with_batcher(work, wait=0.3)
    assert found == [[1, 2], [2, 4]]
    assert network.batches == [[1], [2]]
    assert 0.6 <= time.monotonic() - begun < LONG

    async def together(batcher: Batcher, network: Network) -> list[Any]:
        first = batcher.submit(1)
        await asyncio.sleep(0.05)
        return await asyncio.gather(first, batcher.submit(2), batcher.submit(3))

    assert with_batcher(together, size=3)[1].batches == [[1, 2, 3]]


def test_who_is_alone_does_not_wait() -> None:
    begun = time.monotonic()
    _, network = with_batcher(lambda batcher, _: answers(batcher, [1]), under_way=1)
    assert network.batches == [[1]]
    assert time.monotonic() - begun < LONG / 2


def test_what_comes_while_the_model_works_is_the_next_batch() -> None:
    async def work(batcher: Batcher, network: Network) -> None:
        network.gate.clear()
        first = batcher.submit(0)
        await asyncio.sleep(0.1)
        rest = asyncio.gather(*map(batcher.submit, range(1, 4)))
        await asyncio.sleep(0.1)
        network.gate.set()
        await first
        await rest

    assert with_batcher(work, wait=0)[1].batches == [[0], [1, 2, 3]]


def test_one_that_fails_fails_alone() -> None:
    found, _ = with_batcher(lambda batcher, _: answers(batcher, [1, -1, 3, 4]))
    assert [found[at] for at in (0, 2, 3)] == [[1, 2], [3, 6], [4, 8]]
    assert isinstance(found[1], ValueError)
