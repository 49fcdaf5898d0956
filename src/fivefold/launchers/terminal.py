"""Show the output of several steps on one terminal, and append it to one log per step."""

import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TITLE = re.compile(r"^--- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)\n", re.MULTILINE)


def write_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_output(step: str, lines: Iterable[str]) -> None:
    """Write the output of a step to the terminal, each line after the step's name and without escape codes."""
    for line in lines:
        write_line(f"[{step}] {ESCAPE.sub('', line)}")


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
