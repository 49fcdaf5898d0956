"""Atomic writes, JSON files, digests, directory listings, locks and disk space."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from fivefold.errors import DataError, RetryableError, SettingsError
from fivefold.log import log
from fivefold.progress import MIB
from fivefold.signals import raise_if_stopped

STALE_AFTER_S = 900.0
POLL_INTERVAL_S = 0.1
CHUNK_FILES = 4096
MAX_FILE_BYTES = 512 * MIB
MAX_TABLE_BYTES = 4096 * MIB
MAX_ARCHIVE_BYTES = 200 * 1024 * MIB
"""Limits in bytes: of a file and of a table that is read into memory, and of all files of an archive together."""
UNSUPPORTED_CODES = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""Error codes of a file system that does not support a call."""
# fmt: off
SYSTEM_FOLDERS = {
    "@eadir", "@recently-snapshot", "@recycle", "@sharesnap", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
    "lost+found", "network trash folder", "system volume information", "temporary items", "~snapshot", "recycler", "recycled",
    "found.000", "found.001", "@__thumb", "@appstore", "@sharebin",
}
# fmt: on
"""Folders that storage servers and operating systems create, in lower case."""
HIDDEN, SYSTEM, DANGLING, EMPTY = "hidden", "in system folders", "links that lead nowhere", "empty folders"
"""Reasons why `tree_names` ignores a file or a folder."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    If the block fails, an existing `path` stays unchanged. Raise a RetryableError if the disk is full.
    """
    # not the process id: it is 1 in every container, and several may share this folder
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with raise_on_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                sync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(file: int) -> None:
    """Flush an open file to the disk, if its file system supports this."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in UNSUPPORTED_CODES:
            raise


@contextmanager
def raise_on_full_disk(path: Path) -> Iterator[None]:
    """Raise a RetryableError if the disk is full while the block writes `path`."""
    try:
        yield
    except Exception as error:
        if any(disk_is_full(cause) for cause in exception_chain(error)):
            raise RetryableError(
                f"no space left to write {path}: free some, then run the same command again"
            ) from error
        raise


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error`, then its causes or contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def disk_is_full(error: BaseException) -> bool:
    """Return whether `error` means a full disk. Native libraries (safetensors, torch) give only a message, no error code."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def remove_stale_temp_files(folder: Path) -> None:
    """Remove temporary files below `folder` that a killed process left and nobody has written to for 15 minutes."""
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_AFTER_S:
                path.unlink()


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file atomically, with the permissions `mode` less the umask."""
    with atomic(path) as temporary:
        temporary.touch(mode)
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, mode: int = 0o666) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raise an OSError if it is unreadable, a DataError if it is a device, a pipe or too large."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} is a device or a pipe, not a file")
    check_size(path, status.st_size)
    return path.read_bytes()


def check_size(name: str | Path, size: int) -> None:
    """Raise a DataError if a file is larger than the limit for tables (.csv) or for other files."""
    limit = MAX_TABLE_BYTES if str(name).lower().endswith(".csv") else MAX_FILE_BYTES
    if size > limit:
        raise DataError(f"{name} has {size:,} bytes, and the limit for such a file is {limit:,}; make it smaller")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_cached(path: Path) -> str:
    """Return the SHA-256 of a file, cached until its size, modification time or inode changes."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, *_: int) -> str:
    return sha256(path)


def tree_files(root: Path) -> list[Path]:
    """Return all files below `root` (or `root` itself if it is a file), sorted by name, without those that `tree_names` ignores."""
    return [root] if root.is_file() else [root / name for name in tree_names(root)]


def is_visible(name: str) -> bool:
    """Return whether the name of a file or folder is neither hidden nor in SYSTEM_FOLDERS."""
    return not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS


def tree_names(root: Path, ignored: dict[str, list[str]] | None = None) -> list[str]:
    """Return the relative POSIX names of all files below `root`, sorted, without hidden and system files. Follow links.

    Add the ignored names to `ignored`, by reason. A hidden or system folder appears once per file in it; the name of an
    empty folder ends in a slash.
    """
    names: list[str] = []
    reasons: dict[str, list[str]] = defaultdict(list)
    waiting = [("", (os.path.realpath(root),))]
    while waiting:
        prefix, ancestors = waiting.pop()
        with os.scandir(root / prefix) as scanned:
            entries = list(scanned)
        if prefix and not entries:
            reasons[EMPTY].append(prefix)
        for entry in entries:
            name = prefix + entry.name
            if not is_visible(entry.name):
                if ignored is not None:
                    files = sum(len(files) for *_, files in os.walk(entry.path))  # folders that this user may read
                    reasons[HIDDEN if entry.name.startswith(".") else SYSTEM] += [name] * max(files, 1)
            elif entry.is_symlink() and not Path(entry.path).exists():
                reasons[DANGLING].append(name)
            elif entry.is_file():
                names.append(name)
            # a link to an ancestor would recurse forever
            elif entry.is_dir() and (real := os.path.realpath(entry.path)) not in ancestors:
                waiting.append((f"{name}/", (*ancestors, real)))
    if ignored is not None:
        ignored.update(reasons)
    return sorted(names)


def tree_sha256(root: Path, without: tuple[str, ...] = (), only: tuple[str, ...] = ("",)) -> str:
    """Return one SHA-256 over the names and bytes of all files below `root`, except paths that end in one of `without`.

    If a name does not end in one of `only` (in any case), the digest covers only that name.
    """
    folder = root.parent if root.is_file() else root
    names = [root.name] if root.is_file() else tree_names(root)
    names = [name for name in names if not f"/{name}".endswith(without)]
    read = [name for name in names if name.lower().endswith(only)]
    digest = hashlib.sha256(os.fsencode("\0".join(names)))
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(read), CHUNK_FILES):
            for content in pool.map(sha256, [folder / name for name in read[start : start + CHUNK_FILES]]):
                digest.update(content.encode())
    return digest.hexdigest()


def preallocate(descriptor: int, size: int) -> None:
    """Allocate `size` bytes of disk for an open file now, because a disk that fills under a memory map kills the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED_CODES:
                raise
    for start in range(0, size, MIB):  # macOS, and file systems without fallocate
        os.pwrite(descriptor, bytes(min(MIB, size - start)), start)


def check_writable(folder: Path, other: str = "give another folder") -> None:
    """Create `folder` and a file in it. If not possible, raise a SettingsError with path, user and remedies; `other` is one of them.

    Raise a RetryableError if the disk is full.
    """
    probe = folder / f".probe.{secrets.token_hex(4)}.tmp"
    try:
        write_text(probe, "probe")  # a full disk still accepts an empty file, and some bucket mounts cannot rename
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"cannot write to {folder.absolute()} as uid {os.getuid()}: {error.strerror}; "
            f"mount it writable for that user, or {other}"
        ) from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` while the block runs, so that other processes that call this wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".turn", "ab") as file:
        lock(file.fileno())
        yield


def lock(file: int, waiting: str = "") -> None:
    """Lock the open file, after other processes release it. While it waits, log `waiting` once and stop on a signal."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                log.info("%s", waiting)
            waiting = ""
        except OSError as error:
            if error.errno in UNSUPPORTED_CODES:  # no locks on this file system; concurrent writers use different names
                return None
            raise
        raise_if_stopped()
        time.sleep(POLL_INTERVAL_S)


def check_space(folder: Path, needed: int) -> None:
    """Raise a RetryableError, with both sizes, if less than `needed` bytes are free for `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RetryableError(
            f"{folder} has {free / MIB:.1f} MiB free, and this stage writes about {needed / MIB:.1f} MiB: "
            "free some, then run the same command again"
        )


def join_below(root: Path, name: str) -> Path:
    """Return the path of `name` inside `root`. Raise a DataError if it would be outside."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(os.path.normpath(root)):
        raise DataError(f"path {name!r} is outside {root}")
    return path
