"""Images that differ from the others of their data set: dark, bright, blurred, tiny, of an odd shape, grey, bordered or plain.

An image is odd only among the others: a value counts if it is far from the median of all images, so that product photographs on
white are not all bright.
"""

import io
from collections.abc import Mapping
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image

from fivefold.data.image_io import DecodeOptions, is_grey

SIDE = 256
"""Images are measured at up to this longer side, in pixels, so that figures of large and small ones compare."""
DEVIATIONS = 6.0
"""Robust standard deviations (1.4826 times the median absolute deviation) from the median that make a value odd."""
BLACK = 12
"""The highest brightness of a black border, of 255."""
RARE = 0.1
"""Grey images among colour images are odd up to this fraction of all."""
RULES = {
    "dark": ("bright_end", -1, 0.04),
    "bright": ("dark_end", 1, 0.04),
    "blurred": ("sharpness", -1, 0.15),
    "tiny": ("shorter_side", -1, 0.1),
    "wide": ("aspect", 1, 0.07),
    "tall": ("aspect", -1, 0.07),
    "plain": ("entropy", -1, 0.25),
    "black border": ("border", 1, 0.01),
}
"""Problem: the figure that shows it, the direction, and the least deviation that counts as one robust standard deviation."""


def measure(content: bytes, path: str, options: DecodeOptions) -> dict[str, float | str]:
    """Return the figures of one image file: `shorter_side` and `aspect` as logarithms, the others as below; raise as `decode` does.

    `bright_end` and `dark_end`: the 99th and 1st percentile of brightness in 0..1. `sharpness`: the logarithm of the variance of the
    Laplacian. `entropy` of the grey levels in bits. `border`: the fraction of the sides that are black. `grey`: 1 or 0.
    `format`: the file's format if its suffix is of another one, else "".
    """
    from scipy.ndimage import laplace

    pixels = options.decode(content, path)
    height, width = pixels.shape[:2]
    with Image.open(io.BytesIO(content)) as header:
        named = Image.registered_extensions().get(PurePosixPath(path).suffix.lower())
        is_jpeg = header.format == "MPO" and named == "JPEG"  # a JPEG with a second picture
        unlike = "" if named in (None, header.format) or is_jpeg else str(header.format)
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    grey = image.convert("L")
    levels = np.asarray(grey, np.float32)
    return {
        "bright_end": float(np.percentile(levels, 99) / 255),
        "dark_end": float(np.percentile(levels, 1) / 255),
        "sharpness": float(np.log10(laplace(levels).var() + 1)),
        "shorter_side": float(np.log2(min(height, width))),
        "aspect": float(np.log2(width / height)),
        "entropy": float(grey.entropy()),
        "border": _black_border(levels),
        "grey": float(is_grey(np.asarray(image))),
        "format": unlike,
    }


def _black_border(levels: np.ndarray) -> float:
    """Return the fraction of rows and columns that lie in black borders, the larger of both."""
    shares = []
    for axis in (0, 1):
        lit = np.flatnonzero(levels.max(axis=1 - axis) > BLACK)
        shares.append(1 - (lit[-1] - lit[0] + 1) / levels.shape[axis] if len(lit) else 1.0)
    return float(max(shares))


def find_odd(figures: pd.DataFrame) -> pd.DataFrame:
    """Return the odd images: columns `row`, `problem`, `value` and `typical`, the median, by problem and from the oddest on.

    `figures`: those of `measure`, a row for each image.
    """
    found: list[dict[str, object]] = []
    for problem, (name, direction, least) in RULES.items():
        values = figures[name].to_numpy(float)
        median = float(np.median(values))
        deviation = max(least, 1.4826 * float(np.median(np.abs(values - median))))
        distance = direction * (values - median) / deviation
        rows = np.flatnonzero(distance > DEVIATIONS)
        for row in rows[np.argsort(-distance[rows], kind="stable")]:
            found.append(
                {"row": row, "problem": problem, "value": shown(name, values[row]), "typical": shown(name, median)}
            )
    grey = figures["grey"].to_numpy() > 0
    if 0 < grey.mean() <= RARE:
        found += [{"row": row, "problem": "grey", "value": "grey", "typical": "colour"} for row in np.flatnonzero(grey)]
    for row in np.flatnonzero(figures["format"] != ""):
        found.append({"row": row, "problem": "wrong suffix", "value": figures["format"].iat[row], "typical": ""})
    return pd.DataFrame(found, columns=["row", "problem", "value", "typical"])


def shown(name: str, value: float) -> str:
    """Return a figure as people read it: pixels for sides, width ÷ height for shapes."""
    if name == "shorter_side":
        return f"{2**value:.0f} px"
    return f"{2**value:.2f}" if name == "aspect" else f"{value:.2f}"


def count_problems(odd: pd.DataFrame) -> Mapping[str, int]:
    """Return the number of images by problem."""
    return {str(name): int(count) for name, count in odd["problem"].value_counts().items()}
