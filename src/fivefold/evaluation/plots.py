"""Plots of scores, comparisons and images by matplotlib (imported lazily, without a display), with a light or dark theme.

Every plot function writes a PNG to `target`, a path or a binary file.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image

from fivefold.errors import DataError
from fivefold.lookup import choose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Target = Path | BinaryIO
DPI = 160
COMPRESSION = 3
"""zlib level: takes half the time of the default 6, for a few percent more bytes."""
FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "AppleGothic", "Noto Sans CJK JP", "WenQuanYi Zen Hei")
"""Fonts with Hangul and Han; if none is installed, such classes are shown by their number."""
MAX_NAMED = 40
"""Maximum number of classes or experiments for names beside a matrix."""
MAX_WRITTEN = 16
"""Maximum number of classes or experiments for figures in a matrix's cells."""
MAX_BARS = 40
MAX_NAME_LENGTH = 60
MAX_LINE_CELLS = 28
"""Maximum width of a line of a name in cells: a Hangul or Han character takes two."""
COLUMNS = 4
MAX_IMAGES = 16
SIDE, GAP, CAPTION = 320, 24, 48
"""Pixels: longer side of an image, gap between images, height of the two-line caption."""
MIN_SQUARE_SCALE = 3
"""An image that is enlarged at least this many times keeps its pixels as squares."""


@dataclass(frozen=True)
class Theme:
    """Colours of a plot: surface, text, quiet text, grid, and the data."""

    surface: str
    text: str
    quiet: str
    grid: str
    accent: str
    second: str
    wrong: str
    series: tuple[str, ...]


def plot_training_curves(train_log_csv: Path, target_png: Target, theme: str = "light") -> None:
    """Plot loss, accuracy, log loss and learning rate by epoch from one `train_log.csv`.

    Missing or empty columns (no validation rows) are skipped.
    """
    log = read_train_log(train_log_csv)
    colours = choose(THEMES, "theme", theme)
    figure, axes = _make_panels(colours)
    pairs = [
        ("Loss", (("train_loss", "training"), ("val_loss", "validation"))),
        ("Accuracy", (("train_acc", "training"), ("val_acc", "validation"))),
        ("Validation log loss", (("val_logloss", ""),)),
        ("Learning rate", (("lr", ""),)),
    ]
    for axis, (title, series) in zip(axes, pairs, strict=True):
        style(axis, colours, title, "epoch")
        for (column, label), colour in zip(series, (colours.quiet, colours.accent)[-len(series) :], strict=True):
            _plot_line(axis, log, column, colour, label)
        if len(series) > 1:
            legend(axis, colours)
    _mark_best(axes[2], log, colours)
    save(figure, target_png, colours)


def plot_fold_curves(logs: Mapping[str, Path], target: Target, theme: str = "light") -> None:
    """Plot the validation curves of several models in the same panels, with their names."""
    colours = choose(THEMES, "theme", theme)
    figure, axes = _make_panels(colours)
    panels = (("Training loss", "train_loss"), ("Validation loss", "val_loss"))
    panels += (("Validation accuracy", "val_acc"), ("Validation log loss", "val_logloss"))
    tables = {name: read_train_log(path) for name, path in logs.items()}
    few = len(tables) <= len(colours.series)
    for axis, (title, column) in zip(axes, panels, strict=True):
        style(axis, colours, title, "epoch")
        for index, (name, log) in enumerate(tables.items()):
            _plot_line(axis, log, column, colours.series[index] if few else colours.accent, name, 1.0 if few else 0.4)
    if few and len(tables) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=6, frameon=False, labelcolor=colours.text, fontsize=9
        )
    save(figure, target, colours)


def read_train_log(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a `train_log.csv`, one value per epoch; an empty cell is NaN."""
    try:
        log = pd.read_csv(path, dtype=np.float64, index_col=False)
    except ValueError as error:
        raise DataError(f"{path} is not a training log: {error}") from error
    return {name: log[name].to_numpy() for name in log}


def plot_confusion(matrix: np.ndarray, classes: Sequence[str], target: Target, theme: str = "light") -> None:
    """Plot the confusion matrix [C, C]: hits in one colour, confusions in another, as shares of the true class.

    Up to 16 classes have counts in the cells, up to 40 have names at the axes; more classes have numbers.
    """
    colours = choose(THEMES, "theme", theme)
    side = 4.0 + min(len(classes), MAX_NAMED) * 0.15
    figure = new_figure(colours, (side + 1.0, side))
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    hits = np.eye(len(classes), dtype=bool)
    # With many classes a rare confusion is a single pixel: the square root keeps it visible.
    shown = np.sqrt(np.where(hits, shares, shares / _full_scale(shares, hits)))
    _draw_shades(axis, np.ma.masked_where(~hits, shown), (colours.surface, colours.accent))
    picture = _draw_shades(axis, np.ma.masked_where(hits, shown), (colours.surface, colours.wrong))
    style(axis, colours, "", "predicted", "true")
    axis.grid(False)
    _set_class_ticks(axis, classes, colours)
    if len(classes) <= MAX_WRITTEN:
        _write_counts(axis, matrix, shown, colours)
    _draw_colour_bar(figure, axis, picture, _full_scale(shares, hits), colours)
    save(figure, target, colours)


def plot_reliability(table: Mapping[str, np.ndarray], ece: float, target: Target, theme: str = "light") -> None:
    """Plot the reliability diagram of `metrics.reliability_table`, and below it the number of rows per bin."""
    colours = choose(THEMES, "theme", theme)
    figure = new_figure(colours, (5.2, 5.4))
    top, bottom = figure.subplots(2, 1, height_ratios=[3.2, 1], sharex=True)
    style(top, colours, f"ECE {ece:.4f}", "", "accuracy")
    style(bottom, colours, "", "confidence", "rows")
    middle, width = (table["low"] + table["high"]) / 2, 1 / len(table["low"])
    full = table["rows"] > 0
    top.plot([0, 1], [0, 1], color=colours.quiet, linewidth=1, linestyle=(0, (4, 3)))
    top.bar(middle[full], table["accuracy"][full], width * 0.86, color=colours.accent, label="accuracy")
    top.plot(
        table["confidence"][full],
        table["confidence"][full],
        linestyle="none",
        marker="D",
        markersize=5,
        markerfacecolor=colours.second,
        markeredgecolor=colours.surface,
        label="mean confidence",
    )
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    legend(top, colours)
    bottom.bar(middle, table["rows"], width * 0.86, color=colours.quiet)
    save(figure, target, colours)


def plot_class_f1(
    table: Mapping[str, np.ndarray], classes: Sequence[str], target: Target, theme: str = "light"
) -> None:
    """Plot the F1 of each class, the lowest first; of many classes the lowest 40."""
    colours = choose(THEMES, "theme", theme)
    present = np.flatnonzero((table["support"] + table["predicted"]) > 0)
    order = present[np.argsort(table["f1"][present], kind="stable")][:MAX_BARS]
    names = printable_labels([classes[code] for code in order], [int(code) for code in order])
    figure = new_figure(colours, (5.2, 0.9 + 0.26 * len(order)))
    axis = figure.subplots()
    title = f"the lowest {MAX_BARS} of {len(classes)} classes" if len(present) > MAX_BARS else ""
    style(axis, colours, title, "F1")
    axis.grid(False, axis="y")
    rows = np.arange(len(order))
    axis.barh(rows, table["f1"][order], 0.72, color=colours.accent)
    axis.set_yticks(rows, names)
    axis.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6))
    for row, code in enumerate(order):
        inside = table["f1"][code] > 0.12
        axis.annotate(
            f"{table['f1'][code]:.3f}",
            (table["f1"][code], row),
            xytext=(-4 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7.5,
            color=colours.surface if inside else colours.text,
        )
    save(figure, target, colours)


def plot_confidence(log_probs: np.ndarray, codes: np.ndarray, target: Target, theme: str = "light") -> None:
    """Plot histograms of the confidence of correct and of wrong predictions, each as shares."""
    colours = choose(THEMES, "theme", theme)
    confidence = np.exp(log_probs.max(axis=1).astype(np.float64)).clip(0, 1)
    right = log_probs.argmax(axis=1) == codes
    figure = new_figure(colours, (5.2, 5.4))
    axis = figure.subplots()
    style(axis, colours, "", "confidence", "share")
    edges = np.linspace(0, 1, 26)
    for part, colour, label in ((right, colours.accent, "correct"), (~right, colours.wrong, "wrong")):
        if part.any():
            counts = np.histogram(confidence[part], edges)[0] / part.sum()
            axis.stairs(counts, edges, fill=True, color=colour, alpha=0.35)
            axis.stairs(counts, edges, color=colour, linewidth=1.6, label=f"{label} ({part.sum():,})")
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    legend(axis, colours)
    save(figure, target, colours)


def plot_scores(
    names: Sequence[str], figures: Sequence[Mapping[str, float | None]], target: Target, theme: str = "light"
) -> None:
    """Plot each experiment's accuracy with its 95 % interval, and its log loss: bars from 0 with figures beside them.

    `figures`: `accuracy`, `accuracy_low`, `accuracy_high` and `logloss` of each of `names`; None if unknown.
    """
    colours = choose(THEMES, "theme", theme)
    labels = numbered_labels(dict(enumerate(names, start=1)))
    height = sum(0.24 + 0.16 * label.count("\n") + 0.12 for label in labels)
    figure = new_figure(colours, (9.6, 1.15 + height))
    left, right = figure.subplots(1, 2, sharey=True)
    accuracy, logloss = _column(figures, "accuracy"), _column(figures, "logloss")
    spread = np.abs(np.stack([_column(figures, "accuracy_low"), _column(figures, "accuracy_high")]) - accuracy)
    _draw_bars(left, colours, "Accuracy", "share of rows, higher is better", accuracy, colours.accent)
    left.errorbar(
        accuracy, np.arange(len(names)), xerr=spread, fmt="none", ecolor=colours.text, elinewidth=1.1, capsize=2.5
    )
    left.set_xlim(0, 1)
    _draw_bars(right, colours, "Log loss", "nats per row, lower is better", logloss, colours.second)
    right.set_xlim(0, 1.05 * np.nanmax(logloss, initial=0.01))
    left.set_yticks(np.arange(len(names)), labels)
    left.set_ylim(len(names) - 0.4, -0.6)
    save(figure, target, colours)


def plot_agreement(
    names: Mapping[int, str], agreement: np.ndarray, correlation: np.ndarray, target: Target, theme: str = "light"
) -> None:
    """Plot two heat maps [M, M] side by side: shares of rows with the same predicted class, correlations of probabilities.

    `names`: the M experiments by number.
    """
    colours = choose(THEMES, "theme", theme)
    side = 1.6 + 0.5 * min(len(names), MAX_WRITTEN) + 0.06 * min(max(len(names) - MAX_WRITTEN, 0), MAX_NAMED)
    figure = new_figure(colours, (2 * side + 2.6, side + 0.8))
    left, right = figure.subplots(1, 2)
    _draw_heat_map(left, colours, "Agreement of predicted classes", agreement)
    _draw_heat_map(right, colours, "Correlation of probabilities", correlation)
    ticks = np.arange(len(names))
    if len(names) <= MAX_NAMED:
        numbers = [str(number) for number in names]
        left.set_yticks(ticks, numbered_labels(names))
        right.set_yticks(ticks, numbers)
        for axis in (left, right):
            axis.set_xticks(ticks, numbers)
    save(figure, target, colours)


def numbered_labels(names: Mapping[int, str]) -> list[str]:
    """Return labels `1  name`, wrapped at 28 cells; only the number if no font can draw the name."""
    drawn = printable_labels(list(names.values()), list(names), MAX_NAME_LENGTH)
    return [
        str(number) if name == f"#{number}" else "\n".join(_wrap(f"{number}  {name}"))
        for number, name in zip(names, drawn, strict=True)
    ]


def evenly_spaced(rows: int, limit: int = MAX_IMAGES) -> np.ndarray:
    """Return at most `limit` indices of `rows` rows, evenly spaced, ascending."""
    return np.unique(np.linspace(0, rows - 1, min(rows, limit)).round().astype(np.int64))


def plot_image_grid(
    images: Sequence[np.ndarray], truth: Sequence[str], guesses: Sequence[str], target: Target, theme: str = "light"
) -> None:
    """Plot images (uint8 [H, W, 3], of any size), each below its true and its predicted class; mistakes in another colour.

    The images are pasted into one canvas, which takes half the time of one axis per image.
    """
    colours = choose(THEMES, "theme", theme)
    numbers = range(len(images))
    names = zip(printable_labels(truth, numbers), printable_labels(guesses, numbers), strict=True)
    shown = [_fit(image) for image in images]
    lines = [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)]
    tops = np.cumsum([GAP, *(CAPTION + max(image.height for image in line) + GAP for line in lines)])
    size = (COLUMNS * (SIDE + GAP) + GAP, int(tops[-1]))
    pasted = Image.new("RGB", size, colours.surface)
    figure = fixed_canvas(colours, (size[0] / DPI, size[1] / DPI))
    for number, (image, (true, guess)) in enumerate(zip(shown, names, strict=True)):
        left, top = GAP + number % COLUMNS * (SIDE + GAP), int(tops[number // COLUMNS])
        pasted.paste(image, (left, top + CAPTION))
        colour = colours.text if true == guess else colours.wrong
        caption, position = f"truth {true}\npredicted {guess}", (left / size[0], 1 - (top + CAPTION - 8) / size[1])
        figure.text(*position, caption, color=colour, fontsize=8, va="bottom")
    figure.figimage(np.asarray(pasted))
    save(figure, target, colours)


def _make_panels(colours: Theme) -> tuple["Figure", list["Axes"]]:
    figure = new_figure(colours, (9.6, 6.0))
    return figure, list(figure.subplots(2, 2).flat)


def _plot_line(
    axis: "Axes", log: Mapping[str, np.ndarray], column: str, colour: str, label: str, alpha: float = 1.0
) -> None:
    from matplotlib.ticker import MaxNLocator

    values = log.get(column, np.array([]))
    known = np.isfinite(values)
    if known.any():
        marker = "o" if known.sum() <= 15 else ""
        axis.plot(
            log["epoch"][known],
            values[known],
            color=colour,
            label=label,
            alpha=alpha,
            linewidth=2,
            marker=marker,
            markersize=4,
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _mark_best(axis: "Axes", log: Mapping[str, np.ndarray], colours: Theme) -> None:
    values = log.get("val_logloss", np.array([]))
    if not np.isfinite(values).any():
        return
    best = int(np.nanargmin(values))
    axis.plot(
        log["epoch"][best], values[best], "o", markersize=8, color=colours.second, markeredgecolor=colours.surface
    )
    axis.text(
        0.98,
        0.94,
        f"best {values[best]:.4f}, epoch {log['epoch'][best]:.0f}",
        color=colours.text,
        fontsize=9.5,
        ha="right",
        va="top",
        transform=axis.transAxes,
    )


def _draw_shades(axis: "Axes", values: np.ndarray, ends: tuple[str, str]) -> "AxesImage":
    from matplotlib.colors import LinearSegmentedColormap

    return axis.imshow(values, LinearSegmentedColormap.from_list("", ends), vmin=0, vmax=1, interpolation="nearest")


def _full_scale(shares: np.ndarray, hits: np.ndarray) -> float:
    """Return the share that gets the full colour: the largest confusion, but at least a tenth, so that few errors stay pale."""
    return max(float(shares[~hits].max(initial=0)), 0.1)


def _draw_colour_bar(figure: "Figure", axis: "Axes", picture: "AxesImage", full: float, colours: Theme) -> None:
    steps = np.array([0, 0.1, 0.25, 0.5, 1])
    bar = figure.colorbar(picture, ax=axis, shrink=0.6, aspect=28, pad=0.02, ticks=np.sqrt(steps))
    bar.ax.set_yticklabels([f"{100 * full * step:.3g} %" for step in steps], color=colours.quiet, fontsize=8)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label("confusions, share of the true class", color=colours.quiet, fontsize=9)


def _set_class_ticks(axis: "Axes", classes: Sequence[str], colours: Theme) -> None:
    if len(classes) > MAX_NAMED:
        return
    ticks, names = np.arange(len(classes)), printable_labels(classes, range(len(classes)))
    axis.set_yticks(ticks, names)
    level = len(classes) <= 12 and max(len(name) for name in names) <= 3
    axis.set_xticks(ticks, names, rotation=0 if level else 90)
    between = ticks[1:] - 0.5
    axis.set_xticks(between, minor=True)
    axis.set_yticks(between, minor=True)
    axis.grid(which="minor", color=colours.grid, linewidth=0.8)
    axis.tick_params(which="minor", length=0)


def _write_counts(axis: "Axes", matrix: np.ndarray, shown: np.ndarray, colours: Theme) -> None:
    size = 8 if matrix.max(initial=0) < 10_000 else 6
    for row, column in np.argwhere(matrix > 0):
        colour = colours.surface if shown[row, column] > 0.6 else colours.text
        axis.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", fontsize=size, color=colour)


def _wrap(text: str) -> list[str]:
    """Wrap `text` into lines of at most MAX_LINE_CELLS cells, if possible after a blank, `_`, `-` or `.`."""
    lines, line = [], ""
    for piece in re.findall(r"[^ _.-]*[ _.-]*", text):
        while _width(piece) > MAX_LINE_CELLS:
            piece, cut = piece[MAX_LINE_CELLS // 2 :], piece[: MAX_LINE_CELLS // 2]
            lines += [line, cut] if line else [cut]
            line = ""
        if line and _width(line + piece) > MAX_LINE_CELLS:
            lines, line = [*lines, line], ""
        line += piece
    return [wrapped.rstrip() for wrapped in [*lines, line] if wrapped.strip()]


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _column(figures: Sequence[Mapping[str, float | None]], name: str) -> np.ndarray:
    return np.array([np.nan if row.get(name) is None else row[name] for row in figures], dtype=np.float64)


def _draw_bars(axis: "Axes", colours: Theme, title: str, across: str, values: np.ndarray, colour: str) -> None:
    """Draw bars from 0, with each figure at the panel's right edge, where nothing covers it."""
    style(axis, colours, title, across)
    axis.grid(False, axis="y")
    axis.barh(np.arange(len(values)), np.nan_to_num(values), 0.6, color=colour)
    for row, value in enumerate(values):
        text = "–" if np.isnan(value) else f"{value:.4f}"
        axis.text(1.02, row, text, color=colours.text, fontsize=9.5, va="center", transform=axis.get_yaxis_transform())


def _draw_heat_map(axis: "Axes", colours: Theme, title: str, values: np.ndarray) -> None:
    """Draw a heat map: almost the background colour for the lowest value of a pair, full colour for 1."""
    from matplotlib.colors import LinearSegmentedColormap

    others = values[~np.eye(len(values), dtype=bool)]
    low = min(float(np.nanmin(others, initial=1.0)), 0.98)
    low -= 0.15 * (1 - low)
    shades = LinearSegmentedColormap.from_list("", (colours.surface, colours.accent))
    axis.imshow(np.ma.masked_invalid(values), shades, vmin=low, vmax=1, interpolation="nearest")
    style(axis, colours, title, "")
    axis.grid(False)
    for row, column in np.ndindex(*values.shape) if len(values) <= MAX_WRITTEN else ():
        value = values[row, column]
        ink = colours.surface if (value - low) / (1 - low) > 0.7 else colours.text
        text = "–" if np.isnan(value) else f"{value:.3f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=8.5, color=ink)


def _fit(image: np.ndarray) -> Image.Image:
    """Resize the image to a longer side of SIDE pixels."""
    scale = SIDE / max(image.shape[:2])
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    filter_ = Image.Resampling.NEAREST if scale >= MIN_SQUARE_SCALE else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize((width, height), filter_)


def new_figure(colours: Theme, inches: tuple[float, float]) -> "Figure":
    """Create an empty figure with automatic layout."""
    figure = fixed_canvas(colours, inches)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return figure


def fixed_canvas(colours: Theme, inches: tuple[float, float]) -> "Figure":
    """Create an empty figure with fixed positions."""
    from matplotlib.figure import Figure

    return Figure(figsize=inches, dpi=DPI, facecolor=colours.surface)


def style(axis: "Axes", colours: Theme, title: str, xlabel: str, ylabel: str = "") -> None:
    """Set the colours of `axis`, a title at the left, and the labels of the x axis (`xlabel`) and the y axis (`ylabel`)."""
    axis.set_facecolor(colours.surface)
    axis.set_title(title, color=colours.text, fontsize=11, fontweight="bold", loc="left")
    axis.set_xlabel(xlabel, color=colours.quiet, fontsize=9)
    axis.set_ylabel(ylabel, color=colours.quiet, fontsize=9)
    axis.tick_params(colors=colours.quiet, labelsize=8.5, length=0)
    axis.grid(color=colours.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    for name, spine in axis.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(colours.quiet)


def legend(axis: "Axes", colours: Theme) -> None:
    """Draw the legend in one row above the axes, at the right, where it covers no data."""
    if axis.get_legend_handles_labels()[0]:
        position = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "columnspacing": 1.2}
        axis.legend(frameon=False, labelcolor=colours.text, fontsize=9, ncols=3, handlelength=1.4, **position)


def printable_labels(names: Sequence[str], numbers: Sequence[int], max_length: int = 24) -> list[str]:
    """Return `names` cut to `max_length` characters, with `$` escaped; `#number` for a name that no font can draw."""
    covered = _covered_characters()
    return [
        (name if len(name) <= max_length else name[: max_length - 1] + "…").replace("$", r"\$")
        if all(ord(character) in covered for character in name)
        else f"#{number}"
        for name, number in zip(names, numbers, strict=True)
    ]


def _covered_characters() -> set[int]:
    """Return the code points that the fonts of a plot can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return {point for name in _font_families() for point in get_font(findfont(FontProperties(name))).get_charmap()}


def _font_families() -> list[str]:
    from matplotlib.font_manager import fontManager

    known = set(fontManager.get_font_names())
    return ["DejaVu Sans", *[name for name in FONTS if name in known][:1]]


def save(figure: "Figure", target: Target, colours: Theme) -> None:
    """Write `figure` as a PNG with reproducible bytes; text that is not ASCII gets a font with Hangul."""
    from matplotlib.text import Text

    for text in figure.findobj(lambda artist: isinstance(artist, Text) and not artist.get_text().isascii()):
        text.set_fontfamily(_font_families())
    # The format is explicit because a temporary file has no extension; without metadata the bytes are reproducible.
    options = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": COMPRESSION}}
    figure.savefig(target, format="png", dpi=DPI, facecolor=colours.surface, **options)


THEMES = {
    "light": Theme(
        surface="#ffffff",
        text="#1c2430",
        quiet="#6b7686",
        grid="#e8ebf0",
        accent="#2f6fde",
        second="#e08a1e",
        wrong="#d6455d",
        series=("#2f6fde", "#e08a1e", "#1c9b78", "#d6455d", "#8a5bd6", "#5f6b7a", "#b8860b", "#2aa5c7"),
    ),
    "dark": Theme(
        surface="#171c25",
        text="#e8ecf2",
        quiet="#93a0b2",
        grid="#2a3240",
        accent="#6ba1ff",
        second="#f2ae55",
        wrong="#f27a8c",
        series=("#6ba1ff", "#f2ae55", "#45c9a2", "#f27a8c", "#b592f5", "#9aa7b8", "#d9bd4a", "#57cbe8"),
    ),
}
