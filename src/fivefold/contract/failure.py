"""Translate exceptions to FivefoldErrors; write the failure file and the termination message of a pod."""

import contextlib
import errno
import os
import traceback
from pathlib import Path

from fivefold.contract.files import disk_is_full, exception_chain, write_text
from fivefold.contract.s3.sync import with_urls
from fivefold.contract.stage_specs import FAILURE
from fivefold.errors import FivefoldError, PeerLostError, RetryableError, SettingsError, StoppedError

MAX_MESSAGE_CHARS = 1024
"""SageMaker shows only this much of the failure file, so the message comes first."""
TERMINATION_LOG = Path("/dev/termination-log")
MAX_TERMINATION_BYTES = 4096
"""Kubernetes keeps only this much of a container's termination message."""
UNREACHABLE_CODES = {
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}  # fmt: skip
"""Error codes of an unreachable network or network file system."""
GPU_OUT_OF_MEMORY = "OutOfMemoryError"
"""torch's exception for a full GPU, by its name, because a failure may precede the import of torch."""
PATH_CODES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
"""Error codes of a path that this user or this file system does not allow."""


def to_known_error(error: BaseException) -> BaseException:
    """Return `error`, or the FivefoldError that describes it if the machine is at fault, not the program.

    A full disk, an unreachable network and too little memory become RetryableErrors, even if another error
    wraps them. A file that this user may not access becomes a SettingsError.
    """
    if isinstance(error, RetryableError | StoppedError | KeyboardInterrupt):
        return error
    for cause in exception_chain(error):
        if disk_is_full(cause):
            where = f" ({name})" if (name := getattr(cause, "filename", None)) else ""
            return RetryableError(f"no space left on the device{where}: free some, then run the same command again")
        if str(cause).startswith("DataLoader timed out"):
            return RetryableError(
                f"the loader processes delivered no batch in time ({cause}): the storage does not respond, or the shared memory (/dev/shm) "
                "is full; then start the container with --shm-size=2g or reduce train.num_workers"
            )
        # torch's message, also if SIGBUS killed a loader process
        if "shared memory" in str(cause) and not isinstance(error, FivefoldError):
            return SettingsError(
                f"shared memory (/dev/shm) is too small for the loader processes ({str(cause).splitlines()[0]}): start the "
                "container with --shm-size=2g, or set fewer train.num_workers"
            )
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return RetryableError(
                f"out of memory ({cause}): give the process more memory, or lower train.batch_size or workers"
            )
        if type(cause).__name__ == GPU_OUT_OF_MEMORY and not isinstance(error, SettingsError):
            first_line, _, _ = str(cause).partition("\n")
            return SettingsError(
                f"the device's memory is too small ({first_line}): lower predict.batch_size, "
                "train.batch_size (train.grad_accum_steps keeps the size of a step) or model.image_size"
            )
        if isinstance(cause, OSError) and cause.errno in UNREACHABLE_CODES:
            return RetryableError(f"storage or network failed: {cause}; the same command may succeed later")
    if isinstance(error, OSError) and error.errno in PATH_CODES:
        return SettingsError(f"{error} as uid {os.getuid()}; let that user read and write there, or set another path")
    return error


def report_failure(output_dir: Path | None, error: BaseException, termination_log: Path = TERMINATION_LOG) -> None:
    """Write message and traceback to the failure file, and to the file that `kubectl describe pod` shows, if that exists.

    The platform mounts the latter into the container, so it is written in place: the platform would not read a new file.
    A PeerLostError does not replace what another process of the training has written.
    """
    lost = isinstance(error, PeerLostError)
    # writing may fail for the same reason as the stage; the message is on stderr in any case
    with contextlib.suppress(OSError, FivefoldError):
        if output_dir is not None and not (lost and (output_dir / FAILURE).is_file()):
            write_text(output_dir / FAILURE, _report(error, MAX_MESSAGE_CHARS))
    with contextlib.suppress(OSError):
        if termination_log.is_file() and not (lost and termination_log.stat().st_size):
            # cut at a whole character
            text = _report(error).encode("utf-8", "replace")[:MAX_TERMINATION_BYTES].decode("utf-8", "ignore")
            termination_log.write_bytes(text.encode())


def _report(error: BaseException, characters: int | None = None) -> str:
    """Return at most `characters` of the message, then the traceback."""
    message = str(error) if isinstance(error, FivefoldError) else f"{type(error).__name__}: {error}".rstrip(": ")
    return f"{with_urls(message)[:characters]}\n\n{with_urls(''.join(traceback.format_exception(error)))}"
