"""Every image opened once: digests of its bytes and of its pixels, and why it cannot be read if so."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fivefold.data.adapters import Rows
from fivefold.data.images import Pixels, decode, in_threads, pixel_digest
from fivefold.data.store import ImageStore
from fivefold.errors import DataError
from fivefold.progress import track

DIGEST_BYTES = 16
LISTED = 5


@dataclass(frozen=True, eq=False)
class Opened:
    """What N images hold: `sha256` [N] hex strings of the bytes, `pixels` [N] 16 bytes (`pixel_digest`), zeros for none.

    `unreadable` names the reason by row.
    """

    sha256: pa.Array
    pixels: np.ndarray
    unreadable: dict[int, str]

    @property
    def readable(self) -> np.ndarray:
        """[N] bool."""
        kept = np.ones(len(self.pixels), bool)
        kept[list(self.unreadable)] = False
        return kept

    def take(self, kept: np.ndarray) -> "Opened":
        """The rows where `kept` [N] bool is true, all of them readable."""
        return Opened(self.sha256.filter(pa.array(kept)), self.pixels[kept], {})


def open_images(store: ImageStore, paths: pa.Array, kind: Pixels = Pixels()) -> Opened:  # noqa: B008
    """Reads and decodes every image of `paths` at its own size in threads, with a progress bar; `kind` says how large one may be."""
    pixels = np.zeros(len(paths), f"V{DIGEST_BYTES}")
    hashes: list[str | None] = []
    unreadable: dict[int, str] = {}
    opened = in_threads(lambda path: _open(store, path, kind.max_pixels), paths.to_pylist())
    for row, (file_hash, digest, reason) in enumerate(track(opened, len(paths), "opening images")):
        hashes.append(file_hash)
        pixels[row] = digest
        if reason:
            unreadable[row] = reason
    return Opened(pa.array(hashes, pa.string()), pixels, unreadable)


def _open(store: ImageStore, path: str, most: float) -> tuple[str | None, bytes, str]:
    """(SHA-256 of the bytes, digest of the pixels, ""), or (None, zeros, why not)."""
    try:
        content = store.read(path)
        return hashlib.sha256(content).hexdigest(), pixel_digest(decode(content, path, most)), ""
    except DataError as error:
        return None, bytes(DIGEST_BYTES), str(error)


def equal_pictures(given: Opened, known: np.ndarray) -> dict[int, int]:
    """The readable rows of `given` whose picture is among those `known` by their pixels [N]: of each the first row there."""
    first = dict(zip(reversed(known.tolist()), reversed(range(len(known))), strict=True))
    found = ((row, first.get(pixels)) for row, pixels in enumerate(given.pixels.tolist()))
    return {row: other for row, other in found if other is not None and row not in given.unreadable}


def reasons_in_words(reasons: Sequence[str], paths: Sequence[str]) -> str:
    """The first few of the reasons why the images at `paths` cannot be read, each of which names its image; then the other paths."""
    rest = f"; and {', '.join(paths[LISTED:])}" if len(paths) > LISTED else ""
    return "; ".join(reasons[:LISTED]) + rest


def keep_readable(rows: Rows, opened: Opened, skip: bool) -> tuple[Rows, Opened, list[dict[str, str]]]:
    """The rows whose image could be read, and path and reason of the others.

    Without `skip` an unreadable image is a DataError that lists the first few.
    """
    if not opened.unreadable:
        return rows, opened, []
    paths = rows.paths.take(pa.array(list(opened.unreadable))).to_pylist()
    if not skip:
        reasons = list(opened.unreadable.values())[:LISTED]
        rest = f"; and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
        raise DataError(
            f"{len(paths)} of {len(rows)} images cannot be read: {'; '.join(reasons)}{rest}; "
            "mend or remove them, or leave them out by split.skip_unreadable=true"
        )
    skipped = [{"path": path, "reason": reason} for path, reason in zip(paths, opened.unreadable.values(), strict=True)]
    return rows.take(opened.readable), opened.take(opened.readable), skipped
