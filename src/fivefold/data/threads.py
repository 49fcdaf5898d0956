"""Work on many images by threads, which can be left in between."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fivefold.machine import count_cores

AHEAD = 4
"""So many results a thread wait to be taken, at most."""

T, R = TypeVar("T"), TypeVar("R")


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item, in order, by as many threads as there are cores; no more than AHEAD each wait to be taken.

    Who leaves before the end closes it, so that it waits for what is under way alone.
    """
    waiting = deque()
    pool = ThreadPoolExecutor(count_cores())
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD * count_cores():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
