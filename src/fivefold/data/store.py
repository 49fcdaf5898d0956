"""Images where they lie: in a folder, or straight out of a zip that is never unpacked to disk.

Stores have `root`, `names()`, `exists(name)` and `read(name)`, hold no open file, and may so be shared by threads and
forked or spawned loader workers. `caches` are the image caches (`image_cache.Cache`) that hold some of the images decoded.
"""

import hashlib
import os
import posixpath
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from fivefold.contract.files import (
    EMPTY,
    HIDDEN,
    MOST_OF_AN_ARCHIVE,
    SYSTEM,
    below,
    check_size,
    is_shown,
    read_file,
    tree_names,
)
from fivefold.errors import DataError, MissingInputError

GIB = 2**30
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, then the lengths of name and extra field, of the 30 bytes before the data of a zip's entry."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Packings of which no more is unpacked than the zip declares."""


@dataclass(frozen=True)
class FolderStore:
    """The files below a folder."""

    root: Path
    caches: Sequence[Any] = ()

    def names(self, passed: dict[str, list[str]] | None = None) -> list[str]:
        """Relative POSIX names of all files, sorted; what is left out is added to `passed`, as by `tree_names`."""
        return tree_names(self.root, passed)

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files directly in `folder` ("" is the root), sorted."""
        with os.scandir(below(self.root, folder)) as entries:
            # A link that leads in a circle is no folder; asked itself, it raises.
            is_folder = {
                e.name: (Path(e).is_dir() if e.is_symlink() else e.is_dir()) for e in entries if is_shown(e.name)
            }
        return _two_lists(is_folder)

    def exists(self, name: str) -> bool:
        return _spelled(self.root, name).is_file()

    def read(self, name: str) -> bytes:
        """The bytes of one file; a DataError for a path that leads out of the root, to no file, or to one that is too large."""
        try:
            return read_file(_spelled(self.root, name))
        except OSError as error:
            raise DataError(f"{name} in {self.root} cannot be read: {error.strerror}") from error


def _spelled(root: Path, name: str) -> Path:
    """The path `name` inside `root`; where it is not there, with accents composed or apart, as they stand on the disk."""
    path = below(root, name)
    if name.isascii() or path.exists():
        return path
    found = root
    for part in path.relative_to(os.path.normpath(root)).parts:
        forms = (found / unicodedata.normalize(form, part) for form in ("NFC", "NFD"))
        found = next((form for form in forms if form.exists()), found / part)
    return found


@dataclass(frozen=True, eq=False)
class ZipStore:
    """The files inside a zip, by their relative names (NFC, so that a Mac's Korean names are everybody's)."""

    root: Path
    entries: Mapping[str, zipfile.ZipInfo] = field(repr=False)
    passed: Mapping[str, list[str]] = field(repr=False, default_factory=dict)
    caches: Sequence[Any] = ()

    def names(self, passed: dict[str, list[str]] | None = None) -> list[str]:
        """Relative POSIX names of all files, sorted; what is left out is added to `passed`, as by `tree_names`."""
        if passed is not None:
            passed.update(self.passed)
        return sorted(self.entries)

    def listing(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files directly in `folder` ("" is the root), sorted."""
        prefix = f"{folder}/" if folder else ""
        inside = [name.removeprefix(prefix).partition("/") for name in self.entries if name.startswith(prefix)]
        return _two_lists({name: bool(slash) for name, slash, _ in inside})

    def exists(self, name: str) -> bool:
        return _inside(name, self.root) in self.entries

    def read(self, name: str) -> bytes:
        """The bytes of one file, never more than the zip declares; a DataError when they are not whole, or too many."""
        entry = self.entries.get(_inside(name, self.root))
        if entry is None:
            raise DataError(f"{name} in {self.root} cannot be read: no such file")
        check_size(f"{self.root}: {name}", entry.file_size)
        # Neither an open ZipFile, whose place in the file forked workers would share, nor its list read anew each time.
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
class JoinedStore:
    """Several stores to read from: `name/rest` is `rest` in the store called `name`."""

    stores: Mapping[str, FolderStore | ZipStore]

    @property
    def caches(self) -> list[Any]:
        return [cache for store in self.stores.values() for cache in store.caches]

    def read(self, name: str) -> bytes:
        """The bytes of one file, as its store reads it."""
        store, _, rest = name.partition("/")
        return self.stores[store].read(rest)


ImageStore = FolderStore | ZipStore | JoinedStore


def read_unchanged(store: ImageStore, name: str, digest: str | None) -> tuple[bytes, str]:
    """The bytes of one file and their SHA-256; a DataError where that is not the `digest` that the split took, if it took one."""
    content = store.read(name)
    own = hashlib.sha256(content).hexdigest()
    if digest not in (None, own):
        raise DataError(f"{name} is not the file that the split saw; run the split again")
    return content, own


def open_store(path: Path, max_unpacked_gib: float = MOST_OF_AN_ARCHIVE / GIB) -> ImageStore:
    """The store of a folder, of a .zip, or of a folder that holds nothing but one .zip (and CSVs).

    Raises MissingInputError where nothing is, and DataError for a zip that is broken, that names
    paths outside itself or links, or that would unpack to more than `max_unpacked_gib` GiB.
    """
    if path.is_file():
        return _open_zip(path, max_unpacked_gib)
    if not path.is_dir():
        raise MissingInputError(f"{path} does not exist; give a folder of images or a .zip")
    rest = [entry for entry in path.iterdir() if is_shown(entry.name) and entry.suffix.lower() != ".csv"]
    if len(rest) == 1 and rest[0].suffix.lower() == ".zip" and rest[0].is_file():
        return _open_zip(rest[0], max_unpacked_gib)
    return FolderStore(path)


def _open_zip(path: Path, max_unpacked_gib: float) -> ZipStore:
    with open(path, "rb") as file:  # outside the try: a file that may not be read is no broken zip
        try:
            with zipfile.ZipFile(file) as archive:
                every = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise DataError(_no_zip(path, error)) from error
    infos = [info for info in every if not info.filename.endswith(("/", "\\"))]
    size = sum(info.file_size for info in infos)
    if size > max_unpacked_gib * GIB:
        raise DataError(
            f"{path} ({path.stat().st_size:,} bytes) would unpack to {size:,} bytes ({size / GIB:.2f} GiB), more than "
            f"data.max_unpacked_gib={max_unpacked_gib:g} allows; raise that key if the zip is what you expect"
        )
    entries: dict[str, zipfile.ZipInfo] = {}
    passed: dict[str, list[str]] = defaultdict(list)
    for info in infos:
        name = _inside(_decoded_name(info), path)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{path}: entry {info.filename!r} is a symbolic link; pack the file itself")
        if odd := [part for part in name.split("/") if not is_shown(part)]:
            passed[HIDDEN if odd[0].startswith(".") else SYSTEM].append(name)
            continue
        if name in entries:
            raise DataError(
                f"{path}: the entry {name!r} is there twice (however accents are written); pack it again with one"
            )
        _check_entry(info, path)
        entries[name] = info
    filled = {posixpath.dirname(name) for name in chain(entries, *passed.values())}
    filled = {f"{parent}/" for name in filled for parent in (name, *PurePosixPath(name).parents)}
    passed[EMPTY] = sorted({_decoded_name(info) for info in every if info.is_dir()} - filled)
    return ZipStore(path, entries, dict(passed))


def _no_zip(path: Path, error: Exception) -> str:
    """What to say of a file that is no zip, by what it is called."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return f"{path} is a table, and a folder or a .zip is needed: give its folder, and data.table={path.name}"
    if suffix != ".zip":
        return f"{path} is neither a folder nor a .zip; give a folder of images or a .zip"
    return f"{path} is not a whole .zip: {error}; copy it again"


def _check_entry(info: zipfile.ZipInfo, path: Path) -> None:
    if info.header_offset < 0:
        raise DataError(f"{path} is not a whole .zip: entry {info.filename!r} lies before its start; copy it again")
    if info.flag_bits & 0x1:
        raise DataError(f"{path}: entry {info.filename!r} is encrypted; pack it without a password")
    if info.compress_type not in METHODS:
        raise DataError(f"{path}: entry {info.filename!r} is packed by method {info.compress_type}; use deflate")


def _decoded_name(info: zipfile.ZipInfo) -> str:
    """The entry's name; without the UTF-8 flag its bytes are UTF-8, else Korean Windows' cp949, else cp437."""
    if info.flag_bits & 0x800:
        return info.filename
    for encoding in ("utf-8", "cp949"):
        try:
            return info.filename.encode("cp437").decode(encoding)
        except UnicodeError:
            continue
    return info.filename


def _two_lists(is_folder: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    return tuple(sorted(name for name in is_folder if is_folder[name] is wanted) for wanted in (True, False))


def _inside(name: str, root: Path) -> str:
    """The normal form of a name inside the zip `root`; a DataError when it would lead out of it."""
    plain = unicodedata.normalize("NFC", name).replace("\\", "/")
    normal = posixpath.normpath(plain)
    if normal.startswith(("/", "../")) or normal in (".", "..") or normal[1:2] == ":":
        raise DataError(f"{root}: entry {name!r} leads out of the zip; pack it again with relative names")
    return normal
