from pathlib import Path

import pytest

from fivefold.launchers.terminal import append_lines, find_new_lines, read_lines, write_output


@pytest.mark.parametrize(
    ("repeated", "lines"),
    [
        (["a", "a", "b", "c"], ["a", "a", "b", "c"]),
        (["a"], ["a", "a", "b"]),
        (["b", "c"], ["a", "a", "b", "b", "c"]),  # the first lines are missing: no new line may be skipped
        ([], ["a", "a", "b"]),
    ],
)
def test_repeated_output_is_not_logged_twice(tmp_path: Path, repeated: list[str], lines: list[str]) -> None:
    log = tmp_path / "log.txt"
    for title, printed in (("pod x", ["a", "a", "b"]), ("pod y", ["a"]), ("pod x", repeated)):
        if new := find_new_lines(printed, read_lines(log, title)):
            append_lines(log, title, new)
    assert read_lines(log, "pod x") == lines
    assert read_lines(log, "pod y") == ["a"]
    assert read_lines(log) == (lines if len(lines) > 3 else ["a"]), "lines of the title that printed last"
    append_lines(log, "pod x", ["d"])
    append_lines(log, "pod x", ["e"])
    assert read_lines(log, "pod x") == [*lines, "d", "e"]
    assert log.read_text().count(" pod x\n") == 2, "a title is not repeated"
    assert read_lines(tmp_path / "no.txt") == []


def test_output_is_shown_after_the_name_of_its_step_without_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    write_output("fold-0", ["\x1b[31mred\x1b[0m\x1b[A", "plain"])
    assert capsys.readouterr().err == "[fold-0] red\n[fold-0] plain\n"
