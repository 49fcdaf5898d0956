"""Several processes on one terminal: whole lines, and what a terminal would show of a progress bar."""

import io
from pathlib import Path

import pytest

from fivefold.launchers.terminal import SharedTerminal, copy_output, read_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def copied(printed: bytes, folder: Path, name: str) -> tuple[str, list[str]]:
    """What the screen and the log have of what a process printed."""
    stream = io.StringIO()
    output = io.TextIOWrapper(io.BytesIO(printed), "utf-8", "replace", newline="")
    copy_output(output, folder / "log.txt", "split", SharedTerminal(stream), name)
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


@pytest.mark.parametrize(
    ("again", "lines"),
    [
        ("a\na\nb\nc\n", ["a", "a", "b", "c"]),
        ("a\n", ["a", "a", "b"]),
        ("b\nc\n", ["a", "a", "b", "b", "c"]),  # its begin is gone: nothing new may be passed over
        ("", ["a", "a", "b"]),
    ],
)
def test_lines_that_are_in_the_log_are_written_no_second_time(tmp_path: Path, again: str, lines: list[str]) -> None:
    log = tmp_path / "log.txt"
    for title, printed in (("pod x", "a\na\nb\n"), ("pod y", "a\n"), ("pod x", again)):
        output = io.TextIOWrapper(io.BytesIO(printed.encode()), "utf-8", "replace", newline="")
        copy_output(output, log, title, SharedTerminal(io.StringIO()), "n", read_lines(log, title))
    assert read_lines(log, "pod x") == lines
    assert read_lines(log, "pod y") == ["a"]
    assert read_lines(log) == (lines if len(lines) > 3 else ["a"]), "of the one that printed last"
    assert read_lines(tmp_path / "no.txt") == []


def test_the_status_line_stays_below_other_lines_and_on_terminals_alone() -> None:
    for stream, expected in (
        (Terminal(), "1 of 3" + "\r\x1b[Khello\n1 of 3" + "\r\x1b[K"),
        (io.StringIO(), "hello\n"),
    ):
        screen = SharedTerminal(stream)
        screen.set_status_line("1 of 3")
        screen.write_line("hello")
        screen.set_status_line("")
        assert stream.getvalue() == expected
