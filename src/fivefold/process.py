"""What a process need not wait for at its start and its end, which a run of several folds pays many times."""

import atexit
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import NoReturn


@contextmanager
def importing() -> Iterator[None]:
    """For the imports of large packages: nobody looks for garbage while they make objects that stay (torch and timm: 3.0 s for 3.7).

    Nor are these looked through ever after, a quarter of a second each time; nor is what else is there by then.
    """
    was_on, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if was_on:
            gc.enable()


def load(name: str) -> ModuleType:
    """The module of that name, which may bring large packages."""
    with importing():
        return importlib.import_module(name)


def leave(code: int) -> NoReturn:
    """Ends the process with `code` like `sys.exit`, but without taking the interpreter apart, which after torch and timm takes 1.5 s.

    Threads that are no daemons are waited for, exit functions are run, and logs and streams are flushed, in that order.
    A profiler or debugger that watches the process gets its own end.
    """
    if sys.getprofile() or sys.gettrace():
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)
