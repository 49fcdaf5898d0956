"""Files that are whole or not there at all, and digests of them."""

import errno
import fcntl
import hashlib
import json
import logging
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
from fivefold.progress import MIB
from fivefold.stopping import poll

log = logging.getLogger("fivefold")

SECONDS_UNTIL_ABANDONED = 900.0
SECONDS_BETWEEN_LOOKS = 0.1
FILES_AT_ONCE = 4096
MOST_OF_A_FILE = 512 * MIB
MOST_OF_A_TABLE = 4096 * MIB
MOST_OF_AN_ARCHIVE = 200 * 1024 * MIB
"""Bytes of one file or table that are read into memory, and that all files of an archive have together."""
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What a file system answers that lacks a call."""
# fmt: off
SYSTEM_FOLDERS = {
    "@eadir", "@recently-snapshot", "@recycle", "@sharesnap", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
    "lost+found", "network trash folder", "system volume information", "temporary items", "~snapshot", "recycler", "recycled",
    "found.000", "found.001", "@__thumb", "@appstore", "@sharebin",
}
# fmt: on
"""What storage servers and operating systems keep beside people's files, in lower case."""
HIDDEN, SYSTEM, DANGLING, EMPTY = "hidden", "in system folders", "links that lead nowhere", "empty folders"
"""Why `tree_names` passes over a file or a folder."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` when the block ends well.

    A full disk is a RetryableError; whatever stood at `path` before stays as it was.
    """
    # Not the process id: every container's is 1, and several may share this folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with full_disk_told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                sync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(file: int) -> None:
    """Has an open file on the disk itself, where its file system can say so."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Makes a full disk, while `path` is written, a RetryableError."""
    try:
        yield
    except Exception as error:
        if any(disk_is_full(cause) for cause in causes(error)):
            raise RetryableError(
                f"no space left to write {path}: free some, then run the same command again"
            ) from error
        raise


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it was raised from, or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def disk_is_full(error: BaseException) -> bool:
    """Whether `error` says so; libraries that are not Python's (safetensors, torch) say it in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files that a killed process left below `folder` and nobody has written to of late."""
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                path.unlink()


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Writes a file whole, with the permissions `mode` less the umask."""
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
    """The bytes of a file; an OSError where it cannot be read, a DataError for a device, a pipe, or one that is too large."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} is a device or a pipe, no file")
    check_size(path, status.st_size)
    return path.read_bytes()


def check_size(name: str | Path, size: int) -> None:
    """Raises a DataError for a file that takes more memory than is given to one: a table, or anything else."""
    most = MOST_OF_A_TABLE if str(name).lower().endswith(".csv") else MOST_OF_A_FILE
    if size > most:
        raise DataError(f"{name} has {size:,} bytes, and at most {most:,} are read of such a file; make it smaller")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """The digest of a file that this process may ask for several times: taken again only when the file has changed."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, *_: int) -> str:
    return sha256(path)


def tree_files(root: Path) -> list[Path]:
    """All files below `root` (or `root` itself, a file), sorted by name; hidden ones left out."""
    return [root] if root.is_file() else [root / name for name in tree_names(root)]


def is_shown(name: str) -> bool:
    """Whether a file or folder of this name is people's own: neither hidden nor a system's."""
    return not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS


def tree_names(root: Path, passed: dict[str, list[str]] | None = None) -> list[str]:
    """Relative POSIX names of all files below `root`, sorted; hidden ones and those of systems left out, links followed.

    `passed` gets what is left out by the reason: names, those of hidden and systems' folders once for each file in them;
    those of empty folders end in a slash.
    """
    found: list[str] = []
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
            if not is_shown(entry.name):
                if passed is not None:
                    files = sum(len(files) for *_, files in os.walk(entry.path))  # as far as this user may look
                    reasons[HIDDEN if entry.name.startswith(".") else SYSTEM] += [name] * max(files, 1)
            elif entry.is_symlink() and not Path(entry.path).exists():
                reasons[DANGLING].append(name)
            elif entry.is_file():
                found.append(name)
            # A link to a folder that we are in would be walked for ever.
            elif entry.is_dir() and (real := os.path.realpath(entry.path)) not in ancestors:
                waiting.append((f"{name}/", (*ancestors, real)))
    if passed is not None:
        passed.update(reasons)
    return sorted(found)


def tree_sha256(root: Path, without: tuple[str, ...] = (), only: tuple[str, ...] = ("",)) -> str:
    """One digest of the names and bytes of all files below `root`, but for those whose path ends in one of `without`.

    Of files whose name does not end in one of `only` (in any case) it covers the name alone.
    """
    folder = root.parent if root.is_file() else root
    names = [root.name] if root.is_file() else tree_names(root)
    names = [name for name in names if not f"/{name}".endswith(without)]
    read = [name for name in names if name.lower().endswith(only)]
    digest = hashlib.sha256(os.fsencode("\0".join(names)))
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(read), FILES_AT_ONCE):
            for content in pool.map(sha256, [folder / name for name in read[start : start + FILES_AT_ONCE]]):
                digest.update(content.encode())
    return digest.hexdigest()


def reserve(descriptor: int, size: int) -> None:
    """Takes `size` bytes of the disk for an open file, now: one that fills up under a memory map kills the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    for start in range(0, size, MIB):  # macOS, and file systems without it
        os.pwrite(descriptor, bytes(min(MIB, size - start)), start)


def probe_writable(folder: Path, other: str = "give another folder") -> None:
    """Makes `folder` and a file in it; a SettingsError names the path, the user, the mend and what `other` way there is."""
    probe = folder / f".probe.{secrets.token_hex(4)}.tmp"
    renamed = probe.with_suffix(".renamed.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A full disk still takes an empty file, and some mounts of buckets rename none.
        probe.write_bytes(b"probe")
        os.replace(probe, renamed)
    except (FileExistsError, NotADirectoryError) as error:
        raise SettingsError(
            f"cannot write to {folder.absolute()}: a file stands where a folder is needed; give another"
        ) from error
    except OSError as error:
        if disk_is_full(error):
            raise RetryableError(f"no space left in {folder}: free some, then run the same command again") from error
        raise SettingsError(
            f"cannot write to {folder.absolute()} as uid {os.getuid()}: {error.strerror}; "
            f"mount it writable for that user, or {other}"
        ) from error
    finally:
        for path in (probe, renamed):
            with suppress(OSError):
                path.unlink()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps other processes that do this in the same folder waiting while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".turn", "ab") as file:
        lock(file.fileno())
        yield


def lock(file: int, waiting: str = "") -> None:
    """Locks the open file once nobody else has it; who has to wait says `waiting` in the log, and can be stopped."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                log.info("%s", waiting)
            waiting = ""
        except OSError as error:
            if error.errno in UNSUPPORTED:  # a file system without locks; two that write there do so under other names
                return None
            raise
        poll()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def check_space(folder: Path, needed: int) -> None:
    """Raises a RetryableError, with both figures, where less than `needed` bytes are free for `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RetryableError(
            f"{folder} has {free / MIB:.1f} MiB free, and what this stage writes takes about {needed / MIB:.1f} MiB: "
            "free some, then run the same command again"
        )


def below(root: Path, name: str) -> Path:
    """The path `name` inside `root`; a DataError when it would lead out of it."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(os.path.normpath(root)):
        raise DataError(f"path {name!r} leads out of {root}")
    return path
