"""The words that a Kubernetes pod ends with: what failed, in the file that `kubectl describe pod` shows."""

import contextlib
import traceback
from collections.abc import Mapping
from pathlib import Path

from fivefold.contract.storage import shown
from fivefold.errors import FivefoldError, LostError

VARIABLE = "TERMINATION_LOG"
DEFAULT = "/dev/termination-log"
MOST_BYTES = 4096
"""Kubernetes keeps this much of the file of one container."""


def report_termination(environ: Mapping[str, str], error: BaseException) -> None:
    """Writes the message of `error`, then its traceback, where a pod's last words go; nothing where there is no such file.

    The file is the platform's, bound into the container: it is written in place, as a new one would not be seen.
    TERMINATION_LOG names another than `/dev/termination-log`, as `terminationMessagePath` may. Of processes that train
    together one may only have lost the others: that gives way to what is written.
    """
    path = Path(environ.get(VARIABLE) or DEFAULT)
    message = str(error) if isinstance(error, FivefoldError) else f"{type(error).__name__}: {error}".rstrip(": ")
    text = f"{shown(message)}\n\n{''.join(traceback.format_exception(error))}"
    # it may be another user's; the message is on stderr in any case
    with contextlib.suppress(OSError):
        if path.is_file() and not (isinstance(error, LostError) and path.stat().st_size):
            path.write_bytes(_cut(text, MOST_BYTES))


def _cut(text: str, most: int) -> bytes:
    """The first bytes of `text`, no character of them halved."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore").encode()
