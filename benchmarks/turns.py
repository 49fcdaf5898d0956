"""Processes that live side by side and take turns, pass by pass, so that what is compared is seconds apart.

A machine that others share may change its speed by a third within half a minute, and a whole process takes about as long.
Here one process works while the others wait: each of them says that it comes to a pass (`my_turn`), and goes on when
it is told to. What it does between two passes is in its turn too, so nothing is at work beside a pass.
"""

import os
import socket
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

VARIABLE = "BENCHMARK_TURNS"
"""Holds the number of the file by which a process is told of its turns; unset: it is measured by itself."""
SIGN = b"."


def my_turn() -> None:
    """Gives the turn on, and returns when it is this process's again; at once where nobody else is measured beside it."""
    line = _line()
    if line is None:
        return
    line.sendall(SIGN)
    if not line.recv(1):
        raise SystemExit("who gives the turns is gone")


def take_turns(lines: Sequence[socket.socket]) -> None:
    """Lets the processes at the other ends go on in this order, one at a time, until all are over."""
    waiting = deque(line for line in lines if line.recv(1))
    while waiting:
        line = waiting.popleft()
        line.sendall(SIGN)
        if line.recv(1):
            waiting.append(line)


@lru_cache(maxsize=1)
def _line() -> socket.socket | None:
    number = os.environ.get(VARIABLE)
    return socket.socket(fileno=int(number)) if number else None
