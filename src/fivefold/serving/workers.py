"""Threads that decode images, with a limit on their total memory."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any

from fivefold.serving.batching import resolve_futures
from fivefold.system import free_memory

PIXEL_BYTES = 20
"""Maximum memory per pixel during decoding."""
SMALL_PIXELS = 1_000_000
"""An image with at most this many pixels may use the last idle thread."""


class Workers:
    """Threads that work on at most `pixels` at a time, the smallest first; 0: as many as fit a quarter of the free memory.

    A task counts until its thread has finished it, even if its caller no longer waits. One thread is
    reserved for small images, so that they do not wait for many large ones.
    """

    def __init__(self, threads: int, pixels: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._capacity = self._left = max(1, int(pixels or free_memory() / 4 / PIXEL_BYTES))
        self._waiting: list[tuple[int, int]] = []
        self._tasks: dict[int, tuple[asyncio.Future[Any], Callable[[], Any]]] = {}
        self._numbers = count()
        self._changed = threading.Condition()
        self._idle, self._last_done, self._closed = threads, time.monotonic(), False
        self._threads = [threading.Thread(target=self._work, name="images", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def start(self, pixels: int, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Queue `work` and return the future of its result; an Exception that it returns is raised. Cancel the future to skip it."""
        answer, number = self._loop.create_future(), next(self._numbers)
        self._tasks[number] = answer, partial(work, *arguments)
        answer.add_done_callback(lambda _: self._tasks.pop(number, None))
        with self._changed:
            heappush(self._waiting, (min(pixels, self._capacity), number))
            self._changed.notify()
        return answer

    def stalled(self, seconds: float) -> bool:
        """Return whether threads are busy and none has finished a task in the last `seconds`."""
        return self._idle < len(self._threads) and time.monotonic() - self._last_done > seconds

    def close(self) -> None:
        """End the threads without starting the queued tasks. A thread that is stuck in a decoder ends with the process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(1.0 / len(self._threads))

    def _work(self) -> None:
        import torch

        # By default every thread would start its own torch threads, which took 1.5 times as long on two cores.
        torch.set_num_threads(1)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._fits())
                if self._closed:
                    return
                pixels, number = heappop(self._waiting)
                answer, work = self._tasks.pop(number, (None, lambda: None))
                if self._idle == len(self._threads):
                    self._last_done = time.monotonic()
                self._left, self._idle = self._left - pixels, self._idle - 1
            try:
                result = work()
            except Exception as error:
                result = error
            with self._changed:
                self._left, self._idle, self._last_done = self._left + pixels, self._idle + 1, time.monotonic()
                self._changed.notify_all()
                if answer and not self._closed:
                    self._loop.call_soon_threadsafe(resolve_futures, [(answer, result)])
            answer = work = result = None  # free their memory before the next task

    def _fits(self) -> bool:
        """Return whether the smallest queued task may start."""
        return bool(self._waiting) and self._waiting[0][0] <= (
            min(self._left, SMALL_PIXELS) if self._idle == 1 else self._left
        )
