"""Image stores: a folder, or a zip that is read without unpacking it to disk.

A store has `root`, `names()`, `ignored`, `exists(name)` and `read(name)`. It holds no open file, so threads and forked or spawned
loader workers can share it. `caches` are the image caches (`image_cache.Cache`) that hold some of its images decoded.
"""

import hashlib
import logging
import os
import posixpath
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from fivefold.contract import files
from fivefold.contract.files import DANGLING, EMPTY, HIDDEN, SYSTEM, is_visible
from fivefold.data.image_io import IMAGE_SUFFIXES, is_image
from fivefold.errors import DataError, MissingInputError
from fivefold.log import log

GIB = 2**30
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""The 30-byte local header of a zip entry: its signature, and the lengths of the name and of the extra field."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods for which `read` can stop at the size that the zip declares."""


@dataclass(frozen=True)
class FolderStore:
    """The files in a folder and its subfolders."""

    root: Path
    caches: Sequence[Any] = ()

    @cached_property
    def _tree(self) -> tuple[list[str], Mapping[str, list[str]]]:
        ignored: dict[str, list[str]] = {}
        return files.tree_names(self.root, ignored), ignored

    def names(self) -> list[str]:
        """Return relative POSIX names of all files, sorted, as they were at the first call."""
        return self._tree[0]

    @property
    def ignored(self) -> Mapping[str, list[str]]:
        """Return the names of ignored files and folders, by reason (see `tree_names`)."""
        return self._tree[1]

    def exists(self, name: str) -> bool:
        return _resolve_unicode(self.root, name).is_file()

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; raise a DataError if the path leaves the root, is not a file, or the file is too large."""
        try:
            return files.read_file(_resolve_unicode(self.root, name))
        except OSError as error:
            raise DataError(f"{name} in {self.root} cannot be read: {error.strerror}") from error


def _resolve_unicode(root: Path, name: str) -> Path:
    """Return the path `name` inside `root`; if it does not exist, try each part as NFC and NFD, as it may be on disk."""
    path = files.join_below(root, name)
    if name.isascii() or path.exists():
        return path
    resolved = root
    for part in path.relative_to(os.path.normpath(root)).parts:
        candidates = (resolved / unicodedata.normalize(form, part) for form in ("NFC", "NFD"))
        resolved = next((candidate for candidate in candidates if candidate.exists()), resolved / part)
    return resolved


@dataclass(frozen=True, eq=False)
class ZipStore:
    """The files inside a zip, by relative name in NFC (Macs write Korean names in NFD)."""

    root: Path
    entries: Mapping[str, zipfile.ZipInfo] = field(repr=False)
    ignored: Mapping[str, list[str]] = field(repr=False, default_factory=dict)
    caches: Sequence[Any] = ()

    def names(self) -> list[str]:
        """Return relative POSIX names of all files, sorted."""
        return sorted(self.entries)

    def exists(self, name: str) -> bool:
        return _inside(name, self.root) in self.entries

    def read(self, name: str) -> bytes:
        """Return the bytes of one file, never more than the zip declares; raise a DataError if its size or checksum is wrong."""
        entry = self.entries.get(_inside(name, self.root))
        if entry is None:
            raise DataError(f"{name} in {self.root} cannot be read: no such file")
        files.check_size(f"{self.root}: {name}", entry.file_size)
        # No ZipFile is kept open (forked workers would share its file position) or reopened (it would reread the directory).
        with open(self.root, "rb") as file:
            file.seek(entry.header_offset)
            signature, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size).ljust(LOCAL_HEADER.size, b"\0"))
            file.seek(sum(lengths), os.SEEK_CUR)
            try:
                content = zipfile.ZipExtFile(file, "r", entry).read(entry.file_size)
            except (zipfile.BadZipFile, zlib.error, EOFError):
                content = b""
        if signature != b"PK\3\4" or len(content) != entry.file_size:
            raise DataError(f"{name} in {self.root} is damaged: its bytes do not match the zip's size and checksum")
        return content


@dataclass(frozen=True, eq=False)
class MultiStore:
    """Several stores read as one: `name/rest` is the file `rest` of the store `name`."""

    stores: Mapping[str, FolderStore | ZipStore]

    @property
    def caches(self) -> list[Any]:
        return [cache for store in self.stores.values() for cache in store.caches]

    def read(self, name: str) -> bytes:
        """Return the bytes of one file from its store."""
        store, _, rest = name.partition("/")
        return self.stores[store].read(rest)


ImageStore = FolderStore | ZipStore | MultiStore


def read_verified(store: ImageStore, name: str, digest: str | None) -> tuple[bytes, str]:
    """Return the bytes of one file and their SHA-256; raise a DataError if `digest`, from the split, is set and differs."""
    content = store.read(name)
    actual = hashlib.sha256(content).hexdigest()
    if digest not in (None, actual):
        raise DataError(f"{name} changed after the split; run the split again")
    return content, actual


def open_store(path: Path, max_unpacked_gib: float = files.MAX_ARCHIVE_BYTES / GIB) -> ImageStore:
    """Open a folder, a .zip, or a folder that holds only one .zip (and CSVs).

    Raise MissingInputError if the path does not exist, and a DataError for a zip that is broken, that has links or
    paths outside itself, or that would unpack to more than `max_unpacked_gib` GiB.
    """
    if path.is_file():
        return _open_zip(path, max_unpacked_gib)
    if not path.is_dir():
        raise MissingInputError(f"{path} does not exist; pass a folder of images or a .zip")
    rest = [entry for entry in path.iterdir() if is_visible(entry.name) and entry.suffix.lower() != ".csv"]
    if len(rest) == 1 and rest[0].suffix.lower() == ".zip" and rest[0].is_file():
        return _open_zip(rest[0], max_unpacked_gib)
    return FolderStore(path)


def _open_zip(path: Path, max_unpacked_gib: float) -> ZipStore:
    with open(path, "rb") as file:  # outside the try: a permission error does not mean a broken zip
        try:
            all_infos = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise DataError(
                f"{path} is neither a folder nor a complete .zip: {error}; "
                "pass a folder of images, with data.table=NAME for a CSV in it, or a .zip"
            ) from error
    infos = [info for info in all_infos if not info.filename.endswith(("/", "\\"))]
    size = sum(info.file_size for info in infos)
    if size > max_unpacked_gib * GIB:
        raise DataError(
            f"{path} ({path.stat().st_size:,} bytes) would unpack to {size:,} bytes ({size / GIB:.2f} GiB), more than "
            f"data.max_unpacked_gib={max_unpacked_gib:g} allows; raise that key if you trust the zip"
        )
    entries: dict[str, zipfile.ZipInfo] = {}
    passed: dict[str, list[str]] = defaultdict(list)
    for info in infos:
        name = _inside(_decoded_name(info), path)
        if ignored := [part for part in name.split("/") if not is_visible(part)]:
            passed[HIDDEN if ignored[0].startswith(".") else SYSTEM].append(name)
            continue
        if name in entries:
            raise DataError(f"{path}: duplicate entry {name!r} (after Unicode normalization); pack it again with one")
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        if is_link or info.flag_bits & 0x1 or info.compress_type not in METHODS or info.header_offset < 0:
            kinds = "a symbolic link, encrypted, incomplete or not packed with deflate"
            raise DataError(f"{path}: entry {name!r} is {kinds}; pack the file itself again")
        entries[name] = info
    non_empty = {posixpath.dirname(name) for name in chain(entries, *passed.values())}
    non_empty = {f"{parent}/" for name in non_empty for parent in (name, *PurePosixPath(name).parents)}
    passed[EMPTY] = sorted({_decoded_name(info) for info in all_infos if info.is_dir()} - non_empty)
    return ZipStore(path, entries, dict(passed))


def _decoded_name(info: zipfile.ZipInfo) -> str:
    """Return the entry's name; without the UTF-8 flag, decode its bytes as UTF-8, else cp949 (Korean Windows), else cp437."""
    if info.flag_bits & 0x800:
        return info.filename
    for encoding in ("utf-8", "cp949"):
        with suppress(UnicodeError):
            return info.filename.encode("cp437").decode(encoding)
    return info.filename


def _inside(name: str, root: Path) -> str:
    """Return the normalized form of a name inside the zip `root`; raise a DataError if it leaves the zip."""
    normal = posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))
    if is_outside(normal):
        raise DataError(f"{root}: entry {name!r} leads out of the zip; pack it again with relative names")
    return normal


def is_outside(path: str) -> bool:
    """Return whether a normalized relative path names its root or leads out of it, as an absolute one does."""
    return path.startswith(("/", "../")) or path in (".", "..") or path[1:2] == ":"


UNUSED = ("not in the table", "in no class folder")
UNREAD = {".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".tga"} - IMAGE_SUFFIXES
"""Suffixes of image formats that Fivefold cannot decode."""
ANSWERED_REASONS = (*UNREAD, DANGLING, "without suffix")
"""Reasons for ignoring files that still get a row if every input needs a result (as in `predict`)."""
_OTHERS = ".db .docx .h5 .html .ini .ipynb .json .jsonl .log .mat .md .npy .npz .parquet .pdf .pkl .pth .py .tsv .txt .xml .yaml .yml"
NON_IMAGE_REASONS = {HIDDEN, SYSTEM, EMPTY, *UNUSED, *_OTHERS.split()}
"""Reasons for ignoring files that are certainly not images to use: suffixes common beside images, and others."""


@dataclass(frozen=True)
class Inventory:
    """Names of the files in a store: `images` by suffix, and `ignored` by the reason for ignoring them."""

    images: list[str]
    ignored: Mapping[str, list[str]]

    @property
    def expected_images(self) -> list[str]:
        """Return the sorted names of the images, of undecodable or broken ones, and of files without a suffix."""
        return sorted(self.images + [name for reason in ANSWERED_REASONS for name in self.ignored.get(reason, [])])

    def counts(self, used: Collection[str] = (), unused: str = "") -> dict[str, int]:
        """Count the ignored files by reason; images that are not in `used` count under the reason `unused`, if it is set."""
        counts = {reason: len(names) for reason, names in sorted(self.ignored.items()) if reason != EMPTY}
        if unused:
            names, used_names = (
                {unicodedata.normalize("NFC", name) for name in group} for group in (self.images, used)
            )
            counts[unused] = len(names - used_names)
        return {reason: count for reason, count in counts.items() if count}


def take_inventory(store: ImageStore) -> Inventory:
    """List every file of a store. CSV files are in neither group: their readers list them."""
    images, ignored = [], defaultdict(list, {reason: list(names) for reason, names in store.ignored.items()})
    for name in store.names():
        if is_image(name):
            images.append(name)
        elif not name.lower().endswith(".csv"):
            ignored[posixpath.splitext(name)[1].lower() or "without suffix"].append(name)
    return Inventory(images, ignored)


def may_be_images(reasons: Collection[str]) -> bool:
    """Return whether files ignored for these reasons may be images."""
    return not NON_IMAGE_REASONS.issuperset(reasons)


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return `4 .heic, 2 hidden`, with a hint on what to install."""
    hint = " (pip install 'fivefold[heif]' adds HEIC support)" if {".heic", ".heif"} & counts.keys() else ""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) + hint


def log_ignored(counts: Mapping[str, int], where: object) -> None:
    """Log the ignored files in one line, as a warning if some may be images."""
    if counts:
        level = logging.WARNING if may_be_images(counts) else logging.INFO
        log.log(level, "data: ignored files in %s: %s", where, describe_counts(counts))
