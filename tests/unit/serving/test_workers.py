"""Threads that share a bound of pixels: what waits for what, and what is left out."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch  # noqa: F401  (a worker imports it, which may take longer than a test waits)

from fivefold.serving.workers import SMALL_PIXELS, Workers

LONG = 10.0


class Work:
    """Pieces of work that are held at `gate`: those begun, in order, and how many ran at once at most."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[str] = []
        self.at_once, self.most = 0, 0
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        with self._lock:
            self.begun.append(name)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        self.gate.wait(LONG)
        with self._lock:
            self.at_once -= 1
        return name


def with_workers(work: Callable[[Workers, Work], Awaitable[Any]], threads: int, pixels: float) -> tuple[Any, Work]:
    """What `work` gives with threads that are closed after it, and its pieces."""

    async def whole() -> Any:
        workers, pieces = Workers(threads, pixels), Work()
        try:
            return await asyncio.wait_for(work(workers, pieces), LONG), pieces
        finally:
            pieces.gate.set()
            workers.close()

    return asyncio.run(whole())


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("pixels", "most"), [(9, 1), (20, 2), (29, 2), (1000, 3)])
def test_no_more_pixels_are_decoded_at_once_than_there_is_room_for(pixels: int, most: int) -> None:
    async def work(workers: Workers, pieces: Work) -> list[str]:
        asked = [workers.start(10, pieces, name) for name in "abcdef"]
        await until(lambda: len(pieces.begun) == most)
        await asyncio.sleep(0.05)
        pieces.gate.set()
        return await asyncio.gather(*asked)

    found, pieces = with_workers(work, 3, pixels)
    assert found == list("abcdef")
    assert pieces.most == most


def test_the_smallest_goes_first_and_has_a_thread_that_no_large_one_takes() -> None:
    async def work(workers: Workers, pieces: Work) -> None:
        large = [workers.start(SMALL_PIXELS + 1, pieces, name) for name in ("large", "larger", "largest")]
        await until(lambda: len(pieces.begun) == 2)
        await asyncio.sleep(0.05)
        small = workers.start(SMALL_PIXELS, pieces, "small")
        await until(lambda: len(pieces.begun) == 3)
        later = [workers.start(size, pieces, str(size)) for size in (3, 2, 1)]
        pieces.gate.set()
        await asyncio.gather(*large, small, *later)

    _, pieces = with_workers(work, 3, 100 * SMALL_PIXELS)
    assert (pieces.begun[:3], pieces.begun[-1]) == (["large", "larger", "small"], "largest")
    assert pieces.most == 3


def test_who_gives_up_is_not_begun_and_what_runs_counts_until_it_ends() -> None:
    async def work(workers: Workers, pieces: Work) -> list[str]:
        running, waiting = workers.start(10, pieces, "running"), workers.start(10, pieces, "waiting")
        await until(lambda: pieces.begun == ["running"])
        waiting.cancel()
        running.cancel()
        last = workers.start(10, pieces, "last")
        await asyncio.sleep(0.1)
        before = list(pieces.begun)
        pieces.gate.set()
        await last
        return before

    before, pieces = with_workers(work, 3, 10)
    assert before == ["running"]
    assert pieces.begun == ["running", "last"]


def test_an_exception_is_raised_to_its_own_asker_whether_raised_or_given() -> None:
    def fail(raised: bool) -> ValueError:
        if raised:
            raise ValueError("raised")
        return ValueError("given")

    async def work(workers: Workers, _: Work) -> list[Any]:
        asked = [workers.start(1, fail, True), workers.start(1, fail, False), workers.start(1, str, 7)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found, _ = with_workers(work, 1, 0)
    assert [str(each) for each in found] == ["raised", "given", "7"]
    assert [type(each) for each in found] == [ValueError, ValueError, str]


def test_threads_that_do_not_end_are_told_and_do_not_hold_up_the_end() -> None:
    async def work(workers: Workers, pieces: Work) -> list[bool]:
        await asyncio.sleep(0.2)
        idle = workers.stalled(0.1)
        stuck = workers.start(1, pieces, "stuck")
        await until(lambda: bool(pieces.begun))
        early = workers.stalled(0.1)
        await asyncio.sleep(0.2)
        late, begun = workers.stalled(0.1), time.monotonic()
        workers.close()
        assert time.monotonic() - begun < LONG / 2
        stuck.cancel()
        return [idle, early, late]

    assert with_workers(work, 2, 0)[0] == [False, False, True]
