"""The image cache: images decoded once, one after the other in a file that is mapped into memory, for all who read them.

A cache is a folder of three files: `pixels.u8` (each image uint8 [H, W, 3], on a multiple of 64 bytes), `index.npy`
(the SHA-256 of each image's file, ascending, and where its pixels lie) and `cache.json`, its head, written last. Images
are found by what their files hold, never by name or row, so one cache serves all folds, and equal files lie there once.

What is checked when: the head, the sizes of both files and the digest of the index whenever a cache is opened; the
digest of the pixels by `verify`, which a stage calls on the caches of its channel, made elsewhere.
"""

import hashlib
import json
import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fivefold.contract.files import read_json, sha256
from fivefold.data.images import Pixels
from fivefold.errors import DataError, MissingInputError
from fivefold.progress import track

HEAD, INDEX, PIXELS = "cache.json", "index.npy", "pixels.u8"
FORMAT = 1
ALIGNED = 64
PORTION = 1 << 22
ENTRY = np.dtype([("sha256", "S32"), ("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])
DECODER = f"Pillow {Image.__version__}"


class Cache:
    """The images of a cache folder; read-only, for threads, and for forked and spawned processes."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingInputError where there is no cache, DataError for one that is damaged or no cache at all."""
        head = _head(folder)
        self.folder = folder
        self.pixels = Pixels(head["store_size"], head["scaled_decoding"])
        self.decoder: str = head["decoder"]
        self.bytes: int = head["bytes"]
        self._digest: str = head["pixels_sha256"]
        self.index = _index(folder, head)
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
        if digest.hexdigest() != self._digest:
            raise DataError(
                f"{self.folder / PIXELS} is damaged: its bytes do not match the digest in {HEAD}; copy the whole folder "
                "again, or run prepare again"
            )

    @cached_property
    def _mapped(self) -> np.ndarray:
        with open(self.folder / PIXELS, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def key_of(digests: Sequence[str], pixels: Pixels) -> str:
    """The name of the cache that holds the images of exactly these files (SHA-256 in hex) as these pixels."""
    known = [FORMAT, DECODER, pixels.store_size, pixels.scaled, sorted(set(digests))]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def head_of(pixels: Pixels, images: int, size: int, pixels_sha256: str, index_sha256: str) -> dict[str, Any]:
    """The content of a head."""
    return {
        "format": FORMAT,
        "decoder": DECODER,
        "store_size": pixels.store_size,
        "scaled_decoding": pixels.scaled,
        "images": images,
        "bytes": size,
        "pixels_sha256": pixels_sha256,
        "index_sha256": index_sha256,
    }


def _head(folder: Path) -> dict[str, Any]:
    path = folder / HEAD
    if not path.is_file():
        raise MissingInputError(f"no {HEAD} in {folder}: give the folder that prepare wrote")
    head = read_json(path)
    example = head_of(Pixels(), 1, 1, "", "")
    if not isinstance(head, dict) or any(type(head.get(name)) is not type(value) for name, value in example.items()):
        raise DataError(f"{path} does not describe an image cache: {', '.join(example)} are needed; run prepare again")
    if head["format"] != FORMAT:
        raise DataError(f"{path} is of format {head['format']}, and this version reads {FORMAT}; run prepare again")
    return head


def _index(folder: Path, head: dict[str, Any]) -> np.ndarray:
    """The index, which lies within the file of pixels."""
    path = folder / INDEX
    if not path.is_file() or sha256(path) != head["index_sha256"]:
        raise DataError(
            f"{path} is not the index that {HEAD} speaks of; copy the whole folder again, or run prepare again"
        )
    try:
        index = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is no index: {error}; run prepare again") from error
    ends = index["offset"] + index["height"].astype(np.int64) * index["width"] * 3 if index.dtype == ENTRY else None
    if ends is None or len(index) != head["images"] or not len(index) or (ends > head["bytes"]).any():
        raise DataError(f"{path} does not fit its {HEAD}; run prepare again")
    return index
