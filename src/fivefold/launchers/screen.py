"""What several processes say, shown on one terminal and kept in one log each."""

import codecs
import re
import shutil
import sys
import threading
from collections.abc import Callable
from typing import IO

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


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
        with self._lock:
            self._write(f"{self._erase()}{text}\n{self._foot}")

    def raw(self, text: str) -> None:
        """Text as it comes, with its own line ends and control characters."""
        with self._lock:
            self._write(text)

    def foot(self, text: str) -> None:
        """Puts `text` on the status line; empty text removes it."""
        if not self.terminal:
            return
        with self._lock:
            erase = self._erase()
            self._foot = text[: shutil.get_terminal_size().columns - 1]
            self._write(erase + self._foot)

    def _erase(self) -> str:
        return "\r\x1b[K" if self._foot else ""

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class Lines:
    """Bytes in any portions, given on as whole lines: what a terminal would show of each at its end."""

    def __init__(self, give: Callable[[str], None]) -> None:
        self._give = give
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, portion: bytes) -> str:
        """Takes a portion and gives on the lines that it ends; the portion as text."""
        text = self._decoder.decode(portion)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)
        return text

    def close(self) -> None:
        if self._rest:
            self._line(self._rest)
            self._rest = ""

    def _line(self, line: str) -> None:
        shown = [part for part in ESCAPE.sub("", line).rstrip("\r").split("\r") if part.strip()]
        # tqdm wipes its bar with spaces and a carriage return: a line of nothing else is no line
        if shown or "\r" not in line.rstrip("\r"):
            self._give(shown[-1].rstrip() if shown else "")


def bar(done: int, total: int, width: int = 10) -> str:
    """`[####------] 4/10`."""
    filled = min(width, round(width * done / total)) if total else 0
    return f"[{'#' * filled}{'-' * (width - filled)}] {done}/{total}"
