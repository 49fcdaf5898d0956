"""A few images with what they show and what a model takes them for, as one picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from fivefold.choose import choose
from fivefold.evaluation import drawing
from fivefold.evaluation.drawing import DPI, THEMES, Target

COLUMNS = 4
SHOWN = 16
SIDE, GAP, CAPTION = 320, 24, 48
"""Pixels of a shown image's longer side, around it, and of the two lines above it."""
LARGE_PIXELS = 3
"""An image that is enlarged so many times or more keeps its pixels as squares."""


def spread_out(rows: int, most: int = SHOWN) -> np.ndarray:
    """At most `most` of `rows` rows, evenly spread over them, ascending."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64))


def image_grid(
    images: Sequence[np.ndarray], truth: Sequence[str], guesses: Sequence[str], target: Target, theme: str = "light"
) -> None:
    """The images (uint8 [H, W, 3], of any sizes), each under its true and its predicted class; mistakes in another colour.

    They are pasted into one canvas, which takes half the time of as many axes.
    """
    colours = choose(THEMES, "theme", theme)
    numbers = range(len(images))
    names = zip(drawing.drawable(truth, numbers), drawing.drawable(guesses, numbers), strict=True)
    shown = [_fitted(image) for image in images]
    lines = [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)]
    tops = np.cumsum([GAP, *(CAPTION + max(image.height for image in line) + GAP for line in lines)])
    size = (COLUMNS * (SIDE + GAP) + GAP, int(tops[-1]))
    pasted = Image.new("RGB", size, colours.surface)
    figure = drawing.canvas(colours, (size[0] / DPI, size[1] / DPI))
    for number, (image, (true, guess)) in enumerate(zip(shown, names, strict=True)):
        left, top = GAP + number % COLUMNS * (SIDE + GAP), int(tops[number // COLUMNS])
        pasted.paste(image, (left, top + CAPTION))
        colour = colours.text if true == guess else colours.wrong
        caption, at = f"truth {true}\npredicted {guess}", (left / size[0], 1 - (top + CAPTION - 8) / size[1])
        figure.text(*at, caption, color=colour, fontsize=8, va="bottom")
    figure.figimage(np.asarray(pasted))
    drawing.save(figure, target, colours)


def _fitted(image: np.ndarray) -> Image.Image:
    """The image with its longer side at SIDE pixels."""
    scale = SIDE / max(image.shape[:2])
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    how = Image.Resampling.NEAREST if scale >= LARGE_PIXELS else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize((width, height), how)
