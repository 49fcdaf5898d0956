"""Dynamic batching: one thread runs the model on batches of images from concurrent requests."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fivefold.log import log

MAX_FAILURES = 3
"""After this many consecutive failed batches the model counts as broken."""


class Batcher:
    """Run `predict` (N prepared images -> rows [N, C]) in its own thread, on at most `size` images at a time.

    The first image of a batch waits up to `max_wait` seconds for others. A single request does not wait:
    `in_flight` returns the number of requests in flight. `seen` gets the number of images of each batch. The thread
    calls `begin` first. Each image gets its own row.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Any]], np.ndarray],
        size: int,
        max_wait: float,
        in_flight: Callable[[], int],
        seen: Callable[[int], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._predict, self._size, self._max_wait = predict, size, max_wait
        self._under_way, self._seen, self._begin = in_flight, seen, begin
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Any, asyncio.Future[np.ndarray], float]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._last_requests = 0
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="model")
        self._thread.start()

    def submit(self, image: Any) -> asyncio.Future[np.ndarray]:
        """Queue an image and return the future of its row [C]; if the future is cancelled before its batch, it is skipped."""
        result = self._loop.create_future()
        with self._changed:
            self._queue.append((image, result, time.monotonic()))
            self._changed.notify()
        return result

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and the last batches did not all fail."""
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    def close(self) -> None:
        """Process the queued images and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        self._begin()
        while (batch := self._next()) is not None:
            if waiting := [(image, result) for image, result, _ in batch if not result.cancelled()]:
                self._run(waiting)

    def _next(self) -> list[tuple[Any, asyncio.Future[np.ndarray], float]] | None:
        """Return the next batch as soon as it is due; None after `close` if the queue is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return None
            due = self._queue[0][2] + self._max_wait
            self._changed.wait_for(self._complete, max(0.0, due - time.monotonic()))
            self._last_requests = self._under_way()
            return [self._queue.popleft() for _ in range(min(self._size, len(self._queue)))]

    def _complete(self) -> bool:
        """Return whether the batch need not wait: it is full, or this and the previous batch had a single request."""
        return len(self._queue) >= self._size or self._closed or max(self._under_way(), self._last_requests) <= 1

    def _run(self, batch: Sequence[tuple[Any, asyncio.Future[np.ndarray]]]) -> None:
        """Run the model on a batch; if it fails, retry image by image, so that a bad image does not fail the others."""
        images, futures = zip(*batch, strict=True)
        try:
            results = list(zip(futures, self._predict(images), strict=True))
            self._failures = 0
            self._seen(len(batch))
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch of %d images failed (%s); retrying image by image", len(batch), error)
                for entry in batch:
                    self._run([entry])
                return
            self._failures += 1
            log.exception("the model failed on an image")
            results = [(futures[0], error)]
        self._loop.call_soon_threadsafe(resolve_futures, results)


def resolve_futures(results: Sequence[tuple[asyncio.Future, Any]]) -> None:
    """Resolve each future of (future, result): raise an Exception, return other results; skip futures that are done."""
    for future, result in results:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
