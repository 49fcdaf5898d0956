import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch  # noqa: F401  (a worker imports it, which may take longer than a test waits)

from fivefold.serving.workers import SMALL_PIXELS, Workers

TIMEOUT_S = 10.0


class BlockingTask:
    """A task that blocks while `gate` is clear and records the order of its starts and the largest number of concurrent runs."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started: list[str] = []
        self.running, self.max_running = 0, 0
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        with self._lock:
            self.started.append(name)
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        self.gate.wait(TIMEOUT_S)
        with self._lock:
            self.running -= 1
        return name


def run_with_workers(
    work: Callable[[Workers, BlockingTask], Awaitable[Any]], threads: int, pixels: float
) -> tuple[Any, BlockingTask]:
    """Run `work` with workers, close them, and return the result and the task."""

    async def run() -> Any:
        workers, task = Workers(threads, pixels), BlockingTask()
        try:
            return await asyncio.wait_for(work(workers, task), TIMEOUT_S), task
        finally:
            task.gate.set()
            workers.close()

    return asyncio.run(run())


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("pixels", "max_running"), [(9, 1), (20, 2), (29, 2), (1000, 3)])
def test_pixels_decoded_at_once_stay_within_the_limit(pixels: int, max_running: int) -> None:
    async def start_six(workers: Workers, task: BlockingTask) -> list[str]:
        futures = [workers.start(10, task, name) for name in "abcdef"]
        await wait_until(lambda: len(task.started) == max_running)
        await asyncio.sleep(0.05)
        task.gate.set()
        return await asyncio.gather(*futures)

    results, task = run_with_workers(start_six, 3, pixels)
    assert (results, task.max_running) == (list("abcdef"), max_running)


def test_smallest_image_runs_first_and_small_images_have_a_reserved_thread() -> None:
    async def start_large_then_small(workers: Workers, task: BlockingTask) -> None:
        large = [workers.start(SMALL_PIXELS + 1, task, name) for name in ("large", "larger", "largest")]
        await wait_until(lambda: len(task.started) == 2)
        await asyncio.sleep(0.05)
        small = workers.start(SMALL_PIXELS, task, "small")
        await wait_until(lambda: len(task.started) == 3)
        later = [workers.start(size, task, str(size)) for size in (3, 2, 1)]
        task.gate.set()
        await asyncio.gather(*large, small, *later)

    _, task = run_with_workers(start_large_then_small, 3, 100 * SMALL_PIXELS)
    assert (task.started[:3], task.started[-1]) == (["large", "larger", "small"], "largest")


def test_cancelled_work_does_not_start_and_running_work_counts_until_it_ends() -> None:
    async def cancel_both(workers: Workers, task: BlockingTask) -> list[str]:
        running, waiting = workers.start(10, task, "running"), workers.start(10, task, "waiting")
        await wait_until(lambda: task.started == ["running"])
        waiting.cancel()
        running.cancel()
        last = workers.start(10, task, "last")
        await asyncio.sleep(0.1)
        started = list(task.started)
        task.gate.set()
        await last
        return started

    started, task = run_with_workers(cancel_both, 3, 10)
    assert started == ["running"]
    assert task.started == ["running", "last"]


def test_caller_gets_its_own_exception_whether_raised_or_returned() -> None:
    async def start_failing(workers: Workers, _: BlockingTask) -> list[Any]:
        futures = [workers.start(1, int, "x"), workers.start(1, lambda: KeyError("y")), workers.start(1, str, 7)]
        return await asyncio.gather(*futures, return_exceptions=True)

    results, _ = run_with_workers(start_failing, 1, 0)
    assert list(map(type, results)) == [ValueError, KeyError, str]
