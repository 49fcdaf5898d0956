import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from fivefold.contract.failure import (
    MAX_MESSAGE_CHARS,
    MAX_TERMINATION_BYTES,
    report_failure,
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
from jobs.__main__ import start_log


def raise_and_catch(inner: BaseException, outer: BaseException | None = None) -> BaseException:
    """Return `outer` raised from `inner`, or `inner` raised alone."""
    try:
        try:
            raise inner
        except BaseException as error:
            if outer is not None:
                raise outer from error
            raise
    except BaseException as error:
        return error


def test_url_passwords_are_masked_in_the_failure_file_and_the_log(tmp_path: Path, capsys) -> None:
    credentials = "user:can%40ary"  # not in the source line of a traceback
    inner = RuntimeError(f"no answer of https://{credentials}@tracker.example:5000/api")
    error = raise_and_catch(inner, SettingsError("http://canary@host/x and 's3://bucket/a@b' and mail@example.com"))
    report_failure(tmp_path, error)
    text = (tmp_path / "failure").read_text()
    assert text.startswith("http://***@host/x and 's3://bucket/a@b' and mail@example.com\n")
    assert "https://***@tracker.example:5000/api" in text
    assert credentials not in text
    start_log({})
    try:
        raise inner
    except RuntimeError as caught:
        logging.getLogger("x").error("see %s", inner, exc_info=caught)
    log = capsys.readouterr().err
    assert log.count("https://***@tracker.example:5000/api") == 2
    assert credentials not in log


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
        raise_and_catch(OSError(errno.ENOSPC, "No space left on device"), DataError("the archive cannot be unpacked")),
        raise_and_catch(OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 576 vs 534")),
    ],
)
def test_lack_of_memory_or_disk_is_retryable(error: BaseException):
    known = to_known_error(error)
    assert isinstance(known, RetryableError)
    assert ("(/x/y)" in str(known)) == (getattr(error, "filename", None) == "/x/y"), "the path of a full disk"
    handled = ValueError("x")
    handled.__context__, handled.__suppress_context__ = error, True
    assert to_known_error(handled) is handled


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_path_that_is_not_allowed_is_a_settings_error(number: int):
    known = to_known_error(OSError(number, os.strerror(number), "/x/y"))
    assert isinstance(known, SettingsError)
    assert f"'/x/y' as uid {os.getuid()}" in str(known)


def test_gpu_out_of_memory_is_a_settings_error_and_keeps_an_existing_one():
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    known = to_known_error(out_of_memory)
    assert (known.exit_code, to_known_error(torch.OutOfMemoryError()).exit_code) == (64, 64)
    for words in ("Tried to allocate 2.00 GiB", "predict.batch_size", "train.batch_size", "model.image_size"):
        assert words in str(known)
    explained = raise_and_catch(out_of_memory, SettingsError("a batch of 8 images does not fit"))
    assert to_known_error(explained) is explained


@pytest.mark.parametrize(
    "error",
    [ValueError("ours"), KeyboardInterrupt(), DataError("bad"), MissingInputError("no"), RetryableError("later")],
)
def test_to_known_error_returns_other_errors_unchanged(error: BaseException):
    assert to_known_error(error) is error


@pytest.fixture
def termination_log(tmp_path: Path) -> Path:
    """The empty termination log that the platform creates in a pod."""
    path = tmp_path / "termination-log"
    path.touch()
    os.link(path, tmp_path / "mounted")
    return path


@pytest.fixture(params=["output/failure", "mounted"], ids=["failure file", "termination log"])
def write_report(request: pytest.FixtureRequest, termination_log: Path) -> Callable[[BaseException], str]:
    """A function that reports an error in one of the two files and returns the text of the file."""
    folder, in_log = termination_log.parent, request.param == "mounted"

    def write(error: BaseException) -> str:
        report_failure(None if in_log else folder / "output", error, termination_log if in_log else folder / "absent")
        return (folder / request.param).read_text(encoding="utf-8")

    return write


def test_report_has_the_message_first_and_then_the_traceback(write_report: Callable[[BaseException], str]):
    text = write_report(raise_and_catch(DataError("row 3 is broken")))
    assert text.startswith("row 3 is broken\n\nTraceback")
    assert text.rstrip().endswith("DataError: row 3 is broken")
    assert write_report(raise_and_catch(KeyError("x"))).startswith("KeyError: 'x'\n\n")


def test_lost_peer_does_not_overwrite_an_earlier_report(write_report: Callable[[BaseException], str]):
    assert write_report(PeerLostError("the others are gone")).startswith("the others are gone")
    write_report(DataError("row 3 is broken"))
    assert write_report(PeerLostError("the others are gone")).startswith("row 3 is broken")


def test_failure_file_cuts_long_messages_to_the_shown_length(tmp_path: Path):
    report_failure(tmp_path, DataError("ö" * 5000))
    text = (tmp_path / "failure").read_text(encoding="utf-8")
    assert text[: MAX_MESSAGE_CHARS + 2] == "ö" * MAX_MESSAGE_CHARS + "\n\n"


@pytest.mark.parametrize("prefix", ["", "a"])
def test_termination_log_is_cut_between_characters(termination_log: Path, prefix: str):
    report_failure(None, DataError(prefix + "ö" * MAX_TERMINATION_BYTES), termination_log)
    written = termination_log.read_bytes()
    assert MAX_TERMINATION_BYTES - 1 <= len(written) <= MAX_TERMINATION_BYTES
    assert written.decode() == prefix + "ö" * ((MAX_TERMINATION_BYTES - len(prefix)) // 2)


def test_report_that_cannot_be_written_raises_no_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", None):
        report_failure(folder, DataError("x"))
    for log_path in (tmp_path / "no", tmp_path):  # Fivefold creates no termination log of its own
        report_failure(None, DataError("x"), log_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == ""


def test_every_error_class_has_its_own_exit_code():
    errors = (FivefoldError, SettingsError, DataError, MissingInputError, RetryableError, StoppedError)
    assert set(errors) == {FivefoldError, *FivefoldError.__subclasses__()}
    assert [error.exit_code for error in errors] == [1, 64, 65, 66, 75, 143]
