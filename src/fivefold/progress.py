"""Progress of long loops: a bar on a terminal, a line at intervals in a log."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from fivefold.log import log
from fivefold.signals import raise_if_stopped

T = TypeVar("T")
LOG_INTERVAL_S = 15.0
MIB = 2**20


def track(items: Iterable[T], total: int, label: str, every: float = LOG_INTERVAL_S) -> Iterator[T]:
    """Yield the `total` items and show their progress under `label` with the time left. Raise StoppedError after a stop signal.

    A log gets a line `every` so many seconds. StoppedError is raised before an item is taken.
    """
    if log.level <= logging.INFO and sys.stderr.isatty():  # ranks above 0 log warnings only
        # A container's pseudo-terminal may report a size of 0, and tqdm would show no bar.
        yield from tqdm(interruptible(items), label, total, leave=False, ncols=80, nrows=24)
        return
    start = last = time.monotonic()
    for done, item in enumerate(interruptible(items)):
        now = time.monotonic()
        if done > 0 and now - last >= every:
            last = now
            seconds_left = (now - start) / done * max(0, total - done)
            log.info("%s: %d of %d, %s left", label, done, total, format_duration(seconds_left))
        yield item


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """Yield the `items`. Raise StoppedError, before an item is taken, if the process received a stop signal."""
    raise_if_stopped()
    for item in items:
        yield item
        raise_if_stopped()


def format_duration(seconds: float) -> str:
    """Format seconds: `03:20`, `2:05:00`."""
    return tqdm.format_interval(seconds)
