"""Real JPEGs to measure with: crops of scikit-learn's two photographs, or a folder of one's own.

The two are 640 × 427 pixels. Each image is a random 4:3 crop of one of them, mirrored or not, a little brighter or
darker, at the wanted size. Where that is larger than the crop it is an enlargement, which a JPEG would pack too
well; noise like a sensor's (standard deviation 3 of 255) and qualities of 85 to 95 make the files as large as a
camera's: about 60 KB at 500 × 375, and 500 KB at 1600 × 1200. What costs time in decoding is their bytes and their pixels.
"""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fivefold.choose import choose
from fivefold.contract.files import check_space, write_json
from fivefold.data.images import is_image
from fivefold.errors import DataError
from fivefold.machine import count_cores
from fivefold.progress import track

CLASSES = 10
FEWEST = 40
NOISE = 3.0
MARKER = "photos.json"
FORMAT = 1
"""Raised when the files change, so that older ones are made anew."""
SIZES = {"500x375": (500, 375), "1600x1200": (1600, 1200), "341x256": (341, 256)}


def photographs(work: Path, size: str, count: int, given: str = "") -> Path:
    """A folder of class folders with `count` JPEGs of a `size` of SIZES, made once; or with at most `count` of `given`.

    Of a folder of one's own the classes are made up: files are copied in turns to CLASSES folders.
    """
    source = Path(given).resolve() if given else None
    own = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    name = f"{size}-{count}" if source is None else f"own-{own}-{count}"
    folder = work / name
    wanted = {"format": FORMAT, "size": size, "count": count, "given": str(source or "")}
    if (folder / MARKER).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    files = _copied(source, count) if source else _made(choose(SIZES, "photo", size), count)
    total = min(count, len(_own(source))) if source else count
    for number, content in enumerate(track(files, total, f"images {name}")):
        path = folder / f"class-{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if number == 0:
            check_space(folder, total * len(content) * 2)
    write_json(folder / MARKER, wanted)
    return folder


def crop(photos: list[Image.Image], size: tuple[int, int], seed: int) -> bytes:
    """The JPEG number `seed` at `size` (width, height): the same bytes each time."""
    random = np.random.default_rng([FORMAT, seed])
    photo = photos[int(random.integers(len(photos)))]
    share = float(random.uniform(0.6, 1.0))
    height = min(photo.height, photo.width * size[1] / size[0]) * share
    width = height * size[0] / size[1]
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    image = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    pixels = np.asarray(image, np.float32) * random.uniform(0.8, 1.2)
    pixels += random.standard_normal(pixels.shape, np.float32) * NOISE
    made, buffer = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), BytesIO()
    made.save(buffer, "JPEG", quality=int(random.integers(85, 96)))
    return buffer.getvalue()


def two_photographs() -> list[Image.Image]:
    """Those that scikit-learn brings."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _made(size: tuple[int, int], count: int) -> Iterator[bytes]:
    photos = two_photographs()
    with ThreadPoolExecutor(count_cores()) as pool:
        yield from pool.map(lambda seed: crop(photos, size, seed), range(count))


def _copied(source: Path, count: int) -> Iterator[bytes]:
    return (path.read_bytes() for path in _own(source)[:count])


def _own(source: Path) -> list[Path]:
    """The image files below a folder, in the order of their names."""
    found = sorted(path for path in source.rglob("*") if path.is_file() and is_image(path.name))
    if len(found) < FEWEST:
        raise DataError(f"images={source} holds {len(found)} image files; at least {FEWEST} are needed")
    return found
