"""The image cache: images decoded once, one after the other in a file that is mapped into memory, for all who read them.

A cache is a folder of three files: `pixels.u8` (each image uint8 [H, W, 3], on a multiple of 64 bytes), `index.npy`
(the SHA-256 of each image's file, ascending, and where its pixels lie) and `cache.json`, its head, written last. Images
are found by what their files hold, never by name or row, so one cache serves all folds, and equal files lie there once.

What is checked when: the head, the sizes of both files and the digest of the index whenever a cache is opened; the
digest of the pixels by `verify`, which a stage calls on the caches of its channel, made elsewhere.

A cache lies in a folder of caches under its key, so that whoever needs the same images as the same pixels finds the same
one. It is written under a temporary name while a lock is held. The lock goes with the process that holds it: what a
killed one left is then removed by the next.
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
from fivefold.data.images import Pixels, in_threads
from fivefold.data.store import GIB, ImageStore, read_unchanged
from fivefold.errors import DataError, MissingInputError, RetryableError, SettingsError
from fivefold.progress import MIB, track

log = logging.getLogger("fivefold")

HEAD, INDEX, PIXELS = "cache.json", "index.npy", "pixels.u8"
FORMAT = 1
ALIGNED = 64
PORTION = 1 << 22
ENTRY = np.dtype([("sha256", "S32"), ("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])
DECODER = f"Pillow {Image.__version__}"
SAMPLE = 256
SURE = 0.8
"""Images that are looked at first, and the share of what they promise that must be too large to look no further."""
RESERVE = 0.05
"""Share of the free disk that a cache leaves free."""


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
    """The images of a cache folder; read-only, for threads, and for forked and spawned processes."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingInputError where there is no cache, DataError for one that is damaged or no cache at all."""
        self.folder = folder
        self.head = _read_head(folder)
        self.pixels = Pixels(self.head.store_size, self.head.scaled_decoding)
        self.index = _read_index(folder, self.head)
        self.bytes = self.head.bytes
        size = (folder / PIXELS).stat().st_size if (folder / PIXELS).is_file() else 0
        if size != self.bytes:
            raise DataError(
                f"{folder / PIXELS} has {size:,} bytes, and its {HEAD} says {self.bytes:,}: it is cut off, or of another "
                "cache; copy the whole folder again, or run prepare again"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.folder,)

    def __len__(self) -> int:
        return len(self.index)

    def find(self, digests: Sequence[str | None]) -> np.ndarray:
        """Where images with these SHA-256 of their files (hex) stand: int64 [N], -1 where one is not here."""
        wanted = np.array([bytes.fromhex(digest) if digest else b"" for digest in digests], "S32")
        at = np.searchsorted(self.index["sha256"], wanted)
        known = self.index["sha256"][np.minimum(at, len(self) - 1)] == wanted
        return np.where(known, at, -1).astype(np.int64)

    def image(self, at: int) -> np.ndarray:
        """The pixels uint8 [H, W, 3] of the image that stands there: a view of the file, not to be written to."""
        _, offset, height, width = self.index[at].item()
        return self._mapped[offset : offset + height * width * 3].reshape(height, width, 3)

    def verify(self) -> None:
        """Reads all pixels, with a progress bar; a DataError unless they are those that were written."""
        digest = hashlib.sha256()
        with open(self.folder / PIXELS, "rb") as file:
            portions = iter(lambda: file.read(PORTION), b"")
            for portion in track(portions, self.bytes, "checking the image cache", bytes_of=len):
                digest.update(portion)
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
        raise MissingInputError(f"no {HEAD} in {folder}: give the folder that prepare wrote")
    try:
        head = Head.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"{path} does not describe an image cache: {where}: {problem['msg']}; run prepare again"
        ) from None
    if head.format != FORMAT:
        raise DataError(f"{path} is of format {head.format}, and this version reads {FORMAT}; run prepare again")
    return head


def _read_index(folder: Path, head: Head) -> np.ndarray:
    """The index, all of whose images lie within the file of pixels."""
    path = folder / INDEX
    if not path.is_file() or sha256(path) != head.index_sha256:
        raise DataError(
            f"{path} is not the index that {HEAD} speaks of; copy the whole folder again, or run prepare again"
        )
    try:
        index = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is no index: {error}; run prepare again") from error
    ends = index["offset"] + index["height"].astype(np.int64) * index["width"] * 3 if index.dtype == ENTRY else None
    if ends is None or len(index) != head.images or not len(index) or (ends > head.bytes).any():
        raise DataError(f"{path} does not fit its {HEAD}; run prepare again")
    return index


def key_of(digests: Sequence[str], pixels: Pixels) -> str:
    """The name of the cache that holds the images of exactly these files (SHA-256 in hex) as these pixels."""
    known = [FORMAT, DECODER, pixels.store_size, pixels.scaled, sorted(set(digests))]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a store, and the SHA-256 that its file must have (None: not known).

    `size`: the (height, width) that it is stored at, about, once it was surveyed.
    """

    store: ImageStore
    path: str
    sha256: str | None
    size: tuple[int, int] = (0, 0)

    def survey(self, pixels: Pixels) -> "ImageFile":
        """The same with its digest and size, of the file's bytes and head: nothing is decoded."""
        content, digest = read_unchanged(self.store, self.path, self.sha256)
        return replace(self, sha256=digest, size=pixels.size_of(content, self.path))

    def decode(self, pixels: Pixels) -> np.ndarray:
        return pixels.decode(read_unchanged(self.store, self.path, self.sha256)[0], self.path)


def files_of(store: ImageStore, paths: Sequence[str], sha256: Sequence[str | None] | None = None) -> list[ImageFile]:
    digests = [None] * len(paths) if sha256 is None else sha256
    return [ImageFile(store, path, digest) for path, digest in zip(paths, digests, strict=True)]


def survey(files: Sequence[ImageFile], pixels: Pixels) -> list[ImageFile]:
    """Of every content one file, surveyed, by ascending digest."""
    surveyed = in_threads(lambda file: file.survey(pixels), files)
    images = {image.sha256: image for image in track(surveyed, len(files), "looking at images")}
    return [images[digest] for digest in sorted(images)]


def bytes_of(images: Sequence[ImageFile]) -> int:
    """The bytes of the pixels of these images, each padded to the next boundary."""
    return sum(_padded(height * width * 3) for height, width in (image.size for image in images))


def in_words(size: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def check_room(folder: Path, images: int, needed: float, most_gib: float) -> None:
    """Raises where the pixels of so many images are too large: a SettingsError for `most_gib`, a RetryableError for the disk."""
    free = (1 - RESERVE) * shutil.disk_usage(folder).free
    what = f"{images} decoded images take {in_words(needed)}"
    smaller = "data.store_size=256, say, shrinks each to 256 pixels"
    if needed > most_gib * GIB:
        raise SettingsError(f"{what}, and data.cache_gib={most_gib:g} are allowed: raise that key, or {smaller}")
    if needed > free:
        raise RetryableError(
            f"{what}, and {folder} has {in_words(free)} free for them: "
            f"free some, then run the same command again; another folder helps too, or {smaller}"
        )


def check_sample(folder: Path, files: Sequence[ImageFile], pixels: Pixels, most_gib: float) -> None:
    """As `check_room`, by a few of many images, so that not all are read for an answer that is plain from those."""
    if len(files) > 4 * SAMPLE:
        few = survey(files[:: -(-len(files) // SAMPLE)], pixels)
        count = len({file.sha256 for file in files})
        check_room(folder, count, SURE * bytes_of(few) / len(few) * count, most_gib)


def cached_once(folder: Path, files: Sequence[ImageFile], pixels: Pixels, most_gib: float) -> Cache | None:
    """The cache of these images among those in `folder`, made by the first process that asks; the others wait for it.

    All digests must be known. None, with a line in the log, where it does not fit or `folder` cannot be written to: the
    images are then to be read from their files. One that is damaged is made anew.
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
    """The cache at `path`: the one that is there, or else a new one of these images, made by one process at a time.

    One that is damaged is made anew. Raises as `check_room` and `build` do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_builder(path):
        try:
            return Cache(path)
        except MissingInputError:
            pass
        except DataError as error:
            log.warning("%s; it is made anew", error)
        if path.exists():
            shutil.rmtree(path)
        images = survey_images()
        size = bytes_of(images)
        check_room(path.parent, len(images), size, most_gib)
        log.info("%d images are decoded once, %s, into %s (%s)", len(images), pixels.in_words, path, in_words(size))
        return build(path, images, pixels)


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


def build(folder: Path, images: Sequence[ImageFile], pixels: Pixels) -> Cache:
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


def _write(folder: Path, images: Sequence[ImageFile], pixels: Pixels) -> None:
    index = np.zeros(len(images), ENTRY)
    digest = hashlib.sha256()
    offset = 0
    decoded = in_threads(lambda image: image.decode(pixels), images)
    with open(folder / PIXELS, "wb") as file:
        for row, image in enumerate(track(decoded, len(images), "decoding images")):
            height, width = image.shape[:2]
            index[row] = (bytes.fromhex(images[row].sha256), offset, height, width)
            for part in (image.reshape(-1), bytes(_padded(image.nbytes) - image.nbytes)):
                file.write(part)
                digest.update(part)
            offset += _padded(image.nbytes)
        file.flush()
        sync(file.fileno())
    np.save(folder / INDEX, index)
    _sync(folder / INDEX)
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
    _sync(folder)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        sync(file)
    finally:
        os.close(file)
