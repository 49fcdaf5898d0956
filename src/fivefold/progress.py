"""Progress of long loops: a bar on a terminal, a line at intervals in a log."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from fivefold.log import log
from fivefold.signals import raise_if_stopped

T = TypeVar("T")
LOG_INTERVAL_S = 15.0
MIB = 2**20


def track(
    items: Iterable[T],
    total: int,
    label: str,
    every: float = LOG_INTERVAL_S,
    bytes_of: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """Yield the `items` and show their progress under `label` with the time left. Raise StoppedError after a stop signal.

    A log gets a line `every` so many seconds. `total` is the number of items, or with `bytes_of` the sum of their bytes.
    StoppedError is raised before an item is taken.
    """
    if log.level > logging.INFO:  # quiet, e.g. on ranks above 0: rank 0 shows the same progress
        yield from interruptible(items)
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        # A container's pseudo-terminal may report a width of 0, and tqdm would show no bar.
        has_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        options = {"dynamic_ncols": True} if has_width else {"ncols": 80}
        options |= {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if bytes_of else {}
        with tqdm(total=total, desc=label, leave=False, **options) as bar:
            for item in interruptible(items):
                yield item
                bar.update(bytes_of(item) if bytes_of else 1)
        return
    start = last = time.monotonic()
    done = 0
    for item in interruptible(items):
        now = time.monotonic()
        if done > 0 and now - last >= every:
            last = now
            seconds_left = (now - start) / done * max(0, total - done)
            amount = f"{done / MIB:.1f} of {total / MIB:.1f} MiB" if bytes_of else f"{done} of {total}"
            log.info("%s: %s, %s left", label, amount, format_duration(seconds_left))
        yield item
        done += bytes_of(item) if bytes_of else 1


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """Yield the `items`. Raise StoppedError, before an item is taken, if the process received a stop signal."""
    raise_if_stopped()
    for item in items:
        yield item
        raise_if_stopped()


def format_duration(seconds: float) -> str:
    """Format seconds: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
