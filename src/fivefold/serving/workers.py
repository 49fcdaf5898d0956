"""Threads that decode images, with a bound on the memory that they take together."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any

from fivefold.machine import free_memory
from fivefold.serving.batching import deliver

PIXEL_BYTES = 20
"""What a pixel takes at most while it is decoded."""
SMALL = 1_000_000
"""Pixels up to which an image may have the last idle thread."""
PATIENCE = 1.0
"""Seconds that the end waits for threads; one that is stuck in a decoder ends with the process."""


class Workers:
    """Threads for work on at most `pixels` at a time, the smallest first; 0: as many as a quarter of the free memory holds.

    A piece of work counts until its thread is done with it, also where nobody waits for it any more. One thread is
    kept for small ones: many large images at once do not have a small one wait for them.
    """

    def __init__(self, threads: int, pixels: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._most = self._left = max(1, int(pixels or free_memory() / 4 / PIXEL_BYTES))
        self._waiting: list[tuple[int, int]] = []
        self._pieces: dict[int, tuple[asyncio.Future[Any], Callable[[], Any]]] = {}
        self._numbers = count()
        self._changed = threading.Condition()
        self._idle, self._moved, self._closed = threads, time.monotonic(), False
        self._threads = [threading.Thread(target=self._work, name="images", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def start(self, pixels: int, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """What `work` gives, or an Exception that it gives raised; it is left out if this is cancelled before its turn."""
        answer, number = self._loop.create_future(), next(self._numbers)
        self._pieces[number] = answer, partial(work, *arguments)
        answer.add_done_callback(lambda _: self._pieces.pop(number, None))
        with self._changed:
            heappush(self._waiting, (min(pixels, self._most), number))
            self._changed.notify()
        return answer

    def stalled(self, seconds: float) -> bool:
        """Whether threads are at work and none was done in the last `seconds`."""
        return self._idle < len(self._threads) and time.monotonic() - self._moved > seconds

    def close(self) -> None:
        """Ends the threads; what waits is not begun."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(PATIENCE / len(self._threads))

    def _work(self) -> None:
        import torch

        # Each thread that works with torch would have as many of its own: on two cores images took half as long again.
        torch.set_num_threads(1)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._fits())
                if self._closed:
                    return
                pixels, number = heappop(self._waiting)
                answer, work = self._pieces.pop(number, (None, lambda: None))
                if self._idle == len(self._threads):
                    self._moved = time.monotonic()
                self._left, self._idle = self._left - pixels, self._idle - 1
            try:
                found = work()
            except Exception as error:
                found = error
            with self._changed:
                self._left, self._idle, self._moved = self._left + pixels, self._idle + 1, time.monotonic()
                self._changed.notify_all()
                if answer and not self._closed:
                    self._loop.call_soon_threadsafe(deliver, [(answer, found)])
            answer = work = found = None  # what they hold is not to stay until the next piece comes

    def _fits(self) -> bool:
        """Whether the smallest piece that waits may begin."""
        return bool(self._waiting) and self._waiting[0][0] <= (
            min(self._left, SMALL) if self._idle == 1 else self._left
        )
