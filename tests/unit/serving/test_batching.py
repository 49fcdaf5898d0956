import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from fivefold.serving.batching import Batcher

TIMEOUT_S = 5.0
"""Upper bound in seconds; a test that waits this long has failed."""


class FakeModel:
    """A model that maps x to [x, 2x] and records its batches; it blocks while `gate` is clear."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, numbers: Sequence[int]) -> np.ndarray:
        self.gate.wait(TIMEOUT_S)
        self.batches.append(list(numbers))
        if min(numbers) < 0:
            raise ValueError("a number below 0")
        return np.array([[number, 2 * number] for number in numbers], np.float32)


def run_with_batcher(
    work: Callable[[Batcher, FakeModel], Awaitable[Any]], size: int = 4, wait: float = TIMEOUT_S, in_flight: int = 9
) -> tuple[Any, FakeModel]:
    """Run `work` with a batcher, close the batcher, and return the result and the model."""

    async def run() -> tuple[Any, FakeModel]:
        model = FakeModel()
        batcher = Batcher(model, size, wait, lambda: in_flight, lambda _: None)
        try:
            return await asyncio.wait_for(work(batcher, model), TIMEOUT_S), model
        finally:
            model.gate.set()
            batcher.close()

    return asyncio.run(run())


async def submit_all(batcher: Batcher, numbers: Sequence[int]) -> list[Any]:
    rows = await asyncio.gather(*map(batcher.submit, numbers), return_exceptions=True)
    return [row if isinstance(row, Exception) else row.tolist() for row in rows]


def test_each_request_gets_its_row_and_batches_do_not_exceed_the_limit() -> None:
    rows, model = run_with_batcher(lambda batcher, _: submit_all(batcher, range(20)))
    assert rows == [[number, 2 * number] for number in range(20)]
    assert model.batches == [list(range(start, start + 4)) for start in range(0, 20, 4)]


def test_first_request_waits_for_others_up_to_the_maximum_wait() -> None:
    async def send_one_by_one(batcher: Batcher, _: FakeModel) -> None:
        await batcher.submit(1)
        await batcher.submit(2)

    start = time.monotonic()
    assert run_with_batcher(send_one_by_one, wait=0.1)[1].batches == [[1], [2]]
    assert 0.2 <= time.monotonic() - start < TIMEOUT_S

    async def send_together(batcher: Batcher, _: FakeModel) -> None:
        first = batcher.submit(1)
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batcher.submit(2), batcher.submit(3))

    assert run_with_batcher(send_together, size=3)[1].batches == [[1, 2, 3]]


def test_single_request_does_not_wait() -> None:
    start = time.monotonic()
    assert run_with_batcher(lambda batcher, _: submit_all(batcher, [1]), in_flight=1)[1].batches == [[1]]
    assert time.monotonic() - start < TIMEOUT_S / 2


def test_requests_that_arrive_while_the_model_runs_form_the_next_batch() -> None:
    async def send_while_busy(batcher: Batcher, model: FakeModel) -> None:
        model.gate.clear()
        first = batcher.submit(0)
        await asyncio.sleep(0.05)
        rest = asyncio.gather(*map(batcher.submit, range(1, 4)))
        await asyncio.sleep(0.05)
        model.gate.set()
        await first
        await rest

    assert run_with_batcher(send_while_busy, wait=0)[1].batches == [[0], [1, 2, 3]]


def test_failing_request_does_not_fail_others_in_its_batch() -> None:
    rows, _ = run_with_batcher(lambda batcher, _: submit_all(batcher, [1, -1, 3, 4]))
    assert isinstance(rows.pop(1), ValueError)
    assert rows == [[1, 2], [3, 6], [4, 8]]
