"""Image caches made: surveyed first, bounded, decoded in threads, and there whole or not at all.

A cache lies in a folder of caches under its key, so that whoever needs the same images as the same pixels finds the same
one. It is written under a temporary name while a lock is held. The lock goes with the process that holds it: what a
killed one left is then removed by the next.
"""

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fivefold.contract.files import full_disk_told, lock, sha256, write_json
from fivefold.data.cache import ALIGNED, ENTRY, HEAD, INDEX, PIXELS, Cache, head_of, key_of
from fivefold.data.images import Pixels, decoded_size
from fivefold.data.store import GIB, ImageStore
from fivefold.data.threads import in_threads
from fivefold.errors import DataError, MissingInputError, RetryableError, SettingsError
from fivefold.progress import MIB, track

log = logging.getLogger("fivefold")

SAMPLE = 256
SURE = 0.8
"""Images that are looked at first, and the share of what they promise that must be too large to look no further."""
RESERVE = 0.05
"""Share of the free disk that a cache leaves free."""


@dataclass(frozen=True)
class Source:
    """Images at `paths` of a store [N], and the SHA-256 that their files must have; None where that is not known."""

    store: ImageStore
    paths: Sequence[str]
    sha256: Sequence[str | None]

    def read(self, row: int) -> tuple[bytes, str]:
        """The file's bytes and their SHA-256; a DataError if it changed since the split."""
        content = self.store.read(self.paths[row])
        found = hashlib.sha256(content).hexdigest()
        if self.sha256[row] not in (None, found):
            raise DataError(f"{self.paths[row]} is not the file that the split saw; run the split again")
        return content, found


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A file that a cache is to hold: where it is, its digest, and the (height, width) that it is stored at, about."""

    source: Source
    row: int
    sha256: str
    size: tuple[int, int]

    def decode(self, pixels: Pixels) -> np.ndarray:
        content, digest = self.source.read(self.row)
        if digest != self.sha256:
            raise DataError(f"{self.source.paths[self.row]} has changed while it was read; run the same command again")
        return pixels.decode(content, self.source.paths[self.row])


def survey(sources: Sequence[Source], pixels: Pixels) -> list[Surveyed]:
    """Every file once, by ascending digest, of the files' bytes and heads: nothing is decoded yet."""

    def look(item: tuple[Source, int]) -> Surveyed:
        source, row = item
        content, digest = source.read(row)
        return Surveyed(source, row, digest, pixels.size(*decoded_size(content, source.paths[row])))

    items = [(source, row) for source in sources for row in range(len(source.paths))]
    found = {image.sha256: image for image in track(in_threads(look, items), len(items), "looking at images")}
    return [found[digest] for digest in sorted(found)]


def bytes_of(images: Iterable[Surveyed]) -> int:
    """The bytes of the pixels of these images, each padded to the next boundary."""
    return sum(_padded(height * width * 3) for height, width in (image.size for image in images))


def in_words(size: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def check_room(folder: Path, images: Sequence[Surveyed], most_gib: float) -> None:
    """Raises where these images are too large: a SettingsError for `most_gib`, a RetryableError for the disk's free space."""
    needed = bytes_of(images)
    _check_room(folder, needed, f"{len(images)} decoded images take {in_words(needed)}", most_gib)


def check_sample(folder: Path, source: Source, pixels: Pixels, most_gib: float) -> None:
    """As `check_room`, by a few of many images, so that not all are read for an answer that is plain from those."""
    count = len(source.paths)
    if count > 4 * SAMPLE:
        rows = range(0, count, -(-count // SAMPLE))
        few = survey([Source(source.store, [source.paths[n] for n in rows], [source.sha256[n] for n in rows])], pixels)
        needed = bytes_of(few) / len(few) * len(set(source.sha256))
        _check_room(folder, SURE * needed, f"{count} decoded images take about {in_words(needed)}", most_gib)


def _check_room(folder: Path, needed: float, what: str, most_gib: float) -> None:
    free = (1 - RESERVE) * shutil.disk_usage(folder).free
    smaller = "data.store_size=256, say, shrinks each to 256 pixels"
    if needed > most_gib * GIB:
        raise SettingsError(f"{what}, and data.cache_gib={most_gib:g} are allowed: raise that key, or {smaller}")
    if needed > free:
        raise RetryableError(
            f"{what}, and {folder} has {in_words(free)} free for them: "
            f"free some, then run the same command again; another folder helps too, or {smaller}"
        )


def build(folder: Path, images: Sequence[Surveyed], pixels: Pixels) -> Cache:
    """The cache of these images at `folder`, which is not there yet; a RetryableError, and nothing left, on a full disk."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        with full_disk_told(folder):
            temporary.mkdir(parents=True)
            _write(temporary, images, pixels)
            temporary.rename(folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Cache(folder)


def made(
    path: Path, images: Sequence[Surveyed] | Callable[[], Sequence[Surveyed]], pixels: Pixels, most_gib: float
) -> Cache:
    """The cache of these images at `path`: the one that is there, or else a new one, made by one process at a time.

    Raises as `check_room` and `build` do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_builder(path):
        found = _opened(path)
        return _built(path, images() if callable(images) else images, pixels, most_gib) if found is None else found


def key_of_images(images: Sequence[Surveyed], pixels: Pixels) -> str:
    return key_of([image.sha256 for image in images], pixels)


def cached_once(folder: Path, source: Source, pixels: Pixels, most_gib: float) -> Cache | None:
    """The cache of these images among those in `folder`, made by the first process that asks; the others wait for it.

    All digests must be known. None, with a line in the log, where it does not fit or `folder` cannot be written to: the
    images are then to be read from their files. One that is damaged is made anew.
    """
    path = folder / key_of(source.sha256, pixels)
    try:
        with suppress(MissingInputError, DataError):
            return Cache(path)
        folder.mkdir(parents=True, exist_ok=True)
        check_sample(folder, source, pixels, most_gib)
        return made(path, lambda: survey([source], pixels), pixels, most_gib)
    except OSError as error:
        log.warning("no image cache in %s (%s): images are read from their files", folder, error.strerror or error)
    except (SettingsError, RetryableError) as error:
        log.warning("no image cache: %s; images are read from their files", error)
    return None


@contextmanager
def one_builder(path: Path) -> Iterator[None]:
    """Keeps others that would make the cache at `path` waiting; what a killed process left of it is removed."""
    # One that another user made can be locked all the same.
    name = path.with_name(f".{path.name}.lock")
    try:
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not name.exists():
            raise
        file = os.open(name, os.O_RDONLY)
    try:
        lock(file, f"another process decodes these images into {path}: waiting for it")
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(file)


def _opened(path: Path) -> Cache | None:
    """The cache at `path`; None where there is none, or a damaged one, which is removed."""
    try:
        return Cache(path)
    except MissingInputError:
        pass
    except DataError as error:
        log.warning("%s; it is made anew", error)
    if path.exists():
        shutil.rmtree(path)
    return None


def _built(path: Path, images: Sequence[Surveyed], pixels: Pixels, most_gib: float) -> Cache:
    check_room(path.parent, images, most_gib)
    size = in_words(bytes_of(images))
    log.info("%d images are decoded once, %s, into %s (%s)", len(images), pixels.in_words, path, size)
    return build(path, images, pixels)


def _write(folder: Path, images: Sequence[Surveyed], pixels: Pixels) -> None:
    index = np.zeros(len(images), ENTRY)
    digest = hashlib.sha256()
    offset = 0
    decoded = in_threads(lambda image: image.decode(pixels), images)
    with open(folder / PIXELS, "wb") as file:
        for row, found in enumerate(track(decoded, len(images), "decoding images")):
            height, width = found.shape[:2]
            index[row] = (bytes.fromhex(images[row].sha256), offset, height, width)
            for part in (found.reshape(-1), bytes(_padded(found.nbytes) - found.nbytes)):
                file.write(part)
                digest.update(part)
            offset += _padded(found.nbytes)
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / INDEX, index)
    _sync(folder / INDEX)
    write_json(folder / HEAD, head_of(pixels, len(images), offset, digest.hexdigest(), sha256(folder / INDEX)))
    _sync(folder)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
