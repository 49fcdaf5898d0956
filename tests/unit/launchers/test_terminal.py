"""Several processes on one terminal: complete lines, and the final state of progress bars."""

import io
from pathlib import Path

import pytest

from fivefold.launchers.terminal import SharedTerminal, copy_output, read_lines


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_copy_output(printed: bytes, folder: Path, name: str) -> tuple[str, list[str]]:
    """Copy the output of a process and return the text on the screen and the lines in the log."""
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
def test_log_has_complete_lines_and_the_last_state_of_a_progress_bar(
    tmp_path: Path, printed: bytes, lines: list[str]
) -> None:
    assert run_copy_output(printed, tmp_path, "a") == ("".join(f"[a] {line}\n" for line in lines), lines)
    assert run_copy_output(printed, tmp_path / "alone", "") == (printed.decode("utf-8", "replace"), lines)


@pytest.mark.parametrize(
    ("repeated", "lines"),
    [
        ("a\na\nb\nc\n", ["a", "a", "b", "c"]),
        ("a\n", ["a", "a", "b"]),
        ("b\nc\n", ["a", "a", "b", "b", "c"]),  # the first lines are missing: no new line may be skipped
        ("", ["a", "a", "b"]),
    ],
)
def test_repeated_output_is_not_logged_twice(tmp_path: Path, repeated: str, lines: list[str]) -> None:
    log = tmp_path / "log.txt"
    for title, printed in (("pod x", "a\na\nb\n"), ("pod y", "a\n"), ("pod x", repeated)):
        output = io.TextIOWrapper(io.BytesIO(printed.encode()), "utf-8", "replace", newline="")
        copy_output(output, log, title, SharedTerminal(io.StringIO()), "n", read_lines(log, title))
    assert read_lines(log, "pod x") == lines
    assert read_lines(log, "pod y") == ["a"]
    assert read_lines(log) == (lines if len(lines) > 3 else ["a"]), "lines of the title that printed last"
    assert read_lines(tmp_path / "no.txt") == []


def test_status_line_stays_below_other_lines_and_only_on_terminals() -> None:
    for stream, expected in (
        (FakeTerminal(), "1 of 3" + "\r\x1b[Khello\n1 of 3" + "\r\x1b[K"),
        (io.StringIO(), "hello\n"),
    ):
        screen = SharedTerminal(stream)
        screen.set_status_line("1 of 3")
        screen.write_line("hello")
        screen.set_status_line("")
        assert stream.getvalue() == expected
