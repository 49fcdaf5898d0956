"""Several processes on one terminal: whole lines, and what a terminal would show of a progress bar."""

import io

import pytest

from fivefold.launchers.screen import Lines, Screen, bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(*portions: bytes) -> list[str]:
    found: list[str] = []
    lines = Lines(found.append)
    for portion in portions:
        lines.feed(portion)
    lines.close()
    return found


def test_portions_become_whole_lines() -> None:
    assert lines_of(b"one\ntw", b"o\n\nthr", b"ee") == ["one", "two", "", "three"]


def test_a_letter_parted_between_portions_is_whole() -> None:
    word = "é넷".encode()
    for cut in range(len(word)):
        assert lines_of(word[:cut], word[cut:]) == ["é넷"]


def test_of_a_progress_bar_the_last_state_is_kept() -> None:
    assert lines_of(b"\r 10%|#   |\r100%|####|\r\n") == ["100%|####|"]
    assert lines_of(b"\r 10%|#   |\r          \rdone\n") == ["done"]


def test_colours_do_not_reach_the_log() -> None:
    assert lines_of(b"\x1b[31mred\x1b[0m\x1b[A\n") == ["red"]


def test_the_status_line_stays_below_what_is_said() -> None:
    terminal = Terminal()
    screen = Screen(terminal)
    screen.foot("1 of 3")
    screen.line("hello")
    screen.foot("")
    assert terminal.getvalue() == "1 of 3" + "\r\x1b[Khello\n1 of 3" + "\r\x1b[K"


def test_a_log_has_no_status_line() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    screen.foot("1 of 3")
    screen.line("hello")
    assert stream.getvalue() == "hello\n"


@pytest.mark.parametrize(
    ("done", "total", "text"), [(0, 4, "[----] 0/4"), (2, 4, "[##--] 2/4"), (4, 4, "[####] 4/4"), (0, 0, "[----] 0/0")]
)
def test_bar(done: int, total: int, text: str) -> None:
    assert bar(done, total, width=4) == text
