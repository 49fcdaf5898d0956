"""The last words of a pod: what failed, first, within what Kubernetes keeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.contract.termination import MOST_BYTES, report_termination
from fivefold.errors import DataError, LostError
from rights import let_others_in


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as found:
        return found


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The file as the platform makes it: there, and empty."""
    path = tmp_path / "termination-log"
    path.touch()
    return path


def test_the_message_comes_first_then_the_traceback(log: Path):
    report_termination({"TERMINATION_LOG": str(log)}, raised(DataError("row 3 is broken")))
    text = log.read_text()
    assert text.startswith("row 3 is broken\n\nTraceback")
    assert text.rstrip().endswith("DataError: row 3 is broken")


def test_an_unexpected_error_says_its_type(log: Path):
    report_termination({"TERMINATION_LOG": str(log)}, raised(KeyError("x")))
    assert log.read_text().startswith("KeyError: 'x'\n\n")


@pytest.mark.parametrize("before", ["", "a"])
def test_it_fits_and_no_character_is_halved(log: Path, before: str):
    report_termination({"TERMINATION_LOG": str(log)}, DataError(before + "ö" * MOST_BYTES))
    written = log.read_bytes()
    assert MOST_BYTES - 1 <= len(written) <= MOST_BYTES
    assert written.decode() == before + "ö" * ((MOST_BYTES - len(before)) // 2)


def test_a_mere_consequence_gives_way_to_the_cause(log: Path):
    environ = {"TERMINATION_LOG": str(log)}
    report_termination(environ, LostError("the others are gone"))
    assert log.read_text().startswith("the others are gone")
    report_termination(environ, DataError("row 3 is broken"))
    report_termination(environ, LostError("the others are gone"))
    assert log.read_text().startswith("row 3 is broken")


def test_the_file_stays_the_one_that_is_bound(log: Path, tmp_path: Path):
    bound = tmp_path / "bound"
    os.link(log, bound)
    report_termination({"TERMINATION_LOG": str(log)}, DataError("x"))
    assert bound.read_text().startswith("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bound", "termination-log"]


def test_none_is_made_where_the_platform_made_none(tmp_path: Path):
    report_termination({"TERMINATION_LOG": str(tmp_path / "no")}, DataError("x"))
    report_termination({"TERMINATION_LOG": str(tmp_path)}, DataError("x"))
    assert list(tmp_path.iterdir()) == []


def test_one_that_cannot_be_written_hides_nothing(log: Path):
    folder = log.parent / "folder"
    folder.mkdir(mode=0o755)
    log.rename(folder / log.name)
    (folder / log.name).chmod(0o444)
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from fivefold.contract.termination import report_termination\nfrom fivefold.errors import DataError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "report_termination({'TERMINATION_LOG': sys.argv[1]}, DataError('x'))\nprint('said')"
    )
    let_others_in(folder)
    ended = subprocess.run([sys.executable, "-c", code, folder / log.name], capture_output=True, text=True)
    assert ended.stdout == "said\n", ended.stderr
    assert (folder / log.name).read_text() == ""


def test_a_stage_leaves_its_last_words(log: Path, tmp_path: Path):
    environ = {**os.environ, "TERMINATION_LOG": str(log), "SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}
    environ["SM_CHANNEL_TRAIN"] = str(tmp_path / "nowhere")
    ended = subprocess.run([sys.executable, "-m", "jobs", "split"], env=environ, capture_output=True, text=True)
    assert ended.returncode == 66, ended.stderr
    assert log.read_text().startswith(f"channel 'train': {tmp_path / 'nowhere'} does not exist")
