"""What a failure means: its exit code, and the file that SageMaker shows the first 1,024 characters of."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from fivefold.contract.failure import (
    MAX_MESSAGE_CHARS,
    MAX_TERMINATION_BYTES,
    report_failure,
    report_termination,
    to_known_error,
)
from fivefold.errors import (
    DataError,
    FivefoldError,
    MissingInputError,
    PeerLostError,
    RetryableError,
    SettingsError,
    StoppedError,
)


def raised(inner: BaseException, outer: BaseException | None = None) -> BaseException:
    """`outer` as it is when raised from `inner`."""
    try:
        try:
            raise inner
        except BaseException as error:
            if outer is not None:
                raise outer from error
            raise
    except BaseException as error:
        return error


def test_passwords_in_urls_are_neither_logged_nor_kept(tmp_path: Path) -> None:
    inner = RuntimeError("no answer of https://user:can%40ary@tracker.example:5000/api")
    error = raised(inner, SettingsError("http://canary@host/x and 's3://bucket/a@b' and mail@example.com"))
    report_failure(tmp_path, error)
    kept = (tmp_path / "failure").read_text()
    assert kept.startswith("http://***@host/x and 's3://bucket/a@b' and mail@example.com\n")
    assert "https://***@tracker.example:5000/api" in kept
    assert "ary@" not in kept

    code = (
        "import logging, os\nfrom jobs.__main__ import start_log\nstart_log({})\n"
        "try:\n    raise RuntimeError('at http://u:canary@host')\n"
        "except RuntimeError as error:\n    logging.getLogger('x').error('see %s', 'http://u:canary@host', exc_info=error)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.count("http://***@host") == 2
    # the line of source that a traceback shows is the program's own
    assert ended.stderr.count("canary") == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EIO, "Input/output error"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        MemoryError(),
        pa.ArrowMemoryError("malloc of size 1 failed"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        raised(OSError(errno.ENOSPC, "No space left on device"), DataError("the archive cannot be unpacked")),
        raised(OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 576 vs 534")),
    ],
)
def test_what_the_machine_lacks_is_worth_retrying(error: BaseException):
    found = to_known_error(error)
    assert isinstance(found, RetryableError)
    assert found.exit_code == 75
    assert ("(/x/y)" in str(found)) == (getattr(error, "filename", None) == "/x/y"), "the place of a full disk"
    dealt_with = ValueError("x")
    dealt_with.__context__, dealt_with.__suppress_context__ = error, True
    assert to_known_error(dealt_with) is dealt_with


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_file_that_this_user_may_not_touch_is_a_matter_of_settings(number: int):
    found = to_known_error(OSError(number, os.strerror(number), "/x/y"))
    assert isinstance(found, SettingsError)
    assert f"'/x/y' as uid {os.getuid()}" in str(found)


def test_a_gpu_without_room_is_a_matter_of_settings_and_keeps_the_advice_that_was_given():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    found = to_known_error(full)
    assert (found.exit_code, to_known_error(torch.OutOfMemoryError()).exit_code) == (64, 64)
    for words in ("Tried to allocate 2.00 GiB", "predict.batch_size", "train.batch_size", "model.image_size"):
        assert words in str(found)
    advice = raised(full, SettingsError("a batch of 8 images does not fit"))
    assert to_known_error(advice) is advice


@pytest.mark.parametrize(
    "error",
    [ValueError("ours"), KeyboardInterrupt(), DataError("bad"), MissingInputError("no"), RetryableError("later")],
)
def test_other_errors_stay_what_they_are(error: BaseException):
    assert to_known_error(error) is error


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A pod's termination log as the platform makes it: there, and empty."""
    path = tmp_path / "termination-log"
    path.touch()
    return path


@pytest.fixture(params=["failure file", "termination log"])
def report(request: pytest.FixtureRequest, log: Path) -> Callable[[BaseException], str]:
    """Reports an error in one of the two ways; the text."""

    def failure_file(error: BaseException) -> str:
        report_failure(log.parent / "output", error)
        return (log.parent / "output" / "failure").read_text(encoding="utf-8")

    def termination_log(error: BaseException) -> str:
        report_termination({"TERMINATION_LOG": str(log)}, error)
        return log.read_text(encoding="utf-8")

    return failure_file if request.param == "failure file" else termination_log


def test_the_message_comes_first_then_the_traceback(report: Callable[[BaseException], str]):
    text = report(raised(DataError("row 3 is broken")))
    assert text.startswith("row 3 is broken\n\nTraceback")
    assert text.rstrip().endswith("DataError: row 3 is broken")
    assert report(raised(KeyError("x"))).startswith("KeyError: 'x'\n\n")


def test_a_mere_consequence_gives_way_to_the_cause(report: Callable[[BaseException], str]):
    assert report(PeerLostError("the others are gone")).startswith("the others are gone")
    report(DataError("row 3 is broken"))
    assert report(PeerLostError("the others are gone")).startswith("row 3 is broken")


def test_a_long_message_fills_what_is_shown_and_no_more(tmp_path: Path):
    report_failure(tmp_path, DataError("ö" * 5000))
    text = (tmp_path / "failure").read_text(encoding="utf-8")
    assert text[: MAX_MESSAGE_CHARS + 2] == "ö" * MAX_MESSAGE_CHARS + "\n\n"


@pytest.mark.parametrize("before", ["", "a"])
def test_a_termination_log_fits_and_no_character_is_halved(log: Path, before: str):
    report_termination({"TERMINATION_LOG": str(log)}, DataError(before + "ö" * MAX_TERMINATION_BYTES))
    written = log.read_bytes()
    assert MAX_TERMINATION_BYTES - 1 <= len(written) <= MAX_TERMINATION_BYTES
    assert written.decode() == before + "ö" * ((MAX_TERMINATION_BYTES - len(before)) // 2)


def test_a_report_that_cannot_be_written_hides_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", None):
        report_failure(folder, DataError("x"))
    for place in (tmp_path / "no", tmp_path):  # none is made where the platform made none
        report_termination({"TERMINATION_LOG": str(place)}, DataError("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == ""


def test_a_stage_writes_its_last_words_into_the_file_that_is_bound(log: Path, tmp_path: Path):
    os.link(log, tmp_path / "bound")
    environ = {**os.environ, "TERMINATION_LOG": str(log), "SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}
    environ["SM_CHANNEL_TRAIN"] = str(tmp_path / "nowhere")
    ended = subprocess.run([sys.executable, "-m", "jobs", "split"], env=environ, capture_output=True, text=True)
    assert ended.returncode == 66, ended.stderr
    assert (tmp_path / "bound").read_text().startswith(f"channel 'train': {tmp_path / 'nowhere'} does not exist")


def test_every_error_has_an_exit_code_of_its_own():
    errors = (FivefoldError, SettingsError, DataError, MissingInputError, RetryableError, StoppedError)
    assert set(errors) == {FivefoldError, *FivefoldError.__subclasses__()}
    assert [error.exit_code for error in errors] == [1, 64, 65, 66, 75, 143]
