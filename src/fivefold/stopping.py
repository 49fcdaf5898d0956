"""Being told to stop: SIGTERM and SIGINT are noted, and long work asks between two of its items."""

import _thread
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fivefold.errors import StoppedError

NOTED = (signal.SIGTERM, signal.SIGINT)
_received: list[int] = []
_heard = threading.Event()
SECONDS_UNTIL_HUNG = 60.0
"""From the signal to the next question, before the process is taken for one that hangs."""


def poll() -> None:
    """Raises StoppedError if this process was told to stop; to be called wherever work can be left.

    In another thread than the main one nothing: who waits for that thread decides.
    """
    if _received and threading.current_thread() is threading.main_thread():
        _heard.set()
        raise StoppedError(_received[0])


@contextmanager
def noted(at_once: bool = True, watched: bool = False) -> Iterator[None]:
    """Notes SIGTERM and SIGINT while the block runs, for `poll`; a second one ends the process `at_once`.

    A `watched` process that does not ask within a minute ends too, with what it has kept: it waits for what never comes,
    as for workers that are gone.

    Not where its starter does that, and hands on what it is sent itself: who signals all of them then signals twice.

    As process 1 of a container a process that handles no signals is sent none, and would be killed
    in the end. A signal that the process was started to ignore stays ignored; in a thread other
    than the main one nothing is noted, since Python handles signals there alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader's worker, which inherits this by fork, ends as any process does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _received and at_once:
            os._exit(128 + number)
        elif not _received:
            _received.append(number)
            if watched:
                _thread.start_new_thread(_end_if_hung, (number,))  # takes no lock that this thread may hold just now
            # no logging: the signal may have come in the middle of a line of it
            os.write(2, f"{signal.Signals(number).name}: stops as soon as all is kept (again: at once)\n".encode())

    _heard.clear()
    before = {number: signal.getsignal(number) for number in NOTED}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _heard.set()  # nobody waits any more
        _received.clear()


def _end_if_hung(number: int) -> None:
    """Ends this process as the signal would, unless it asks in time whether to stop."""
    if not _heard.wait(SECONDS_UNTIL_HUNG):
        os.write(2, b"no step since: ends with the last checkpoint; the same command goes on from there\n")
        os._exit(128 + number)
