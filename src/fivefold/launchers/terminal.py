"""Show the output of several processes on one terminal, and write one log per process."""

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


class SharedTerminal:
    """A terminal (or a log) that several threads share, with a status line at its bottom.

    Only terminals have the status line.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._foot = ""
        self._lock = threading.Lock()

    def write_line(self, text: str) -> None:
        self._write(f"{text}\n")

    def write_raw(self, text: str) -> None:
        """Write text unchanged, with its own line endings and control characters."""
        with self._lock:
            self.stream.write(text)
            self.stream.flush()

    def set_status_line(self, text: str) -> None:
        """Set the status line to `text`; an empty text removes it."""
        if self.terminal:
            self._write("", text[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str, foot: str | None = None) -> None:
        with self._lock:
            erase = "\r\x1b[K" if self._foot else ""
            self._foot = self._foot if foot is None else foot
            self.stream.write(f"{erase}{text}{self._foot}")
            self.stream.flush()


def copy_output(
    output: IO[str], log: Path, title: str, terminal: SharedTerminal, name: str = "", known: Sequence[str] = ()
) -> None:
    """Append a process's output to its log, below a line with the time and `title`, and show it, until the process ends.

    On the screen each line follows the `name` of its step. Without a name the output is shown unchanged, with progress
    bars; the log gets a bar's last state. `output` must be opened with newline="". The first lines are skipped as long as
    they equal the `known` lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    header, skipped = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n", deque(known)
    # a pseudo-terminal ends with EIO on Linux, not with an empty read
    with output, open(log, "a", encoding="utf-8") as file, contextlib.suppress(OSError):
        for text in output:
            if not name:
                terminal.write_raw(text)
            line = ESCAPE.sub("", text).rstrip()
            # a progress bar ends with a carriage return, to overwrite its line
            if text.endswith("\n") or (line and not text.endswith("\r")):
                if skipped and skipped.popleft() == line:
                    continue
                skipped.clear()
                file.write(f"{header}{line}\n")
                header = ""
                file.flush()
                if name:
                    terminal.write_line(f"[{name}] {line}")


def read_lines(log: Path, title: str = "") -> list[str]:
    """Return the lines that `copy_output` wrote to a log below `title`, or below the last title if it is empty."""
    parts = TITLE.split(log.read_text("utf-8") if log.is_file() else "")[1:]
    wanted_title = title or (parts[-2] if parts else "")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [line for heading, text in pairs if heading == wanted_title for line in text.split("\n")[:-1]]
