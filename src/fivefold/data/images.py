"""Any image file as 8-bit RGB pixels, upright; and the digest by which equal pictures are known."""

import hashlib
import math
import posixpath
import re
import warnings
from io import BytesIO

import numpy as np
from PIL import Image

from fivefold.errors import DataError

# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".mpo", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".ppm", ".pgm", ".pbm",
])
# fmt: on
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
"""What may be decoded: Pillow's other plugins run programs (EPS) or are not photographs."""
ORIENTATION = 0x0112
_PILLOW = re.compile(r"PIL\.")


def is_image(name: str) -> bool:
    """Whether the file name has an image's suffix."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def decode(content: bytes, name: str, max_pixels: float = math.inf) -> np.ndarray:
    """The pixels of an image file: uint8 [H, W, 3] RGB, contiguous and writable, EXIF orientation applied.

    Grey, CMYK, palette and 16-bit images are converted (16 bits scaled to 8), transparency is laid
    over white, and of an animation it is the first frame. Raises a DataError with `name` and the
    reason for what is no image, is cut off, or would unpack to absurdly many pixels, or to more than `max_pixels`.
    """
    _silence_pillow()
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            _check_size(image, max_pixels)
            pixels = _rgb(image)
            return np.ascontiguousarray(UPRIGHT[_orientation(image)](pixels))
    except Exception as error:  # decoders raise whatever foreign bytes lead them to
        raise DataError(f"{name} cannot be decoded: {_reason(error, content)}") from error


def pixel_digest(pixels: np.ndarray) -> bytes:
    """16 bytes that are equal for equal pictures: of the pixels' shape and values."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()[:16]


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


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (as stored) where it is absent, absurd or unreadable."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken metadata says nothing against the pixels
        return 1
    return value if value in UPRIGHT else 1


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


UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}
"""Stored pixels [H, W, 3] -> upright pixels, by EXIF orientation."""
