import logging
import os
import pty
import sys

import pytest

from fivefold.progress import track


def test_log_gets_a_line_at_intervals(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="fivefold"):
        assert list(track("abcd", 4, "reading", every=0)) == list("abcd")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"reading: {n} of 4, 00:00 left" for n in (1, 2, 3)]


def test_terminal_of_unknown_width_gets_a_bar():
    controller, terminal = pty.openpty()  # its width is 0, as in a container
    os.set_blocking(controller, False)
    before, sys.stderr = sys.stderr, os.fdopen(terminal, "w")
    try:
        assert list(track(range(3), 3, "reading")) == [0, 1, 2]
        sys.stderr.flush()
        shown = os.read(controller, 65536)
    finally:
        sys.stderr.close()
        sys.stderr = before
        os.close(controller)
    assert b"reading" in shown
    assert b"/3 [" in shown
