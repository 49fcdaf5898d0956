"""Any image file as 8-bit RGB pixels, upright; and the digest by which equal pictures are known."""

import hashlib
import math
import posixpath
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
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
    where that is not below `store_size`: faster, with other pixels.
    """

    store_size: int = 0
    scaled: bool = False

    def decode(self, content: bytes, name: str, max_pixels: float = math.inf) -> np.ndarray:
        """The pixels uint8 [H, W, 3] of an image file, as `decode` gives them, at their stored size."""
        return self.shrink(decode(content, name, max_pixels, self.store_size if self.scaled else 0))

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
    return Pixels(data.store_size, data.scaled_decoding)


def decode(content: bytes, name: str, max_pixels: float = math.inf, least: int = 0) -> np.ndarray:
    """The pixels of an image file: uint8 [H, W, 3] RGB, contiguous and writable, EXIF orientation applied.

    Grey, CMYK, palette and 16-bit images are converted (16 bits scaled to 8), transparency is laid
    over white, and of an animation it is the first frame. A JPEG is scaled down as it is decoded, as far as its shorter
    side keeps `least` pixels (0: not at all). Raises a DataError with `name` and the reason for what is no image,
    is cut off, or would unpack to absurdly many pixels, or to more than `max_pixels`.
    """
    _silence_pillow()
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            _check_size(image, max_pixels)
            if least:
                image.draft(None, (least, least))
            image.load()
            with suppress(Exception):  # broken metadata says nothing against the pixels
                ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except Exception as error:  # decoders raise whatever foreign bytes lead them to
        raise DataError(f"{name} cannot be decoded: {_reason(error, content)}") from error


def decoded_size(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) that `decode` would give, of the file's head alone; a DataError for what is no image."""
    _silence_pillow()
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
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
        raise ValueError(f"it has {image.width} × {image.height} pixels, more than the {most / 1e6:g} million allowed")


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
        return f"it is no image of a known format (it starts with {content[:12]!r})"
    return str(error) or type(error).__name__


def _silence_pillow() -> None:
    """Puts a filter in front that drops Pillow's warnings: what matters of them is raised here.

    `warnings.catch_warnings` would do, were it safe in threads.
    """
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[:1] + first[3:4] != ("ignore", _PILLOW):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


TURNED = (5, 6, 7, 8)
"""Values of EXIF's orientation that exchange height and width."""
