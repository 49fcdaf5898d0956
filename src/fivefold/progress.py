"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from fivefold.stopping import poll

T = TypeVar("T")
log = logging.getLogger("fivefold")
SECONDS_BETWEEN_LINES = 15.0
MIB = 2**20


def track(
    items: Iterable[T],
    total: int,
    label: str,
    every: float = SECONDS_BETWEEN_LINES,
    bytes_of: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """`items` one by one, while their progress shows under `label` with the time left; a place to be stopped at.

    In a log that is a line `every` so many seconds. `total` counts the items, or with `bytes_of` the bytes that they
    stand for. Raises StoppedError, before an item is taken, when the process was told to stop.
    """
    if log.level > logging.INFO:  # told to be quiet, as a process is whose neighbour shows the same progress
        yield from stoppable(items)
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        # A terminal that a container makes up may say that it is 0 wide, and the bar would not show.
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        look = {"dynamic_ncols": True} if known else {"ncols": 80}
        look |= {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if bytes_of else {}
        with tqdm(total=total, desc=label, leave=False, **look) as bar:
            for item in stoppable(items):
                yield item
                bar.update(bytes_of(item) if bytes_of else 1)
        return
    start = last = time.monotonic()
    done = 0
    for item in stoppable(items):
        now = time.monotonic()
        if done > 0 and now - last >= every:
            last = now
            left = (now - start) / done * max(0, total - done)
            amount = f"{done / MIB:.1f} of {total / MIB:.1f} MiB" if bytes_of else f"{done} of {total}"
            log.info("%s: %s, %s left", label, amount, duration(left))
        yield item
        done += bytes_of(item) if bytes_of else 1


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
