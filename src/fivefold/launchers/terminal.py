"""Show the output of several steps on one terminal, and append it to one log per step."""

import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

TITLE = re.compile(r"^--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)\n", re.MULTILINE)


class SharedTerminal:
    """A terminal that several steps share, with a status line at its bottom; or a log, which has no status line."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._foot = ""

    def write_line(self, text: str) -> None:
        self._write(f"{text}\n", self._foot)

    def write_output(self, step: str, lines: Iterable[str]) -> None:
        """Write the output of a step, each line after the step's name."""
        for line in lines:
            self.write_line(f"[{step}] {line}")

    def set_status_line(self, text: str) -> None:
        """Set the status line to `text`; an empty text removes it."""
        if self.terminal:
            self._write("", text[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str, foot: str) -> None:
        erase = "\r\x1b[K" if self._foot else ""
        self._foot = foot
        self.stream.write(f"{erase}{text}{foot}")
        self.stream.flush()


def format_title(title: str) -> str:
    """Return the line that precedes the output of a process in a log: the time and `title`."""
    return f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n"


def append_lines(log: Path, title: str, lines: Sequence[str]) -> None:
    """Append lines to a log, below a line with the time and `title` unless this is the log's last title."""
    titles = TITLE.findall(log.read_text("utf-8")) if log.is_file() else []
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write("" if titles[-1:] == [title] else format_title(title))
        file.writelines(f"{line}\n" for line in lines)


def read_lines(log: Path, title: str = "") -> list[str]:
    """Return the lines of a log below `title`, or below the last title if it is empty."""
    parts = TITLE.split(log.read_text("utf-8") if log.is_file() else "")[1:]
    wanted_title = title or (parts[-2] if parts else "")
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [line for heading, text in pairs if heading == wanted_title for line in text.split("\n")[:-1]]


def find_new_lines(lines: list[str], known: list[str]) -> list[str]:
    """Return the lines that follow `known` in a log that is read again. If the log lacks its first lines, all are new."""
    if lines == known[: len(lines)]:
        return []
    return lines[len(known) :] if lines[: len(known)] == known else lines
