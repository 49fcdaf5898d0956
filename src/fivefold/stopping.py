"""Being told to stop: SIGTERM and SIGINT are noted, and long work asks between two of its items."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    as for workers that are gone, or in a library for another process of its training.

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
            # no logging: the signal may have come in the middle of a line of it
            os.write(2, f"{signal.Signals(number).name}: stops as soon as all is kept (again: at once)\n".encode())

    _heard.clear()
    before = {number: signal.getsignal(number) for number in NOTED}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        with _watch() if watched else nullcontext():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _heard.set()  # nobody waits any more
        _received.clear()


@contextmanager
def _watch() -> Iterator[None]:
    """Has a thread know of each signal at once, also while this thread is in a library and runs no handler of Python's."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_when_hung, args=(reader,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _heard.set()  # nobody waits any more
        os.close(writer)
        watch.join()
        os.close(reader)


def _end_when_hung(reader: int) -> None:
    """Ends this process a minute after a signal as that would, unless it asks in time whether to stop."""
    while told := os.read(reader, 1):
        number = told[0]
        if number in NOTED and not _heard.wait(SECONDS_UNTIL_HUNG):
            os.write(2, b"no step since: ends with the last checkpoint; the same command goes on from there\n")
            os._exit(128 + number)


# what a forked worker is sent is not for its parent
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
