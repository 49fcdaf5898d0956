"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from fivefold.stopping import poll

T = TypeVar("T")
log = logging.getLogger("fivefold")
SECONDS_BETWEEN_LINES = 15.0
MIB = 2**20


def track(items: Iterable[T], total: int, label: str, every: float = SECONDS_BETWEEN_LINES) -> Iterator[T]:
    """`items` one by one, while their progress shows under `label` with the time left; a place to be stopped at.

    In a log that is a line `every` so many seconds. Raises StoppedError, before an item is taken, when the process
    was told to stop.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        # A terminal that a container makes up may say that it is 0 wide, and the bar would not show.
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        width = {"dynamic_ncols": True} if known else {"ncols": 80}
        yield from stoppable(tqdm(items, total=total, desc=label, leave=False, **width))
        return
    start = last = time.monotonic()
    for done, item in enumerate(stoppable(items)):
        now = time.monotonic()
        if done and now - last >= every:
            last = now
            left = (now - start) / done * max(0, total - done)
            log.info("%s: %d of %d, %s left", label, done, total, duration(left))
        yield item


def meter(steps: Iterable[int], total: int, label: str, every: float = SECONDS_BETWEEN_LINES) -> None:
    """Takes all `steps`, each a number of bytes, while their sum of `total` shows under `label`; stopped as `track` is."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, leave=False, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            for step in stoppable(steps):
                bar.update(step)
        return
    start = last = time.monotonic()
    done = 0
    for step in stoppable(steps):
        done, now = done + step, time.monotonic()
        if done > 0 and now - last >= every:
            last = now
            left = (now - start) / done * max(0, total - done)
            log.info("%s: %.1f of %.1f MiB, %s left", label, done / MIB, total / MIB, duration(left))


def stoppable(items: Iterable[T]) -> Iterator[T]:
    """`items` one by one; StoppedError, before one is taken, when the process was told to stop."""
    poll()
    for item in items:
        yield item
        poll()


def duration(seconds: float) -> str:
    """Seconds as people say them: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
