"""Any image file as 8-bit RGB pixels, upright; and the digest by which equal pictures are known."""

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
from PIL import Image, ImageOps

from fivefold.errors import DataError
from fivefold.machine import count_cores
from fivefold.recipe import Data, ImageFormat

T, R = TypeVar("T"), TypeVar("R")

# fmt: off
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".mpo", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".ppm", ".pgm", ".pbm",
}
# fmt: on
FORMATS = [*get_args(ImageFormat)]
"""What may be decoded: Pillow's other plugins run programs (EPS) or are not photographs."""
PLUGINS = {"pillow_heif.HeifImagePlugin": ("HEIF", ".heic", ".heif", ".hif"), "pillow_jxl": ("JXL", ".jxl")}
"""Modules that teach Pillow a format: its name, and its suffixes."""
ORIENTATION = 0x0112
MILLION = 1e6
MOST_PIXELS = Data().max_megapixels * MILLION
PNG = b"\x89PNG\r\n\x1a\n"
NOTES = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")
"""Chunks of a PNG that say nothing of its pixels as they are used here."""
MOST_NOTES = 32
"""Of such chunks are kept; Pillow refuses a file whose texts are too long together."""
LONG = 1 << 20
"""Bytes of such a chunk, unpacked, for which Pillow refuses the file."""
BAND = 1 << 18
"""Pixels that are converted at a time, so that no copies of a whole image are made."""
MOST_SCANS = 100
"""Scans of a JPEG; a progressive photograph has 5 to 14. Each costs a walk over all blocks, though 75 bytes may be all of it."""
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
"""A marker of a JPEG that ends it or is followed by a length."""
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

    def decode(self, content: bytes, name: str, least: int = 0, **bounds: Any) -> np.ndarray:
        """The pixels uint8 [H, W, 3] of an image file at their stored size; `least` and `bounds` as `decode` has them.

        The lower of `max_pixels` and the bound of these pixels counts.
        """
        sides = [side for side in (self.store_size * self.scaled, least) if side]
        bounds["max_pixels"] = min(bounds.get("max_pixels", math.inf), self.max_pixels)
        return self.shrink(decode(content, name, least=min(sides, default=0), **bounds))

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


def decode(
    content: bytes, name: str, max_pixels: float = MOST_PIXELS, least: int = 0, formats: Sequence[str] = FORMATS
) -> np.ndarray:
    """The pixels of an image file: uint8 [H, W, 3] RGB, contiguous and writable, EXIF orientation applied.

    Grey, CMYK, palette and 16-bit images are converted (16 bits scaled to 8), transparency is laid
    over white, and of an animation it is the first frame. A JPEG is scaled down as it is decoded, as far as its shorter
    side keeps `least` pixels (0: not at all). Raises a DataError with `name` and the reason for what is no image,
    is cut off or none of `formats`, has more than MOST_SCANS scans, or would unpack to more than `max_pixels`.
    """
    with _opened(content, name, max_pixels, formats) as image:
        if least:
            image.draft(None, (least, least))
        image.load()
        with suppress(Exception):  # broken metadata says nothing against the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def decoded_size(
    content: bytes, name: str, max_pixels: float = MOST_PIXELS, formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """(height, width) that `decode` would give, of the file's head alone; a DataError for what it refuses by the head."""
    with _opened(content, name, max_pixels, formats) as image:
        orientation = 1
        with suppress(Exception):  # broken metadata says nothing against the pixels
            orientation = image.getexif().get(ORIENTATION, 1)
        turned = orientation in TURNED and image.format != "TIFF"  # Pillow turns TIFFs itself
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(content: bytes, name: str, max_pixels: float, formats: Sequence[str]) -> Iterator[Image.Image]:
    """The image of a file whose head is read and within the bounds; a DataError for any other, and for what the block raises."""
    _silence_pillow(max_pixels)
    try:
        _check_size(*_webp_size(content), max_pixels)  # Pillow makes room for a WebP when it is opened
        with Image.open(BytesIO(_without_long_notes(content)), formats=formats) as image:
            _check_size(*image.size, max_pixels)
            if image.format in ("JPEG", "MPO") and _has_many_scans(content):
                raise ValueError(f"it has more than {MOST_SCANS} scans")
            yield image
    except Exception as error:  # decoders raise whatever foreign bytes lead them to
        raise DataError(f"{name} cannot be decoded: {_reason(error, content, formats)}") from error


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


def _check_size(width: int, height: int, most: float) -> None:
    """A ValueError for an image of more pixels than `most`, by its head alone: nothing of it is unpacked yet."""
    if width * height > most:
        raise ValueError(
            f"it has {width} × {height} pixels, more than the {most / MILLION:g} million allowed (max_megapixels)"
        )


def _without_long_notes(content: bytes) -> bytes:
    """A PNG without its long texts and colour profiles, and of short ones without those after MOST_NOTES, for which Pillow would
    refuse it; anything else as it is.
    """
    kept, at = [], len(PNG) if content.startswith(PNG) else len(content)
    last = notes = 0
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        is_note = content[at + 4 : at + 8] in NOTES
        notes += is_note
        if is_note and (notes > MOST_NOTES or _is_long(content[at + 4 : end - 4])):
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


def _webp_size(content: bytes) -> tuple[int, int]:
    """(width, height) that the head of a WebP says; (0, 0) for any other file."""
    if content[:4] + content[8:12] != b"RIFFWEBP":
        return 0, 0
    at, bits, more = {b"VP8X": (24, 24, 1), b"VP8L": (21, 14, 1)}.get(content[12:16], (26, 16, 0))
    both, mask = int.from_bytes(content[at : at + 6], "little"), 0xFFFFFF if bits == 24 else 0x3FFF
    return (both & mask) + more, (both >> bits & mask) + more


def _has_many_scans(jpeg: bytes) -> bool:
    """Whether a JPEG has more than MOST_SCANS scans, as its decoder would find them; not counting what follows its end."""
    if jpeg.count(b"\xff\xda") <= MOST_SCANS:
        return False
    scans, found = 0, _MARKER.search(jpeg)
    while found and found[1] != b"\xd9" and scans <= MOST_SCANS:
        scans += found[1] == b"\xda"
        found = _MARKER.search(jpeg, found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big"))
    return scans > MOST_SCANS


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as they are stored, as uint8 [H, W, 3]."""
    pixels, rows = np.empty((image.height, image.width, 3), np.uint8), max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        pixels[top : top + rows] = _rgb_band(image if rows >= image.height else image.crop(box))
    return pixels


def _rgb_band(image: Image.Image) -> np.ndarray:
    """As `_rgb`, uint8 [H, W, 3], or [H, W, 1] for a grey one."""
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


def _reason(error: Exception, content: bytes, formats: Sequence[str]) -> str:
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is no image of a known format, {', '.join(formats)} (it starts with {content[:4]!r})"
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
