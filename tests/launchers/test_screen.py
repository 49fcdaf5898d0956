"""Several processes on one terminal: whole lines, and what a terminal would show of a progress bar."""

import io
from pathlib import Path

import pytest

from fivefold.launchers.screen import Screen, copy_output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def copied(printed: bytes, folder: Path, name: str) -> tuple[str, list[str]]:
    """What the screen and the log have of what a process printed."""
    stream = io.StringIO()
    output = io.TextIOWrapper(io.BytesIO(printed), "utf-8", "replace", newline="")
    copy_output(output, folder / "log.txt", "split", Screen(stream), name)
    title, *lines = (folder / "log.txt").read_text("utf-8").splitlines()
    assert title.endswith(" split")
    return stream.getvalue(), lines


@pytest.mark.parametrize(
    ("printed", "lines"),
    [
        ("one\ntwo\n\nthr\xe9\uba5f".encode(), ["one", "two", "", "thr\xe9\uba5f"]),
        (b"\r 10%|#   |\r100%|####|\r\n", ["100%|####|"]),
        (b"\r 10%|#   |\r          \rdone\n", ["done"]),
        (b"\x1b[31mred\x1b[0m\x1b[A\n", ["red"]),
        (b"\xff\r\n", ["\ufffd"]),
    ],
)
def test_a_log_has_whole_lines_and_of_a_bar_the_last_state(tmp_path: Path, printed: bytes, lines: list[str]) -> None:
    assert copied(printed, tmp_path, "a") == ("".join(f"[a] {line}\n" for line in lines), lines)
    assert copied(printed, tmp_path / "alone", "") == (printed.decode("utf-8", "replace"), lines)


def test_the_status_line_stays_below_other_lines_and_on_terminals_alone() -> None:
    for stream, expected in (
        (Terminal(), "1 of 3" + "\r\x1b[Khello\n1 of 3" + "\r\x1b[K"),
        (io.StringIO(), "hello\n"),
    ):
        screen = Screen(stream)
        screen.foot("1 of 3")
        screen.line("hello")
        screen.foot("")
        assert stream.getvalue() == expected
