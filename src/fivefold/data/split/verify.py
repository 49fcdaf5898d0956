"""Verify a data set: open every image once, hash its bytes and pixels, and record why it cannot be read."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fivefold.data.image_io import DecodeOptions, decode, map_in_threads, pixel_digest
from fivefold.data.readers.stores import ImageStore
from fivefold.errors import DataError
from fivefold.progress import track

DIGEST_BYTES = 16
MAX_LISTED = 5


@dataclass(frozen=True, eq=False)
class VerifiedImages:
    """Result of opening N images: `sha256` [N] hex strings of the bytes, `pixels` [N] 16 bytes (`pixel_digest`).

    `unreadable` maps the row of an unreadable image to the reason; its digest of pixels is zeros and its SHA-256 null.
    """

    sha256: pa.Array
    pixels: np.ndarray
    unreadable: dict[int, str]

    @property
    def readable(self) -> np.ndarray:
        """Return [N] bool: whether each image could be read."""
        readable = np.ones(len(self.pixels), bool)
        readable[list(self.unreadable)] = False
        return readable

    def failures(self, paths: Sequence[str] | pa.Array) -> list[dict[str, str]]:
        """Return the path and reason of each unreadable image; `paths` [N] are those of all images."""
        return [{"path": str(paths[row]), "reason": reason} for row, reason in self.unreadable.items()]


def verify_images(store: ImageStore, paths: pa.Array, options: DecodeOptions = DecodeOptions()) -> VerifiedImages:  # noqa: B008
    """Read and decode every image of `paths` at full size in threads, with a progress bar; only `options.max_pixels` applies."""
    pixels = np.zeros(len(paths), f"V{DIGEST_BYTES}")
    hashes: list[str | None] = []
    unreadable: dict[int, str] = {}
    opened = map_in_threads(lambda path: _open(store, path, options.max_pixels), paths.to_pylist())
    for row, (file_hash, digest, reason) in enumerate(track(opened, len(paths), "opening images")):
        hashes.append(file_hash)
        pixels[row] = digest
        if reason:
            unreadable[row] = reason
    return VerifiedImages(pa.array(hashes, pa.string()), pixels, unreadable)


def _open(store: ImageStore, path: str, max_pixels: float) -> tuple[str | None, bytes, str]:
    """Return (SHA-256 of the bytes, digest of the pixels, ""), or (None, zeros, the reason for the failure)."""
    try:
        content = store.read(path)
        return hashlib.sha256(content).hexdigest(), pixel_digest(decode(content, path, max_pixels)), ""
    except DataError as error:
        return None, bytes(DIGEST_BYTES), str(error)


def match_duplicates(images: VerifiedImages, known: np.ndarray) -> dict[int, int]:
    """Map each readable row of `images` whose image is among `known` (digests of pixels [N]) to the first such row of `known`."""
    first = dict(zip(reversed(known.tolist()), reversed(range(len(known))), strict=True))
    pairs = ((row, first.get(pixels)) for row, pixels in enumerate(images.pixels.tolist()))
    return {row: other for row, other in pairs if other is not None and row not in images.unreadable}


def describe_failures(unreadable: Mapping[int, str], paths: Sequence[str]) -> str:
    """Return the first few reasons of `unreadable` rows, which name their images, then the paths of the others among all `paths`."""
    rest = [paths[row] for row in unreadable][MAX_LISTED:]
    return "; ".join(list(unreadable.values())[:MAX_LISTED]) + (f"; and {', '.join(rest)}" if rest else "")
