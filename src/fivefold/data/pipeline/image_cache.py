"""The image cache: decoded images, one after the other in a file that all readers map into memory.

A cache is a folder of three files: `pixels.u8` (each image uint8 [H, W, 3], aligned to 64 bytes), `index.npy`
(the SHA-256 of each image's file, ascending, and the position of its pixels) and `cache.json`, the header, written
last. The key of an image is the content of its file, not its name or row, so one cache serves all folds, and duplicate
files are stored once.

Opening a cache checks the header, the sizes of both files and the digest of the index. `verify` checks the
digest of the pixels; a stage calls it on the caches of its channel, which another job wrote.

The name of a cache folder is its key, so that all processes that need the same images with the same decoding options
use the same cache. A process writes it under a temporary name while it holds a lock. The lock ends with the process;
the next one removes the files that a killed process left.
"""

import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from fivefold.contract.files import full_disk_told, lock, read_json, sha256, sync, write_json
from fivefold.data.image_io import Pixels, in_threads
from fivefold.data.readers.stores import GIB, ImageStore, read_unchanged
from fivefold.errors import DataError, MissingInputError, RetryableError, SettingsError
from fivefold.progress import MIB, track

log = logging.getLogger("fivefold")

HEAD, INDEX, PIXELS = "cache.json", "index.npy", "pixels.u8"
FORMAT = 1
ALIGNMENT = 64
CHUNK_BYTES = 1 << 22
ENTRY = np.dtype([("sha256", "S32"), ("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])
DECODER = f"Pillow {Image.__version__}"
SURVEY_SAMPLE = 256
SAMPLE_MARGIN = 0.8
"""Images to survey first, and the fraction of the size estimated from them that must be too large to stop at once."""
RESERVED_DISK_FRACTION = 0.05
"""Fraction of the free disk space that a cache leaves free."""


class Head(BaseModel):
    """The content of `cache.json`; digests are in hex."""

    model_config = ConfigDict(strict=True)

    format: int
    decoder: str
    store_size: int
    scaled_decoding: bool
    images: int
    bytes: int
    pixels_sha256: str
    index_sha256: str


class Cache:
    """The images of a cache folder: read-only, and usable from threads and from forked and spawned processes."""

    def __init__(self, folder: Path) -> None:
        """Open the cache; raise MissingInputError if there is none, and a DataError if it is damaged or not a cache."""
        self.folder = folder
        self.head = _read_head(folder)
        self.pixels = Pixels(self.head.store_size, self.head.scaled_decoding)
        self.index = _read_index(folder, self.head)
        self.bytes = self.head.bytes
        size = (folder / PIXELS).stat().st_size if (folder / PIXELS).is_file() else 0
        if size != self.bytes:
            raise DataError(
                f"{folder / PIXELS} has {size:,} bytes, but its {HEAD} says {self.bytes:,}: it is truncated, or belongs to "
                "another cache; copy the whole folder again, or run prepare again"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.folder,)

    def __len__(self) -> int:
        return len(self.index)

    def find(self, digests: Sequence[str | None]) -> np.ndarray:
        """Return the indices of the images whose files have these SHA-256 (hex): int64 [N], -1 for images not in the cache."""
        keys = np.array([bytes.fromhex(digest) if digest else b"" for digest in digests], "S32")
        positions = np.searchsorted(self.index["sha256"], keys)
        is_known = self.index["sha256"][np.minimum(positions, len(self) - 1)] == keys
        return np.where(is_known, positions, -1).astype(np.int64)

    def image(self, at: int) -> np.ndarray:
        """Return the pixels uint8 [H, W, 3] of the image at this index: a view of the file, not to be modified."""
        _, offset, height, width = self.index[at].item()
        return self._mapped[offset : offset + height * width * 3].reshape(height, width, 3)

    def verify(self) -> None:
        """Read all pixels, with a progress bar; raise a DataError if their digest is not that of the header."""
        digest = hashlib.sha256()
        with open(self.folder / PIXELS, "rb") as file:
            chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            for chunk in track(chunks, self.bytes, "checking the image cache", bytes_of=len):
                digest.update(chunk)
        if digest.hexdigest() != self.head.pixels_sha256:
            raise DataError(
                f"{self.folder / PIXELS} is damaged: its bytes do not match the digest in {HEAD}; copy the whole folder "
                "again, or run prepare again"
            )

    @cached_property
    def _mapped(self) -> np.ndarray:
        with open(self.folder / PIXELS, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _read_head(folder: Path) -> Head:
    path = folder / HEAD
    if not path.is_file():
        raise MissingInputError(f"no {HEAD} in {folder}: pass the folder that prepare wrote")
    try:
        head = Head.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"{path} does not describe an image cache: {where}: {problem['msg']}; run prepare again"
        ) from None
    if head.format != FORMAT:
        raise DataError(f"{path} has format {head.format}, but this version reads {FORMAT}; run prepare again")
    return head


def _read_index(folder: Path, head: Head) -> np.ndarray:
    """Return the index, checked: all of its images are inside the file of pixels."""
    path = folder / INDEX
    if not path.is_file() or sha256(path) != head.index_sha256:
        raise DataError(
            f"{path} does not match the digest in {HEAD}; copy the whole folder again, or run prepare again"
        )
    try:
        index = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is not an index: {error}; run prepare again") from error
    ends = index["offset"] + index["height"].astype(np.int64) * index["width"] * 3 if index.dtype == ENTRY else None
    if ends is None or len(index) != head.images or not len(index) or (ends > head.bytes).any():
        raise DataError(f"{path} does not match its {HEAD}; run prepare again")
    return index


def key_of(digests: Sequence[str], pixels: Pixels) -> str:
    """Return the name of the cache of exactly these files (SHA-256 in hex) with these decoding options."""
    identity = [FORMAT, DECODER, pixels.store_size, pixels.scaled, sorted(set(digests))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a store, and the SHA-256 that its file must have (None: unknown).

    `size`: its approximate stored (height, width), after `survey`.
    """

    store: ImageStore
    path: str
    sha256: str | None
    size: tuple[int, int] = (0, 0)

    def survey(self, pixels: Pixels) -> "ImageFile":
        """Return the image with its digest and size, from the file's bytes and header, without decoding."""
        content, digest = read_unchanged(self.store, self.path, self.sha256)
        return replace(self, sha256=digest, size=pixels.size_of(content, self.path))

    def decode(self, pixels: Pixels) -> np.ndarray:
        return pixels.decode(read_unchanged(self.store, self.path, self.sha256)[0], self.path)


def files_of(store: ImageStore, paths: Sequence[str], sha256: Sequence[str | None] | None = None) -> list[ImageFile]:
    digests = [None] * len(paths) if sha256 is None else sha256
    return [ImageFile(store, path, digest) for path, digest in zip(paths, digests, strict=True)]


def survey(files: Sequence[ImageFile], pixels: Pixels) -> list[ImageFile]:
    """Survey the files and return one per distinct content, sorted by digest."""
    surveyed = in_threads(lambda file: file.survey(pixels), files)
    images = {image.sha256: image for image in track(surveyed, len(files), "surveying images")}
    return [images[digest] for digest in sorted(images)]


def bytes_of(images: Sequence[ImageFile]) -> int:
    """Return the bytes of the pixels of these images, each padded to the alignment."""
    return sum(_padded(height * width * 3) for height, width in (image.size for image in images))


def in_words(size: float) -> str:
    """Format bytes in MiB or GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def check_room(folder: Path, images: int, needed: float, most_gib: float) -> None:
    """Raise if the pixels of these images are too large: a SettingsError for `most_gib`, a RetryableError for the disk."""
    free = (1 - RESERVED_DISK_FRACTION) * shutil.disk_usage(folder).free
    needs = f"{images} decoded images take {in_words(needed)}"
    hint = "set data.store_size=256, for example, to shrink each to 256 pixels"
    if needed > most_gib * GIB:
        raise SettingsError(f"{needs}, but data.cache_gib={most_gib:g} allows less: raise it, or {hint}")
    if needed > free:
        raise RetryableError(
            f"{needs}, but {folder} has {in_words(free)} free for them: "
            f"free some, then run the same command again, or use another folder, or {hint}"
        )


def check_sample(folder: Path, files: Sequence[ImageFile], pixels: Pixels, most_gib: float) -> None:
    """Do `check_room` with a sample of many images, to avoid reading all if the sample already shows that they do not fit."""
    if len(files) > 4 * SURVEY_SAMPLE:
        surveyed = survey(files[:: -(-len(files) // SURVEY_SAMPLE)], pixels)
        count = len({file.sha256 for file in files})
        check_room(folder, count, SAMPLE_MARGIN * bytes_of(surveyed) / len(surveyed) * count, most_gib)


def cached_once(folder: Path, files: Sequence[ImageFile], pixels: Pixels, most_gib: float) -> Cache | None:
    """Return the cache of these images in `folder`; the first process that asks builds it, the others wait.

    All digests must be known. Return None and log a warning if the cache does not fit or `folder` is not writable; the
    images must then be read from their files. Rebuild a damaged cache.
    """
    path = folder / key_of([file.sha256 for file in files], pixels)
    try:
        with suppress(MissingInputError, DataError):
            return Cache(path)
        folder.mkdir(parents=True, exist_ok=True)
        check_sample(folder, files, pixels, most_gib)
        return open_or_build(path, lambda: survey(files, pixels), pixels, most_gib)
    except OSError as error:
        log.warning("no image cache in %s (%s): images are read from their files", folder, error.strerror or error)
    except (SettingsError, RetryableError) as error:
        log.warning("no image cache: %s; images are read from their files", error)
    return None


def open_or_build(
    path: Path, survey_images: Callable[[], Sequence[ImageFile]], pixels: Pixels, most_gib: float
) -> Cache:
    """Return the cache at `path`: the existing one, or else a new one of these images, built by one process at a time.

    Rebuild a damaged cache. Raise as `check_room` and `build` do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_builder(path):
        try:
            return Cache(path)
        except MissingInputError:
            pass
        except DataError as error:
            log.warning("%s; rebuilding it", error)
        if path.exists():
            shutil.rmtree(path)
        images = survey_images()
        size = bytes_of(images)
        check_room(path.parent, len(images), size, most_gib)
        log.info("%d images are decoded once, %s, into %s (%s)", len(images), pixels.in_words, path, in_words(size))
        return build(path, images, pixels)


@contextmanager
def one_builder(path: Path) -> Iterator[None]:
    """Hold the lock on the cache at `path` while others wait; remove the files that a killed process left."""
    # A read-only lock file of another user can be locked too.
    name = path.with_name(f".{path.name}.lock")
    try:
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not name.exists():
            raise
        file = os.open(name, os.O_RDONLY)
    try:
        lock(file, f"another process is building the image cache {path}: waiting for it")
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(file)


def build(folder: Path, images: Sequence[ImageFile], pixels: Pixels) -> Cache:
    """Build the cache of these images at `folder`, which must not exist; on a full disk, clean up and raise a RetryableError."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        with full_disk_told(folder):
            temporary.mkdir(parents=True)
            _write(temporary, images, pixels)
            temporary.rename(folder)
            _sync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Cache(folder)


def _write(folder: Path, images: Sequence[ImageFile], pixels: Pixels) -> None:
    index = np.zeros(len(images), ENTRY)
    digest = hashlib.sha256()
    offset = 0
    decoded = in_threads(lambda image: image.decode(pixels), images)
    with open(folder / PIXELS, "wb") as file:
        for row, image in enumerate(track(decoded, len(images), "decoding images")):
            height, width = image.shape[:2]
            index[row] = (bytes.fromhex(images[row].sha256), offset, height, width)
            for chunk in (image.reshape(-1), bytes(_padded(image.nbytes) - image.nbytes)):
                file.write(chunk)
                digest.update(chunk)
            offset += _padded(image.nbytes)
        file.flush()
        sync(file.fileno())
    np.save(folder / INDEX, index)
    _sync_path(folder / INDEX)
    head = Head(
        format=FORMAT,
        decoder=DECODER,
        store_size=pixels.store_size,
        scaled_decoding=pixels.scaled,
        images=len(images),
        bytes=offset,
        pixels_sha256=digest.hexdigest(),
        index_sha256=sha256(folder / INDEX),
    )
    write_json(folder / HEAD, head.model_dump())
    _sync_path(folder)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _sync_path(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        sync(file)
    finally:
        os.close(file)
