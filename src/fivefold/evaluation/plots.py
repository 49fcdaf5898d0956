"""Plots of scores, comparisons and images by matplotlib (imported lazily, without a display).

Every plot function writes a PNG to `target`, a path or a binary file.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image

from fivefold.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Target = Path | BinaryIO
DPI = 160
COMPRESSION = 3
"""zlib level: takes half the time of the default 6, for a few percent more bytes."""
FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "AppleGothic", "Noto Sans CJK JP", "WenQuanYi Zen Hei")
"""Fonts with Hangul and Han; if none is installed, such names are replaced by their number."""
MAX_NAMED = 40
"""Maximum number of classes or experiments for names beside a matrix."""
MAX_WRITTEN = 16
"""Maximum number of classes or experiments for figures in a matrix's cells."""
MAX_NAME_LENGTH = 24
MAX_IMAGES = 16
COLUMNS = 4
"""Images in a row of an image grid."""
SIDE, GRID_DPI = 240, 110
"""Longer side of the images of a grid, in pixels, and its resolution."""

SURFACE, TEXT, QUIET, GRID = "#ffffff", "#1c2430", "#6b7686", "#e8ebf0"
ACCENT, SECOND, WRONG = "#2f6fde", "#e08a1e", "#d6455d"
SERIES = (ACCENT, SECOND, "#1c9b78", WRONG, "#8a5bd6", "#5f6b7a", "#b8860b", "#2aa5c7")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "grid.color": GRID,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": TEXT,
    "text.parse_math": False,
    "xtick.color": QUIET,
    "xtick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.color": QUIET,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0,
}
CURVES = {
    "Loss (dashed: training)": ("train_loss", "val_loss"),
    "Accuracy (dashed: training)": ("train_acc", "val_acc"),
    "Validation log loss": ("val_logloss",),
    "Learning rate": ("lr",),
}


def plot_training_curves(logs: Mapping[str, Path], target: Target) -> None:
    """Plot loss, accuracy, log loss and learning rate by epoch, from the `train_log.csv` of each model by name.

    Empty cells (no validation rows) are skipped. A large dot marks the lowest log loss of each model.
    """
    tables = {}
    for name, path in logs.items():
        try:
            tables[name] = pd.read_csv(path, dtype=np.float64, index_col=False)
        except ValueError as error:
            raise DataError(f"{path} is not a training log: {error}") from error
    with _new_figure(target, (9.6, 6.0)) as figure:
        axes = figure.subplots(2, 2).flat
        for axis, (title, columns) in zip(axes, CURVES.items(), strict=True):
            axis.set(title=title, xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            for (name, log), colour in zip(tables.items(), cycle(SERIES), strict=False):
                for column in columns:
                    _plot_curve(axis, log[["epoch", column]].dropna(), colour, name)
        if 1 < len(tables) <= len(SERIES):
            handles = [axes[1].plot([], [], color=colour)[0] for _, colour in zip(tables, SERIES, strict=False)]
            figure.legend(handles, list(tables), loc="outside lower center", ncols=6)


def _plot_curve(axis: "Axes", values: pd.DataFrame, colour: str, name: str) -> None:
    """Plot the second column of `values` by the first one, dashed for training."""
    column = values.columns[1]
    line = "--" if column.startswith("train") else "-"
    axis.plot(*values.to_numpy().T, line, color=colour, marker="o" if len(values) <= 15 else "", markersize=4)
    if column == "val_logloss" and len(values):
        best = values.loc[values[column].idxmin()]
        axis.plot(*best, "o", markersize=9, color=colour, markeredgecolor=SURFACE)
        axis.annotate(f"{best[column]:.4f}", best, (0, 8), textcoords="offset points", ha="center", color=colour)


def plot_confusion(matrix: np.ndarray, classes: Sequence[str], target: Target) -> None:
    """Plot the confusion matrix [C, C]: hits in one colour, confusions in another, as shares of the true class."""
    from matplotlib.colors import PowerNorm

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    hits = np.eye(len(classes), dtype=bool)
    # The largest confusion gets the full colour, but at least a tenth does, so that few errors stay pale.
    full = max(float(shares[~hits].max(initial=0)), 0.1)
    # With many classes a rare confusion is a single pixel: the square root keeps it visible.
    scales = PowerNorm(0.5, 0, 1), PowerNorm(0.5, 0, full)
    side = 4.0 + min(len(classes), MAX_NAMED) * 0.15
    with _new_figure(target, (side + 1.0, side)) as figure:
        axis = figure.subplots()
        axis.set(xlabel="predicted", ylabel="true")
        axis.grid(False)
        axis.imshow(np.ma.masked_where(~hits, shares), _shades(ACCENT), scales[0], interpolation="nearest")
        confusions = np.ma.masked_where(hits, shares)
        picture = axis.imshow(confusions, _shades(WRONG), scales[1], interpolation="nearest")
        label = "confusions, share of the true class"
        figure.colorbar(picture, ax=axis, shrink=0.6, aspect=28, pad=0.02, label=label, format="{x:.2g}")
        if len(classes) <= MAX_NAMED:
            names = printable_labels(classes, range(len(classes)))
            axis.set_yticks(range(len(classes)), names)
            axis.set_xticks(range(len(classes)), names, rotation=90 if max(map(len, names)) > 3 else 0)
        counts = np.array([[f"{count:,}" if count else "" for count in row] for row in matrix])
        _write_cells(axis, counts, np.sqrt(np.where(hits, shares, shares / full)))


def plot_reliability(table: Mapping[str, np.ndarray], ece: float, target: Target) -> None:
    """Plot the reliability diagram of `metrics.reliability_table`, and below it the correct and wrong rows of each bin."""
    middle, width = (table["low"] + table["high"]) / 2, 0.86 / len(table["low"])
    correct = np.nan_to_num(table["rows"] * table["accuracy"])
    with _new_figure(target, (6.4, 5.4)) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=[2.4, 1], sharex=True)
        top.set(title=f"ECE {ece:.4f}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        top.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
        top.bar(middle, table["accuracy"], width, color=ACCENT, label="accuracy")
        confidence = table["confidence"]
        top.plot(confidence, confidence, "D", markersize=5, color=SECOND, label="mean confidence")
        top.legend()
        bottom.set(xlabel="confidence", ylabel="rows")
        bottom.bar(middle, correct, width, color=ACCENT, label="correct")
        bottom.bar(middle, table["rows"] - correct, width, correct, color=WRONG, label="wrong")
        bottom.legend()


def plot_scores(names: Sequence[str], figures: Sequence[Mapping[str, float | None]], target: Target) -> None:
    """Plot each experiment's accuracy with its 95 % interval and its log loss, as bars with figures; None if unknown."""
    columns = ["accuracy", "accuracy_low", "accuracy_high", "logloss"]
    accuracy, low, high, logloss = pd.DataFrame(list(figures), columns=columns).to_numpy(np.float64).T
    with _new_figure(target, (9.6, 1.15 + 0.4 * len(names))) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        spread = np.nan_to_num([accuracy - low, high - accuracy])
        _draw_bars(left, "Accuracy", "share of rows, higher is better", accuracy, ACCENT, spread)
        left.set_xlim(0, 1.25)
        _draw_bars(right, "Log loss", "nats per row, lower is better", logloss, SECOND)
        right.set_xlim(0, 1.25 * np.nanmax(logloss, initial=0.01))
        left.set_yticks(range(len(names)), numbered_labels(dict(enumerate(names, start=1))))


def plot_agreement(names: Mapping[int, str], agreement: np.ndarray, correlation: np.ndarray, target: Target) -> None:
    """Plot heat maps [M, M] of the agreement and the correlation of M experiments; `names`: the experiments by number."""
    side = 1.6 + 0.5 * min(len(names), MAX_WRITTEN) + 0.06 * min(max(len(names) - MAX_WRITTEN, 0), MAX_NAMED)
    with _new_figure(target, (2 * side + 2.6, side + 0.8)) as figure:
        axes = figure.subplots(1, 2)
        _draw_heat_map(axes[0], "Agreement of predicted classes", agreement)
        _draw_heat_map(axes[1], "Correlation of probabilities", correlation)
        if len(names) <= MAX_NAMED:
            for axis, labels in zip(axes, (numbered_labels(names), list(names)), strict=True):
                axis.set_yticks(range(len(names)), labels)
                axis.set_xticks(range(len(names)), list(names))


def evenly_spaced(rows: int, limit: int = MAX_IMAGES) -> np.ndarray:
    """Return at most `limit` indices of `rows` rows, evenly spaced, ascending."""
    return np.unique(np.linspace(0, rows - 1, min(rows, limit)).round().astype(np.int64))


def plot_image_grid(images: Sequence[np.ndarray], truth: Sequence[str], guesses: Sequence[str], target: Target) -> None:
    """Plot images (uint8 [H, W, 3], of any size), each below its true and its predicted class; mistakes in another colour."""
    names = zip(*(printable_labels(labels, range(len(images))) for labels in (truth, guesses)), strict=True)
    lines = -(-len(images) // COLUMNS)
    with _new_figure(target, (2.2 * COLUMNS, 2.5 * lines), GRID_DPI) as figure:
        axes = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
        for axis in axes:
            axis.axis("off")
        for axis, image, (true, guess) in zip(axes, images, names, strict=False):
            reduced = Image.fromarray(image)
            reduced.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            axis.imshow(reduced)
            colour = TEXT if true == guess else WRONG
            axis.set_title(f"truth {true}\npredicted {guess}", color=colour, fontsize=8, fontweight="normal")


def numbered_labels(names: Mapping[int, str]) -> list[str]:
    """Return labels `1  name`."""
    labels = printable_labels(list(names.values()), list(names))
    return [f"{number}  {label}" for number, label in zip(names, labels, strict=True)]


def printable_labels(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return `names` cut to MAX_NAME_LENGTH characters; `#number` for a name that no font can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    covered = {point for name in _font_families() for point in get_font(findfont(FontProperties(name))).get_charmap()}
    return [
        (name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…")
        if all(ord(character) in covered for character in name)
        else f"#{number}"
        for name, number in zip(names, numbers, strict=True)
    ]


def _font_families() -> list[str]:
    from matplotlib.font_manager import fontManager

    known = set(fontManager.get_font_names())
    return ["DejaVu Sans", *[name for name in FONTS if name in known][:1]]


@contextmanager
def _new_figure(target: Target, inches: tuple[float, float], dpi: int = DPI) -> Iterator["Figure"]:
    """Yield an empty figure in the common style; then write it as a PNG with reproducible bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "font.family": _font_families()}):
        figure = Figure(figsize=inches, dpi=dpi, facecolor=SURFACE)
        yield figure
        # The format is explicit because a temporary file has no extension; without metadata the bytes are reproducible.
        options = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": COMPRESSION}}
        figure.savefig(target, format="png", dpi=dpi, facecolor=SURFACE, **options)


def _draw_bars(
    axis: "Axes", title: str, label: str, values: np.ndarray, colour: str, spread: np.ndarray | None = None
) -> None:
    """Draw horizontal bars from the top, with error bars `spread` [2, N] and each figure beside its bar; a dash for NaN."""
    axis.set(title=title, xlabel=label, ylim=(len(values) - 0.4, -0.6))
    axis.grid(False, axis="y")
    bars = axis.barh(
        range(len(values)), np.nan_to_num(values), 0.65, xerr=spread, color=colour, ecolor=TEXT, capsize=2.5
    )
    axis.bar_label(bars, ["–" if np.isnan(value) else f"{value:.4f}" for value in values], padding=3, fontsize=8.5)


def _draw_heat_map(axis: "Axes", title: str, values: np.ndarray) -> None:
    """Draw a heat map: almost the background colour for the lowest value of a pair, full colour for 1."""
    others = values[~np.eye(len(values), dtype=bool)]
    low = min(float(np.nanmin(others, initial=1.0)), 0.98)
    low -= 0.15 * (1 - low)
    axis.imshow(np.ma.masked_invalid(values), _shades(ACCENT), vmin=low, vmax=1, interpolation="nearest")
    axis.set_title(title)
    axis.grid(False)
    texts = np.array([["–" if np.isnan(value) else f"{value:.3f}" for value in row] for row in values])
    _write_cells(axis, texts, (values - low) / (1 - low))


def _shades(colour: str) -> object:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", (SURFACE, colour))


def _write_cells(axis: "Axes", texts: np.ndarray, strength: np.ndarray) -> None:
    """Write the `texts` [M, M] into the cells of a small matrix, light where the colour's `strength` [M, M] is high."""
    if len(texts) <= MAX_WRITTEN:
        for (row, column), text in np.ndenumerate(texts):
            colour = SURFACE if strength[row, column] > 0.65 else TEXT
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
