"""What a plan knows about a data set: its rows, classes and groups, and figures of some of its images."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from fivefold.config.schema import Data
from fivefold.data.image_io import decode_options, is_grey
from fivefold.data.readers.stores import ImageStore
from fivefold.data.split.assign import group_codes

SAMPLE = 64
"""Number of images that are opened."""


@dataclass(frozen=True)
class DataFacts:
    """Facts about the labelled rows that folds use, and about test images.

    `groups`: the number of groups if rows share one, else 0. `shorter_side`: the median of the files' images, in pixels. `grey`:
    the fraction of images without colour. `image_bytes`, `decode_seconds`: the mean of a decoded image, on one core.
    """

    rows: int
    folds: int
    classes: int
    smallest_class: int
    largest_class: int
    groups: int
    eval_images: int
    shorter_side: int
    grey: float
    image_bytes: float
    decode_seconds: float

    @property
    def train_rows(self) -> int:
        """Return the mean number of rows that a fold trains on."""
        return self.rows - self.valid_rows

    @property
    def valid_rows(self) -> int:
        return self.rows // max(2, self.folds)


def sample_rows(count: int) -> list[int]:
    """Return up to SAMPLE evenly spaced rows of so many."""
    return np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(int)).tolist()


def read_facts(
    store: ImageStore,
    paths: Sequence[str],
    codes: np.ndarray,
    classes: int,
    groups: pa.Array,
    folds: int,
    eval_images: int,
    data: Data,
) -> DataFacts:
    """Return the facts of rows with class indices `codes` [N]; open some of their images. `folds`: 1 for a split by ratio."""
    counts = np.bincount(codes, minlength=classes)
    grouped = group_codes(groups)
    options = decode_options(data)
    sides, grey, sizes, seconds = [], [], [], []
    for row in sample_rows(len(paths)):
        content = store.read(paths[row])
        with Image.open(io.BytesIO(content)) as image:
            sides.append(min(image.size))
        start = time.perf_counter()
        pixels = options.decode(content, paths[row])
        seconds.append(time.perf_counter() - start)
        sizes.append(pixels.nbytes)
        grey.append(is_grey(pixels))
    return DataFacts(
        rows=len(codes),
        folds=folds,
        classes=classes,
        smallest_class=int(counts.min()),
        largest_class=int(counts.max()),
        groups=0 if grouped is None else int(grouped.max()) + 1,
        eval_images=eval_images,
        shorter_side=int(np.median(sides)),
        grey=round(float(np.mean(grey)), 2),
        image_bytes=round(float(np.mean(sizes))),
        decode_seconds=round(float(np.mean(seconds)), 5),
    )
