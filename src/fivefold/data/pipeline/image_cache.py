"""The image cache: decoded images, one after the other in a file that all readers map into memory (docs/cache.md).

The key of an image is the SHA-256 of its file, so one cache serves all folds, and duplicate files are stored once. The name
of a cache is a digest of the images and decoding options, so all processes that need the same pixels use the same cache.
"""

import hashlib
import json
import mmap
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from fivefold.contract.files import lock, raise_on_full_disk, read_json, sha256, sync, write_json
from fivefold.data.image_io import DecodeOptions, map_in_threads
from fivefold.data.readers.stores import GIB, ImageStore, read_verified
from fivefold.errors import DataError, MissingInputError, RetryableError, SettingsError
from fivefold.log import log
from fivefold.progress import MIB, track

HEADER_FILE, INDEX_FILE, PIXELS_FILE = "cache.json", "index.npy", "pixels.u8"
FORMAT = 2
ALIGNMENT = 64
CHUNK_BYTES = 1 << 22
INDEX_DTYPE = np.dtype([("sha256", "S32"), ("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])
DECODER = f"Pillow {Image.__version__}"
SURVEY_SAMPLE = 256
SAMPLE_MARGIN = 0.8
"""Images to survey first, and the fraction of the size estimated from them that must be too large to stop at once."""
RESERVED_DISK_FRACTION = 0.05
"""Fraction of the free disk space that a cache leaves free."""


class CacheHeader(BaseModel):
    """The content of `cache.json`; digests are in hex."""

    model_config = ConfigDict(strict=True)

    format: Literal[FORMAT]
    decoder: str
    resize_shorter_side: int
    jpeg_draft: bool
    bytes: int
    pixels_sha256: str
    index_sha256: str


class Cache:
    """The images of a cache folder: read-only, and usable from threads and from forked and spawned processes."""

    def __init__(self, folder: Path) -> None:
        """Open the cache; raise MissingInputError if there is none, and a DataError if it is damaged or not a cache."""
        self.folder = folder
        self.header = _read_header(folder)
        self.decode_options = DecodeOptions(self.header.resize_shorter_side, self.header.jpeg_draft)
        self.bytes = self.header.bytes
        index, pixels = folder / INDEX_FILE, folder / PIXELS_FILE
        if not index.is_file() or sha256(index) != self.header.index_sha256:
            raise _damage_error(index)
        self.index = np.load(index, allow_pickle=False)
        if not pixels.is_file() or pixels.stat().st_size != self.bytes:
            raise _damage_error(pixels)

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

    def image(self, index: int) -> np.ndarray:
        """Return the pixels uint8 [H, W, 3] of the image at this index: a view of the file, not to be modified."""
        _, offset, height, width = self.index[index].item()
        return self._mapped[offset : offset + height * width * 3].reshape(height, width, 3)

    def verify(self) -> None:
        """Read all pixels, with a progress bar; raise a DataError if their digest is not that of the header."""
        digest = hashlib.sha256()
        with open(self.folder / PIXELS_FILE, "rb") as file:
            chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            for chunk in track(chunks, -(-self.bytes // CHUNK_BYTES), "checking the image cache"):
                digest.update(chunk)
        if digest.hexdigest() != self.header.pixels_sha256:
            raise _damage_error(self.folder / PIXELS_FILE)

    @cached_property
    def _mapped(self) -> np.ndarray:
        # torch warns once per process of a read-only array; no transform modifies its input image
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        with open(self.folder / PIXELS_FILE, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _read_header(folder: Path) -> CacheHeader:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise MissingInputError(f"no {HEADER_FILE} in {folder}: pass the folder that prepare wrote")
    try:
        return CacheHeader.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        reason = f"{key}: {problem['msg']}"
        raise DataError(f"{path} is not the header of an image cache: {reason}; run prepare again") from None


def _damage_error(path: Path) -> DataError:
    return DataError(f"{path} does not match its {HEADER_FILE}; copy the whole folder again, or run prepare again")


def cache_name(digests: Sequence[str], options: DecodeOptions) -> str:
    """Return the name of the cache of exactly these files (SHA-256 in hex) with these decoding options."""
    identity = [FORMAT, DECODER, options.resize_shorter_side, options.scaled, sorted(set(digests))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a store, the SHA-256 that its file must have (None: unknown), and its approximate `bytes` in a cache."""

    store: ImageStore
    path: str
    sha256: str | None
    bytes: int = 0

    def with_header(self, options: DecodeOptions) -> "ImageFile":
        """Return the image with its digest and size, without decoding."""
        content, digest = read_verified(self.store, self.path, self.sha256)
        return replace(self, sha256=digest, bytes=_padded(3 * prod(options.stored_size(content, self.path))))

    def decode(self, options: DecodeOptions) -> np.ndarray:
        return options.decode(read_verified(self.store, self.path, self.sha256)[0], self.path)


def make_image_files(
    store: ImageStore, paths: Sequence[str], sha256: Sequence[str | None] | None = None
) -> list[ImageFile]:
    digests = [None] * len(paths) if sha256 is None else sha256
    return [ImageFile(store, path, digest) for path, digest in zip(paths, digests, strict=True)]


def plan_cache(files: Sequence[ImageFile], options: DecodeOptions) -> list[ImageFile]:
    """Survey the files and return one per distinct content, sorted by digest."""
    surveyed = map_in_threads(lambda file: file.with_header(options), files)
    images = {image.sha256: image for image in track(surveyed, len(files), "surveying images")}
    return [images[digest] for digest in sorted(images)]


def format_bytes(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def check_cache_space(folder: Path, images: int, needed: float, most_gib: float) -> None:
    """Raise if the pixels of these images are too large: a SettingsError for `most_gib`, a RetryableError for the disk."""
    free = (1 - RESERVED_DISK_FRACTION) * shutil.disk_usage(folder).free
    needs = f"{images} decoded images take {format_bytes(needed)}"
    hint = "set data.resize_shorter_side=256, for example, to shrink each to 256 pixels"
    if needed > most_gib * GIB:
        raise SettingsError(f"{needs}, but data.cache_gib={most_gib:g} allows less: raise it, or {hint}")
    if needed > free:
        raise RetryableError(
            f"{needs}, but {folder} has {format_bytes(free)} free for them: "
            f"free some, then run the same command again, or use another folder, or {hint}"
        )


def check_sample(folder: Path, files: Sequence[ImageFile], options: DecodeOptions, most_gib: float) -> None:
    """Do `check_cache_space` with a sample of many images, to avoid reading all if the sample already shows that they do not fit."""
    if len(files) > 4 * SURVEY_SAMPLE:
        surveyed = plan_cache(files[:: -(-len(files) // SURVEY_SAMPLE)], options)
        count = len({file.sha256 for file in files})
        mean_bytes = sum(image.bytes for image in surveyed) / len(surveyed)
        check_cache_space(folder, count, SAMPLE_MARGIN * mean_bytes * count, most_gib)


def get_or_build(folder: Path, files: Sequence[ImageFile], options: DecodeOptions, most_gib: float) -> Cache | None:
    """Return the cache of these images, whose digests are known, in `folder`; the first process builds it, the others wait.

    Return None and log a warning if the cache does not fit or `folder` is not writable. Rebuild a damaged cache.
    """
    path = folder / cache_name([file.sha256 for file in files], options)
    try:
        with suppress(MissingInputError, DataError):
            return Cache(path)
        folder.mkdir(parents=True, exist_ok=True)
        check_sample(folder, files, options, most_gib)
        return open_or_build(path, lambda: plan_cache(files, options), options, most_gib)
    except (OSError, SettingsError, RetryableError) as error:
        log.warning("no image cache in %s (%s): images are read from their files", folder, error)
    return None


def open_or_build(
    path: Path, survey_images: Callable[[], Sequence[ImageFile]], options: DecodeOptions, most_gib: float
) -> Cache:
    """Return the cache at `path`: the existing one, or else a new one of these images, built by one process at a time.

    Remove a damaged cache and what a killed process left. Raise as `check_cache_space` and `build_cache` do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "ab") as file:
        lock(file.fileno(), f"another process is building the image cache {path}: waiting for it")
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            return Cache(path)
        except MissingInputError:
            pass
        except DataError as error:
            log.warning("%s; rebuilding it", error)
        if path.exists():
            shutil.rmtree(path)
        images = survey_images()
        size = sum(image.bytes for image in images)
        check_cache_space(path.parent, len(images), size, most_gib)
        log.info(
            "%d images are decoded once, %s, into %s (%s)", len(images), options.description, path, format_bytes(size)
        )
        return build_cache(path, images, options)


def build_cache(folder: Path, images: Sequence[ImageFile], options: DecodeOptions) -> Cache:
    """Build the cache of these images at `folder`, which must not exist; on a full disk, clean up and raise a RetryableError."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        with raise_on_full_disk(folder):
            temporary.mkdir(parents=True)
            _write(temporary, images, options)
            for path in (*temporary.iterdir(), temporary):
                _sync_path(path)
            temporary.rename(folder)
            _sync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Cache(folder)


def _write(folder: Path, images: Sequence[ImageFile], options: DecodeOptions) -> None:
    index = np.zeros(len(images), INDEX_DTYPE)
    digest = hashlib.sha256()
    offset = 0
    decoded = map_in_threads(lambda image: image.decode(options), images)
    with open(folder / PIXELS_FILE, "wb") as file:
        for row, image in enumerate(track(decoded, len(images), "decoding images")):
            index[row] = (bytes.fromhex(images[row].sha256), offset, *image.shape[:2])
            content = image.tobytes().ljust(_padded(image.nbytes), b"\0")
            file.write(content)
            digest.update(content)
            offset += len(content)
    np.save(folder / INDEX_FILE, index)
    header = CacheHeader(
        format=FORMAT,
        decoder=DECODER,
        resize_shorter_side=options.resize_shorter_side,
        jpeg_draft=options.scaled,
        bytes=offset,
        pixels_sha256=digest.hexdigest(),
        index_sha256=sha256(folder / INDEX_FILE),
    )
    write_json(folder / HEADER_FILE, header.model_dump())


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _sync_path(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        sync(file)
    finally:
        os.close(file)
