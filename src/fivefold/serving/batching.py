"""One thread that runs the model on what concurrent requests bring, gathered into batches."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

log = logging.getLogger("fivefold")

SICK_AFTER = 3
"""So many batches that fail one after the other say that the model, not an image, is broken."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """An image on its way to the model: prepared, the future of its answer, and when it was ready."""

    image: Any
    answer: asyncio.Future[np.ndarray]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs `judge` (N prepared images -> rows [N, C]) in a thread of its own, on at most `size` images a time.

    The first image of a batch waits up to `max_wait` seconds for others, which a request that is alone does not:
    `under_way` says how many requests there are, `seen` hears how many images a batch had, and the thread calls
    `begin` first. Each row goes to the image that it was computed of.
    """

    def __init__(
        self,
        judge: Callable[[Sequence[Any]], np.ndarray],
        size: int,
        max_wait: float,
        under_way: Callable[[], int],
        seen: Callable[[int], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._judge, self._size, self._max_wait = judge, size, max_wait
        self._under_way, self._seen, self._begin = under_way, seen, begin
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._company = 0
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="model")
        self._thread.start()

    def ask(self, image: Any) -> asyncio.Future[np.ndarray]:
        """The row [C] of an image, to be awaited; one whose future is cancelled before its turn is left out."""
        waiting = Waiting(image, self._loop.create_future())
        with self._changed:
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.answer

    @property
    def healthy(self) -> bool:
        """Whether the thread runs, and its last batches did not all fail."""
        return self._thread.is_alive() and self._failures < SICK_AFTER

    def close(self) -> None:
        """Answers what waits, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        self._begin()
        while (batch := self._next()) is not None:
            waiting = [each for each in batch if not each.answer.cancelled()]
            if waiting:
                self._run(waiting)

    def _next(self) -> list[Waiting] | None:
        """The next batch, as soon as it is to go; None when there will be no other."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return None
            due = self._queue[0].since + self._max_wait
            self._changed.wait_for(self._complete, max(0.0, due - time.monotonic()))
            self._company = self._under_way()
            return [self._queue.popleft() for _ in range(min(self._size, len(self._queue)))]

    def _complete(self) -> bool:
        """Whether there is nothing to wait for: the batch is full, or its request is alone, as the one before was."""
        return len(self._queue) >= self._size or self._closed or max(self._under_way(), self._company) <= 1

    def _run(self, batch: Sequence[Waiting]) -> None:
        """Has the batch judged; one that fails is judged again image by image, so that one spoils no other."""
        try:
            rows = self._judge([each.image for each in batch])
            found = list(zip([each.answer for each in batch], rows, strict=True))
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch of %d images failed (%s); each is tried alone", len(batch), error)
                for each in batch:
                    self._run([each])
                return
            self._failures += 1
            log.exception("the model failed on an image")
            self._loop.call_soon_threadsafe(deliver, [(each.answer, error) for each in batch])
            return
        self._failures = 0
        self._seen(len(batch))
        self._loop.call_soon_threadsafe(deliver, found)


def deliver(found: Sequence[tuple[asyncio.Future, Any]]) -> None:
    """Gives each answer what was found, an Exception to be raised; one that was given up is left."""
    for answer, what in found:
        if answer.done():
            continue
        if isinstance(what, Exception):
            answer.set_exception(what)
        else:
            answer.set_result(what)
