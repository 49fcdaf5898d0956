"""Any image file as 8-bit RGB pixels, upright; and the digest by which equal pictures are known."""

import hashlib
import math
import posixpath
import re
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from itertools import islice
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from fivefold.errors import DataError
from fivefold.machine import count_cores
from fivefold.recipe import Data

T, R = TypeVar("T"), TypeVar("R")

# fmt: off
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".mpo", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".ppm", ".pgm", ".pbm",
}
# fmt: on
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM"]
"""What may be decoded: Pillow's other plugins run programs (EPS) or are not photographs."""
PLUGINS = {"pillow_heif.HeifImagePlugin": ("HEIF", ".heic", ".heif", ".hif"), "pillow_jxl": ("JXL", ".jxl")}
"""Modules that teach Pillow a format: its name, and its suffixes."""
ORIENTATION = 0x0112
MILLION = 1e6
MOST_PIXELS = Data().max_megapixels * MILLION
PNG = b"\x89PNG\r\n\x1a\n"
NOTES = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")
"""Chunks of a PNG that say nothing of its pixels as they are used here."""
LONG = 1 << 20
"""Bytes of such a chunk, unpacked, for which Pillow refuses the file."""
_PILLOW = re.compile(r"PIL\.")

for _module, (_format, *_suffixes) in PLUGINS.items():
    with suppress(ImportError):
        import_module(_module)
        FORMATS.append(_format)
        IMAGE_SUFFIXES.update(_suffixes)


def is_image(name: str) -> bool:
    """Whether the file name has an image's suffix."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Pixels:
    """What pixels of an image file count: for training, for prediction, and in a cache.

    `store_size`: an image whose shorter side is longer is shrunk until that side has so many pixels, bilinear with
    antialiasing (`transforms.resize`); 0: as decoded. `scaled`: a JPEG is decoded at a half, a quarter or an eighth
    where that is not below `store_size`: faster, with other pixels. `max_pixels`: the most that a file may have.
    """

    store_size: int = 0
    scaled: bool = False
    max_pixels: float = field(default=MOST_PIXELS, compare=False)

    def decode(self, content: bytes, name: str, max_pixels: float = math.inf) -> np.ndarray:
        """The pixels uint8 [H, W, 3] of an image file, as `decode` gives them, at their stored size; a lower `max_pixels` counts."""
        most = min(max_pixels, self.max_pixels)
        return self.shrink(decode(content, name, most, self.store_size if self.scaled else 0))

    def size_of(self, content: bytes, name: str) -> tuple[int, int]:
        """(height, width) at which an image file is stored, of its head; errors as for `decode`."""
        return self.size(*decoded_size(content, name, self.max_pixels))

    def shrink(self, pixels: np.ndarray) -> np.ndarray:
        """Decoded pixels uint8 [H, W, 3] at their stored size; those that have it already are returned themselves."""
        size = self.size(*pixels.shape[:2])
        if size == pixels.shape[:2]:
            return pixels
        import torch

        from fivefold.data.transforms import resize

        found = resize(torch.from_numpy(pixels).permute(2, 0, 1), size)
        return np.ascontiguousarray(found.permute(1, 2, 0).numpy())

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which an image of this size is stored."""
        shorter = min(height, width)
        if not 0 < self.store_size < shorter:
            return height, width
        return round(height * self.store_size / shorter), round(width * self.store_size / shorter)

    @property
    def in_words(self) -> str:
        scaled = ", JPEGs decoded at a scale" if self.scaled else ""
        return f"shrunk to {self.store_size} pixels{scaled}" if self.store_size else "at their own size"


def pixels_of(data: Data) -> Pixels:
    """What `[data]` says of pixels."""
    return Pixels(data.store_size, data.scaled_decoding, data.max_megapixels * MILLION)


def decode(content: bytes, name: str, max_pixels: float = MOST_PIXELS, least: int = 0) -> np.ndarray:
    """The pixels of an image file: uint8 [H, W, 3] RGB, contiguous and writable, EXIF orientation applied.

    Grey, CMYK, palette and 16-bit images are converted (16 bits scaled to 8), transparency is laid
    over white, and of an animation it is the first frame. A JPEG is scaled down as it is decoded, as far as its shorter
    side keeps `least` pixels (0: not at all). Raises a DataError with `name` and the reason for what is no image,
    is cut off, or would unpack to more than `max_pixels`.
    """
    _silence_pillow(max_pixels)
    try:
        with Image.open(BytesIO(_without_long_notes(content)), formats=FORMATS) as image:
            _check_size(image, max_pixels)
            if least:
                image.draft(None, (least, least))
            image.load()
            with suppress(Exception):  # broken metadata says nothing against the pixels
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # decoders raise whatever foreign bytes lead them to
        raise DataError(f"{name} cannot be decoded: {_reason(error, content)}") from error


def decoded_size(content: bytes, name: str, max_pixels: float = MOST_PIXELS) -> tuple[int, int]:
    """(height, width) that `decode` would give, of the file's head alone; a DataError for what is no image, or too large."""
    _silence_pillow(max_pixels)
    try:
        with Image.open(BytesIO(_without_long_notes(content)), formats=FORMATS) as image:
            _check_size(image, max_pixels)
            orientation = 1
            with suppress(Exception):  # broken metadata says nothing against the pixels
                orientation = image.getexif().get(ORIENTATION, 1)
            turned = orientation in TURNED and image.format != "TIFF"  # Pillow turns TIFFs itself
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # decoders raise whatever foreign bytes lead them to
        raise DataError(f"{name} cannot be decoded: {_reason(error, content)}") from error


def pixel_digest(pixels: np.ndarray) -> bytes:
    """16 bytes that are equal for equal pictures: of the pixels' shape and values."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()[:16]


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item, in order, by as many threads as there are cores; four results each wait to be taken, at most.

    What was not begun is cancelled when the generator is closed.
    """
    coming = iter(items)
    pool = ThreadPoolExecutor(count_cores())
    try:
        waiting = deque(pool.submit(work, item) for item in islice(coming, 4 * count_cores()))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(coming, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _check_size(image: Image.Image, most: float) -> None:
    """A ValueError for an image of more pixels than `most`, by its head alone: nothing of it is unpacked yet."""
    if image.width * image.height > most:
        raise ValueError(
            f"it has {image.width} × {image.height} pixels, more than the {most / MILLION:g} million allowed (max_megapixels)"
        )


def _without_long_notes(content: bytes) -> bytes:
    """A PNG without its long texts and colour profiles, for which Pillow would refuse it; anything else as it is."""
    kept, at = [], len(PNG) if content.startswith(PNG) else len(content)
    last = 0
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] in NOTES and _is_long(content[at + 4 : end - 4]):
            kept.append(content[last:at])
            last = end
        at = end
    return b"".join([*kept, content[last:]]) if last else content


def _is_long(note: bytes) -> bool:
    """Whether a chunk of NOTES, of which no more than that is unpacked here, is longer than Pillow takes."""
    _, _, rest = note.partition(b"\0")
    if note.startswith((b"iCCP", b"zTXt")):
        packed = rest[1:]
    elif note.startswith(b"iTXt") and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return len(note) > LONG
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, LONG)
    except zlib.error:  # Pillow passes over it
        return False
    return bool(unpacking.unconsumed_tail)


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as they are stored, as uint8 [H, W, 3]."""
    if image.mode.startswith("I"):
        wide = np.clip(np.array(image), 0, 65535).astype(np.uint32)
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return np.array(Image.alpha_composite(white, layers).convert("RGB"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _reason(error: Exception, content: bytes) -> str:
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is no image of a known format (it starts with {content[:4]!r})"
    return str(error) or type(error).__name__


def _silence_pillow(most: float) -> None:
    """Puts a filter in front that drops Pillow's warnings, and has it open `most` pixels: what matters of both is raised here.

    `warnings.catch_warnings` would do, were it safe in threads.
    """
    if Image.MAX_IMAGE_PIXELS is not None and most > 2 * Image.MAX_IMAGE_PIXELS:  # it refuses twice its limit
        Image.MAX_IMAGE_PIXELS = math.ceil(most / 2)
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[:1] + first[3:4] != ("ignore", _PILLOW):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


TURNED = (5, 6, 7, 8)
"""Values of EXIF's orientation that exchange height and width."""
