"""Decode image files as upright 8-bit RGB pixels, and compute the digest that identifies equal images."""

import hashlib
import math
import posixpath
import re
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from itertools import islice
from typing import Any, TypeVar, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

from fivefold.config.schema import Data, ImageFormat
from fivefold.errors import DataError
from fivefold.system import count_cores

GREY_DIFFERENCE = 8
"""A grey pixel's channels differ by at most this much, of 255."""
GREY_PIXELS = 0.99
"""Fraction of grey pixels in a grey image."""
T, R = TypeVar("T"), TypeVar("R")

# fmt: off
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".mpo", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".ppm", ".pgm", ".pbm",
}
# fmt: on
FORMATS = [*get_args(ImageFormat)]
"""Formats that Fivefold decodes. Pillow's other plugins run programs (EPS) or do not read photographs."""
PLUGINS = {"pillow_heif.HeifImagePlugin": ("HEIF", ".heic", ".heif", ".hif"), "pillow_jxl": ("JXL", ".jxl")}
"""Modules that add a format to Pillow: name of the format, then its suffixes."""
MILLION = 1e6
MAX_PIXELS = Data().max_megapixels * MILLION
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
METADATA_CHUNKS = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")
MAX_METADATA_CHUNKS, MAX_METADATA_BYTES = 32, 1 << 20
"""Text and colour profile chunks of a PNG: how many are passed to Pillow, and the unpacked bytes of one. It rejects more."""
CHUNK_PIXELS = 1 << 18
"""Pixels to convert at a time, to avoid copies of a whole image."""
MAX_SCANS = 100
"""Scans of a JPEG. A progressive photograph has 5 to 14; a scan can have only 75 bytes, but each makes the decoder visit all blocks."""
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
"""A JPEG marker that ends the image or is followed by a length."""
_PILLOW = re.compile(r"PIL\.")

for _module, (_format, *_suffixes) in PLUGINS.items():
    with suppress(ImportError):
        import_module(_module)
        FORMATS.append(_format)
        IMAGE_SUFFIXES.update(_suffixes)


def is_image(name: str) -> bool:
    """Return whether the file name has an image suffix."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class DecodeOptions:
    """How image files are decoded and stored, for training, for prediction and in a cache.

    `resize_shorter_side`: an image with a longer shorter side is shrunk until that side has this many pixels (`registry.resize`);
    0: no resizing. `scaled`: decode a JPEG at 1/2, 1/4 or 1/8 if the result is not below `resize_shorter_side`; this is
    faster, but gives other pixels. `max_pixels`: the maximum number of pixels in a file.
    """

    resize_shorter_side: int = 0
    scaled: bool = False
    max_pixels: float = field(default=MAX_PIXELS, compare=False)

    def decode(self, content: bytes, name: str, min_size: int = 0, **bounds: Any) -> np.ndarray:
        """Return the pixels uint8 [H, W, 3] of an image file at their stored size; `bounds` as in `decode`, the lower `max_pixels` applies."""
        sides = [side for side in (self.resize_shorter_side * self.scaled, min_size) if side]
        bounds["max_pixels"] = min(bounds.get("max_pixels", math.inf), self.max_pixels)
        return self.resize(decode(content, name, min_size=min(sides, default=0), **bounds))

    def stored_size(self, content: bytes, name: str) -> tuple[int, int]:
        """Return the stored (height, width) of an image file from its header; raise as `decode` does."""
        return self.size(*decoded_size(content, name, self.max_pixels))

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """Return decoded pixels uint8 [H, W, 3] at their stored size, or the same array if they have that size."""
        size = self.size(*pixels.shape[:2])
        if size == pixels.shape[:2]:
            return pixels
        import torch

        from fivefold.data.transforms.registry import resize

        resized = resize(torch.from_numpy(pixels).permute(2, 0, 1), size)
        return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the stored (height, width) of an image of this size."""
        shorter = min(height, width)
        if not 0 < self.resize_shorter_side < shorter:
            return height, width
        return round(height * self.resize_shorter_side / shorter), round(width * self.resize_shorter_side / shorter)

    @property
    def description(self) -> str:
        scaled = ", JPEGs decoded at reduced scale" if self.scaled else ""
        return f"resized to {self.resize_shorter_side} pixels{scaled}" if self.resize_shorter_side else "at full size"


def decode_options(data: Data) -> DecodeOptions:
    """Return the decoding options that the settings in `[data]` give."""
    return DecodeOptions(data.resize_shorter_side, data.jpeg_draft, data.max_megapixels * MILLION)


def decode(
    content: bytes, name: str, max_pixels: float = MAX_PIXELS, min_size: int = 0, formats: Sequence[str] = FORMATS
) -> np.ndarray:
    """Return the pixels of an image file: uint8 [H, W, 3] RGB, contiguous and writable, with the EXIF orientation applied.

    Convert grey, CMYK, palette and 16-bit images (16 bits are scaled to 8), put transparency on white, and use the first
    frame of an animation. Scale a JPEG down during decoding as long as its shorter side keeps `min_size` pixels (0: do not
    scale). Raise a DataError with `name` and the reason if the file is not an image, is truncated, has none of `formats`,
    has more than MAX_SCANS scans, or would unpack to more than `max_pixels`.
    """
    with _open_image(content, name, max_pixels, formats) as image:
        if min_size:
            image.draft(None, (min_size, min_size))
        image.load()
        with suppress(Exception):  # the pixels may be fine although the metadata are broken
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def decoded_size(
    content: bytes, name: str, max_pixels: float = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """Return the (height, width) that `decode` would give, from the header; raise a DataError if `decode` rejects the header."""
    with _open_image(content, name, max_pixels, formats) as image:
        orientation = None
        with suppress(Exception):  # the pixels may be fine although the metadata are broken
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow rotates TIFFs itself
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _open_image(content: bytes, name: str, max_pixels: float, formats: Sequence[str]) -> Iterator[Image.Image]:
    """Open an image whose header is within the bounds; raise a DataError for any other, and for any exception in the block."""
    _silence_pillow(max_pixels)
    try:
        _check_size(*_webp_size(content), max_pixels)  # Pillow allocates the memory for a WebP when it opens it
        with Image.open(BytesIO(_strip_long_notes(content)), formats=formats) as image:
            _check_size(*image.size, max_pixels)
            if image.format in ("JPEG", "MPO") and _has_many_scans(content):
                raise ValueError(f"it has more than {MAX_SCANS} scans")
            yield image
    except Exception as error:  # decoders can raise any exception on invalid bytes
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"it is no image of a known format, {', '.join(formats)} (it starts with {content[:4]!r})"
        raise DataError(f"{name} cannot be decoded: {reason if content else 'the file is empty'}") from error


def is_grey(pixels: np.ndarray) -> bool:
    """Return whether an image uint8 [H, W, 3] has no colour: the channels of almost every pixel differ by little."""
    return bool(np.mean(np.ptp(pixels, axis=2) <= GREY_DIFFERENCE) >= GREY_PIXELS)


def pixel_digest(pixels: np.ndarray) -> bytes:
    """Return a digest of 16 bytes of the shape and values of the pixels; equal images have equal digests."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()[:16]


def map_in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `work(item)` in order, computed by one thread per core, at most four results per core ahead. Closing cancels the rest."""
    remaining = iter(items)
    pool = ThreadPoolExecutor(count_cores())
    try:
        futures = deque(pool.submit(work, item) for item in islice(remaining, 4 * count_cores()))
        while futures:
            result = futures.popleft().result()
            futures.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _check_size(width: int, height: int, max_pixels: float) -> None:
    """Raise a ValueError if an image has more than `max_pixels`, according to its header, before anything is unpacked."""
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} × {height} pixels, more than the {max_pixels / MILLION:g} million allowed (max_megapixels)"
        )


def _strip_long_notes(content: bytes) -> bytes:
    """Return a PNG without the texts and colour profiles for which Pillow would reject it; return other content unchanged."""
    pieces, position = [], len(PNG_SIGNATURE) if content.startswith(PNG_SIGNATURE) else len(content)
    last = count = 0
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        is_note = content[position + 4 : position + 8] in METADATA_CHUNKS
        count += is_note
        if is_note and (count > MAX_METADATA_CHUNKS or _is_long(content[position + 4 : end - 4])):
            pieces.append(content[last:position])
            last = end
        position = end
    return b"".join([*pieces, content[last:]]) if last else content


def _is_long(note: bytes) -> bool:
    """Return whether a chunk of METADATA_CHUNKS is longer than Pillow accepts; at most that much of it is unpacked here."""
    _, _, rest = note.partition(b"\0")
    if note.startswith((b"iCCP", b"zTXt")):
        packed = rest[1:]
    elif note.startswith(b"iTXt") and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return len(note) > MAX_METADATA_BYTES
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, MAX_METADATA_BYTES)
    except zlib.error:  # Pillow ignores such a chunk
        return False
    return bool(unpacking.unconsumed_tail)


def _webp_size(content: bytes) -> tuple[int, int]:
    """Return (width, height) from the header of a WebP; (0, 0) for any other file."""
    if content[:4] + content[8:12] != b"RIFFWEBP":
        return 0, 0
    position, bits, increment = {b"VP8X": (24, 24, 1), b"VP8L": (21, 14, 1)}.get(content[12:16], (26, 16, 0))
    packed, mask = int.from_bytes(content[position : position + 6], "little"), 0xFFFFFF if bits == 24 else 0x3FFF
    return (packed & mask) + increment, (packed >> bits & mask) + increment


def _has_many_scans(jpeg: bytes) -> bool:
    """Return whether the decoder would find more than MAX_SCANS scans in a JPEG, before its end marker."""
    if jpeg.count(b"\xff\xda") <= MAX_SCANS:
        return False
    scans, marker = 0, _MARKER.search(jpeg)
    while marker and marker[1] != b"\xd9" and scans <= MAX_SCANS:
        scans += marker[1] == b"\xda"
        marker = _MARKER.search(jpeg, marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big"))
    return scans > MAX_SCANS


def _rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels in stored order, as uint8 [H, W, 3]."""
    pixels, rows = np.empty((image.height, image.width, 3), np.uint8), max(1, CHUNK_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        pixels[top : top + rows] = _rgb_rows(image if rows >= image.height else image.crop(box))
    return pixels


def _rgb_rows(image: Image.Image) -> np.ndarray:
    """Return as `_rgb`, uint8 [H, W, 3], or [H, W, 1] for a grey image."""
    if image.mode.startswith("I"):
        wide = np.clip(np.array(image), 0, 65535).astype(np.uint32)
        return ((wide * 255 + 32767) // 65535).astype(np.uint8)[..., None]
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return np.asarray(Image.alpha_composite(white, layers).convert("RGB"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _silence_pillow(max_pixels: float) -> None:
    """Drop Pillow's warnings (`warnings.catch_warnings` is not thread-safe), and let it open `max_pixels`."""
    # Pillow rejects more than twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = math.ceil(max_pixels / 2)
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[:1] + first[3:4] != ("ignore", _PILLOW):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
