"""Stop on SIGTERM and SIGINT: a handler records the signal, and long loops check for it between two items."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from fivefold.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: list[int] = []
_polled = threading.Event()
HANG_TIMEOUT_S = 60.0
"""If no `raise_if_stopped` follows a signal within this many seconds, the process counts as hung."""


def raise_if_stopped() -> None:
    """Raise StoppedError if this process has received a stop signal. Call it wherever work can be interrupted.

    Does nothing outside the main thread: the code that waits for that thread decides.
    """
    if _received and threading.current_thread() is threading.main_thread():
        _polled.set()
        raise StoppedError(_received[0])


@contextmanager
def defer_signals(at_once: bool = True, watched: bool = False) -> Iterator[None]:
    """Record SIGTERM and SIGINT for `raise_if_stopped` while the block runs. With `at_once` a second signal ends the process immediately.

    A `watched` process also ends if it does not call `raise_if_stopped` within a minute after a signal, because it may wait
    forever for another process or in a library. Set `at_once=False` if the parent forwards its own signals: a signal to all
    processes then arrives twice. Without a handler, process 1 of a container gets no signal. A signal that the process was
    started to ignore stays ignored. Outside the main thread, where Python handles no signals, nothing is recorded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def note(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader worker inherited this handler by fork: use the default action
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _received and at_once:
            os._exit(128 + number)
        elif not _received:
            _received.append(number)
            notice = f"{signal.Signals(number).name} received: saving, then exiting (send again to quit at once)\n"
            os.write(2, notice.encode())  # no logging here: the signal may have interrupted a call of it

    _polled.clear()
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        with _watch() if watched else nullcontext():
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _received.clear()


@contextmanager
def _watch() -> Iterator[None]:
    """Pass each signal to a watch thread at once, even while the main thread is in a library and runs no Python handler."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_when_hung, args=(reader,), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        _polled.set()  # end the watch thread's wait
        os.close(writer)
        watch.join()
        os.close(reader)


def _end_when_hung(reader: int) -> None:
    """End this process with the signal's exit code, a minute after it, unless the main thread calls `raise_if_stopped` before."""
    while data := os.read(reader, 1):
        number = data[0]
        if number in SIGNALS and not _polled.wait(HANG_TIMEOUT_S):
            os.write(2, b"no progress since the signal: exiting; the same command resumes from the last checkpoint\n")
            os._exit(128 + number)


# a forked worker must not write its signals to its parent's pipe
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
