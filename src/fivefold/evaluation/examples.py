"""A few images with what they show and what a model takes them for, as one picture."""

from collections.abc import Sequence

import numpy as np

from fivefold.choose import choose
from fivefold.evaluation import drawing
from fivefold.evaluation.drawing import THEMES, Target

COLUMNS = 4
SHOWN = 16


def spread_out(rows: int, most: int = SHOWN) -> np.ndarray:
    """At most `most` of `rows` rows, evenly spread over them, ascending."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64))


def image_grid(
    images: Sequence[np.ndarray], truth: Sequence[str], guesses: Sequence[str], target: Target, theme: str = "light"
) -> None:
    """The images (uint8 [H, W, 3], of any sizes), each under its true and its predicted class; mistakes in another colour."""
    colours = choose(THEMES, "theme", theme)
    lines = -(-len(images) // COLUMNS)
    figure = drawing.blank(colours, (2.2 * COLUMNS, 2.6 * lines))
    axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    numbers = range(len(images))
    names = zip(drawing.drawable(truth, numbers), drawing.drawable(guesses, numbers), strict=True)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, (true, guess) in zip(axes, images, names, strict=False):
        axis.imshow(image)
        colour = colours.text if true == guess else colours.wrong
        axis.set_title(f"truth {true}\npredicted {guess}", color=colour, fontsize=8, loc="left")
    drawing.save(figure, target, colours)
