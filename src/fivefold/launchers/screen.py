"""What several processes print, shown on one terminal and kept in one log each."""

import contextlib
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TITLE = re.compile(r"^--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)\n", re.MULTILINE)


class Screen:
    """A terminal (or a log) that lines from several threads share, with a status line at its foot.

    The status line stands on terminals only.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._foot = ""
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        self._write(f"{text}\n")

    def raw(self, text: str) -> None:
        """Text as it comes, with its own line ends and control characters."""
        with self._lock:
            self.stream.write(text)
            self.stream.flush()

    def foot(self, text: str) -> None:
        """Puts `text` on the status line; empty text removes it."""
        if self.terminal:
            self._write("", text[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str, foot: str | None = None) -> None:
        with self._lock:
            erase = "\r\x1b[K" if self._foot else ""
            self._foot = self._foot if foot is None else foot
            self.stream.write(f"{erase}{text}{self._foot}")
            self.stream.flush()


def copy_output(
    output: IO[str], log: Path, title: str, screen: Screen, name: str = "", known: Sequence[str] = ()
) -> None:
    """Appends what a process prints to its log, below a line with the time and `title`, and shows it, until it ends.

    On the screen lines stand behind the `name` of their step; without one text is shown as it comes, bars too, of which
    the log keeps the last state. `output` is opened with newline="". Its first lines are passed over as far as they are
    the `known` ones.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    head, passed_over = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n", deque(known)
    # a pseudo-terminal ends with EIO on Linux, not with an empty read
    with output, open(log, "a", encoding="utf-8") as file, contextlib.suppress(OSError):
        for text in output:
            if not name:
                screen.raw(text)
            line = ESCAPE.sub("", text).rstrip()
            # a bar goes back to the start of its line by a carriage return, to be drawn again or wiped
            if text.endswith("\n") or (line and not text.endswith("\r")):
                if passed_over and passed_over.popleft() == line:
                    continue
                passed_over.clear()
                file.write(f"{head}{line}\n")
                head = ""
                file.flush()
                if name:
                    screen.line(f"[{name}] {line}")


def lines_of(log: Path, title: str = "") -> list[str]:
    """The lines that `copy_output` has written to a log below this title; without one, below the title that came last."""
    parts = TITLE.split(log.read_text("utf-8") if log.is_file() else "")[1:]
    asked_for = title or (parts[-2] if parts else "")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [line for own, text in pairs if own == asked_for for line in text.split("\n")[:-1]]
