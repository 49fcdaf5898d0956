"""Pictures of a comparison: figures as bars, likeness as heat maps. Experiments go by number and name.

Every function draws to `target`, a path or a binary file, as PNG; matplotlib is imported late.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fivefold.choose import choose
from fivefold.evaluation import drawing
from fivefold.evaluation.drawing import THEMES, Target, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_NAME = 60
LINE = 28
"""Cells of a line of a name: Hangul and Han take two."""
WRITTEN = 16
"""Up to so many experiments have their likeness written into the cells."""
NAMED = 40


def scores(
    names: Sequence[str], figures: Sequence[Mapping[str, float | None]], target: Target, theme: str = "light"
) -> None:
    """Accuracy with its 95 % interval, and log loss, of each experiment: bars from 0, figures beside them.

    `figures`: of each of `names`, `accuracy`, `accuracy_low`, `accuracy_high` and `logloss`, or None for unknown.
    """
    colours = choose(THEMES, "theme", theme)
    labels = numbered(dict(enumerate(names, start=1)))
    height = sum(0.24 + 0.16 * label.count("\n") + 0.12 for label in labels)
    figure = drawing.blank(colours, (9.6, 1.15 + height))
    left, right = figure.subplots(1, 2, sharey=True)
    accuracy, logloss = _column(figures, "accuracy"), _column(figures, "logloss")
    spread = np.abs(np.stack([_column(figures, "accuracy_low"), _column(figures, "accuracy_high")]) - accuracy)
    _bars(left, colours, "Accuracy", "share of rows, higher is better", accuracy, colours.accent)
    left.errorbar(
        accuracy, np.arange(len(names)), xerr=spread, fmt="none", ecolor=colours.text, elinewidth=1.1, capsize=2.5
    )
    left.set_xlim(0, 1)
    _bars(right, colours, "Log loss", "nats a row, lower is better", logloss, colours.second)
    right.set_xlim(0, 1.05 * np.nanmax(logloss, initial=0.01))
    left.set_yticks(np.arange(len(names)), labels)
    left.set_ylim(len(names) - 0.4, -0.6)
    drawing.save(figure, target, colours)


def likeness(
    names: Mapping[int, str], agreement: np.ndarray, correlation: np.ndarray, target: Target, theme: str = "light"
) -> None:
    """Two heat maps [M, M] side by side: shares of rows with the same predicted class, correlations of probabilities.

    `names` of the M experiments by their numbers.
    """
    colours = choose(THEMES, "theme", theme)
    side = 1.6 + 0.5 * min(len(names), WRITTEN) + 0.06 * min(max(len(names) - WRITTEN, 0), NAMED)
    figure = drawing.blank(colours, (2 * side + 2.6, side + 0.8))
    left, right = figure.subplots(1, 2)
    _heat(left, colours, "Agreement of predicted classes", agreement)
    _heat(right, colours, "Correlation of probabilities", correlation)
    places = np.arange(len(names))
    if len(names) <= NAMED:
        numbers = [str(number) for number in names]
        left.set_yticks(places, numbered(names))
        right.set_yticks(places, numbers)
        for axis in (left, right):
            axis.set_xticks(places, numbers)
    drawing.save(figure, target, colours)


def numbered(names: Mapping[int, str]) -> list[str]:
    """`1  name`, in lines of some 28 cells; the number alone for a name that no font can draw."""
    drawn = drawing.drawable(list(names.values()), list(names), LONGEST_NAME)
    return [
        str(number) if name == f"#{number}" else "\n".join(_lines(f"{number}  {name}"))
        for number, name in zip(names, drawn, strict=True)
    ]


def _lines(text: str) -> list[str]:
    """`text` in lines of at most LINE cells, broken behind blanks, `_`, `-` and `.` where it can be."""
    lines, line = [], ""
    for piece in re.findall(r"[^ _.-]*[ _.-]*", text):
        while _cells(piece) > LINE:
            piece, cut = piece[LINE // 2 :], piece[: LINE // 2]
            lines += [line, cut] if line else [cut]
            line = ""
        if line and _cells(line + piece) > LINE:
            lines, line = [*lines, line], ""
        line += piece
    return [each.rstrip() for each in [*lines, line] if each.strip()]


def _cells(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _column(figures: Sequence[Mapping[str, float | None]], name: str) -> np.ndarray:
    return np.array([np.nan if row.get(name) is None else row[name] for row in figures], dtype=np.float64)


def _bars(axis: "Axes", colours: Theme, title: str, across: str, values: np.ndarray, colour: str) -> None:
    """Bars from 0, with each figure at the panel's right edge, where nothing hides it."""
    drawing.style(axis, colours, title, across)
    axis.grid(False, axis="y")
    axis.barh(np.arange(len(values)), np.nan_to_num(values), 0.6, color=colour)
    for row, value in enumerate(values):
        text = "–" if np.isnan(value) else f"{value:.4f}"
        axis.text(1.02, row, text, color=colours.text, fontsize=9.5, va="center", transform=axis.get_yaxis_transform())


def _heat(axis: "Axes", colours: Theme, title: str, values: np.ndarray) -> None:
    """A square of shades: white for the least likeness of two, or a little below, full colour for 1."""
    from matplotlib.colors import LinearSegmentedColormap

    others = values[~np.eye(len(values), dtype=bool)]
    low = min(float(np.nanmin(others, initial=1.0)), 0.98)
    low -= 0.15 * (1 - low)
    shades = LinearSegmentedColormap.from_list("", (colours.surface, colours.accent))
    axis.imshow(np.ma.masked_invalid(values), shades, vmin=low, vmax=1, interpolation="nearest")
    drawing.style(axis, colours, title, "")
    axis.grid(False)
    for row, column in np.ndindex(*values.shape) if len(values) <= WRITTEN else ():
        value = values[row, column]
        ink = colours.surface if (value - low) / (1 - low) > 0.7 else colours.text
        text = "–" if np.isnan(value) else f"{value:.3f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=8.5, color=ink)
