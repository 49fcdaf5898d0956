"""Large files that are written once, from the first byte to the last."""

import hashlib
import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

SYNC_EVERY = 64 << 20
"""Bytes between two times that what was written is brought to the disk."""


class Streamed(io.RawIOBase):
    """A new file at `path` (give a temporary name; see `files.atomic`), whose SHA-256 is known when it is written.

    What is written goes to the disk while more is made, so that little is left to wait for at the end, and is
    not kept in memory: the kernel then fills the same few pages again and again, and a container's limit, which
    counts them, has room for other things. OSError is that of the disk, of `write` or of a later call.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._digest, self._written, self._synced = hashlib.sha256(), 0, 0
        self._beside = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        """Writes all of some bytes, which may be any buffer; their number."""
        left = view = memoryview(data).cast("B")
        while len(left):
            left = left[os.write(self._file, left) :]
        self._digest.update(view)
        self._written += len(view)
        if self._written - self._synced >= SYNC_EVERY:
            self._wait()
            self._syncing = self._beside.submit(self._sync, self._synced, self._written)
            self._synced = self._written
        return len(view)

    def sha256(self) -> str:
        """The digest of all that was written."""
        return self._digest.hexdigest()

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._wait()
        finally:
            super().close()
            self._beside.shutdown()
            os.close(self._file)

    def _wait(self) -> None:
        """Until what was being brought to the disk is there."""
        syncing, self._syncing = self._syncing, None
        if syncing:
            syncing.result()

    def _sync(self, start: int, end: int) -> None:
        os.fsync(self._file)
        if hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_DONTNEED)
