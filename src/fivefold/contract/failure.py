"""What a failure means to the user: an error of ours with its exit code, the failure file, and a pod's last words."""

import contextlib
import errno
import os
import traceback
from collections.abc import Mapping
from pathlib import Path

from fivefold.contract.files import causes, disk_is_full, write_text
from fivefold.contract.stages import FAILURE
from fivefold.contract.storage import shown
from fivefold.errors import FivefoldError, LostError, RetryableError, SettingsError, StoppedError

FAILURE_CHARACTERS = 1024
"""SageMaker shows this much of the failure file, so the message comes first."""
TERMINATION_VARIABLE, TERMINATION_LOG = "TERMINATION_LOG", "/dev/termination-log"
TERMINATION_BYTES = 4096
"""Kubernetes keeps this much of the file of one container."""
UNREACHABLE = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}
"""What a network or a network file system that is away answers."""
OUT_OF_MEMORY = "OutOfMemoryError"
"""What torch calls a GPU without room, by name, since a failure may come before torch does."""
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def explained(error: BaseException) -> BaseException:
    """`error`, or the error of ours that it amounts to where the machine is at fault, not the program.

    A full disk, a network that is away and too little memory are RetryableErrors even below
    another error; a file that this user may not touch is a SettingsError.
    """
    if isinstance(error, RetryableError | StoppedError | KeyboardInterrupt):
        return error
    for cause in causes(error):
        if disk_is_full(cause):
            where = f" ({name})" if (name := getattr(cause, "filename", None)) else ""
            return RetryableError(f"no space left on the device{where}: free some, then run the same command again")
        if str(cause).startswith("DataLoader timed out"):
            return RetryableError(
                f"the loader processes gave no batch in time ({cause}): the storage hangs, or the shared memory (/dev/shm) is full; then "
                "start the container with --shm-size=2g, or set fewer train.workers"
            )
        if "shared memory" in str(cause) and not isinstance(
            error, FivefoldError
        ):  # torch's words for a loader process that SIGBUS killed
            return SettingsError(
                f"the shared memory (/dev/shm) is too small for the loader processes ({str(cause).splitlines()[0]}): start the "
                "container with --shm-size=2g, or set fewer train.workers"
            )
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return RetryableError(
                f"out of memory ({cause}): give the process more, or lower train.batch_size or workers"
            )
        if type(cause).__name__ == OUT_OF_MEMORY and not isinstance(error, SettingsError):
            first_line, _, _ = str(cause).partition("\n")
            return SettingsError(
                f"the device's memory is too small ({first_line}): lower predict.batch_size, "
                "train.batch_size (train.accumulate keeps the step's size) or model.image_size"
            )
        if isinstance(cause, OSError) and cause.errno in UNREACHABLE:
            return RetryableError(f"storage or network failed, the same command may succeed later: {cause}")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return SettingsError(
            f"a name is too long for this file system: {str(error.filename)[:300]}…; give a shorter one"
        )
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        return SettingsError(
            f"{error} as uid {os.getuid()}; let that user read and write there, or give another folder"
        )
    return error


def report_failure(output_dir: Path | None, error: BaseException) -> None:
    """Writes the failure file: the message first, the traceback after; a mere consequence gives way to what is there."""
    if output_dir is None or (isinstance(error, LostError) and (output_dir / FAILURE).is_file()):
        return
    # The folder itself may be what failed; the message is on stderr in any case.
    with contextlib.suppress(OSError, FivefoldError):
        write_text(output_dir / FAILURE, _report(error, FAILURE_CHARACTERS))


def report_termination(environ: Mapping[str, str], error: BaseException) -> None:
    """Writes message and traceback where `kubectl describe pod` reads a pod's last words; nothing where there is no such file.

    The file is the platform's, bound into the container: it is written in place, as a new one would not be seen.
    TERMINATION_LOG names another than `/dev/termination-log`, as `terminationMessagePath` may. Of processes that train
    together one may only have lost the others: that gives way to what is written.
    """
    path = Path(environ.get(TERMINATION_VARIABLE) or TERMINATION_LOG)
    # it may be another user's; the message is on stderr in any case
    with contextlib.suppress(OSError):
        if path.is_file() and not (isinstance(error, LostError) and path.stat().st_size):
            # the first bytes, no character of them halved
            text = _report(error).encode("utf-8", "replace")[:TERMINATION_BYTES].decode("utf-8", "ignore")
            path.write_bytes(text.encode())


def _report(error: BaseException, characters: int | None = None) -> str:
    """At most so many `characters` of the message, then the traceback."""
    message = str(error) if isinstance(error, FivefoldError) else f"{type(error).__name__}: {error}".rstrip(": ")
    return f"{shown(message)[:characters]}\n\n{shown(''.join(traceback.format_exception(error)))}"
