"""The look of a picture: colours, fonts, axes and files, in one place. matplotlib is imported late."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Target = Path | BinaryIO
DPI = 160
COMPRESSION = 3
"""zlib's level: half the time of 6, its default, for a few percent more bytes."""
FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "AppleGothic", "Noto Sans CJK JP", "WenQuanYi Zen Hei")
"""Fonts with Hangul and Han; without any of them such classes are shown by their number."""


@dataclass(frozen=True)
class Theme:
    """Colours of a picture: surface, text, quiet text, grid, and those of the data."""

    surface: str
    text: str
    quiet: str
    grid: str
    accent: str
    second: str
    wrong: str
    series: tuple[str, ...]


def blank(colours: Theme, inches: tuple[float, float]) -> "Figure":
    """An empty figure that lays its parts out by itself."""
    figure = canvas(colours, inches)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return figure


def canvas(colours: Theme, inches: tuple[float, float]) -> "Figure":
    """An empty figure whose parts stay where they are put."""
    from matplotlib.figure import Figure

    return Figure(figsize=inches, dpi=DPI, facecolor=colours.surface)


def style(axis: "Axes", colours: Theme, title: str, across: str, up: str = "") -> None:
    """Gives `axis` its colours, a title at the left, and the labels of what goes across and up."""
    axis.set_facecolor(colours.surface)
    axis.set_title(title, color=colours.text, fontsize=11, fontweight="bold", loc="left")
    axis.set_xlabel(across, color=colours.quiet, fontsize=9)
    axis.set_ylabel(up, color=colours.quiet, fontsize=9)
    axis.tick_params(colors=colours.quiet, labelsize=8.5, length=0)
    axis.grid(color=colours.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    for name, spine in axis.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(colours.quiet)


def legend(axis: "Axes", colours: Theme) -> None:
    """A legend in one row above the axes, at the right, where it hides no data."""
    if axis.get_legend_handles_labels()[0]:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "columnspacing": 1.2}
        axis.legend(frameon=False, labelcolor=colours.text, fontsize=9, ncols=3, handlelength=1.4, **place)


def drawable(names: Sequence[str], numbers: Sequence[int], most: int = 24) -> list[str]:
    """`names`, cut to `most` characters and with `$` kept literal; the number of one that no font can draw."""
    covered = _covered_characters()
    return [
        (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")
        if all(ord(character) in covered for character in name)
        else f"#{number}"
        for name, number in zip(names, numbers, strict=True)
    ]


def _covered_characters() -> set[int]:
    """The code points that one of the fonts of a picture can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return {point for name in _families() for point in get_font(findfont(FontProperties(name))).get_charmap()}


def _families() -> list[str]:
    from matplotlib.font_manager import fontManager

    known = set(fontManager.get_font_names())
    return ["DejaVu Sans", *[name for name in FONTS if name in known][:1]]


def save(figure: "Figure", target: Target, colours: Theme) -> None:
    """Writes `figure` as PNG, always with the same bytes; a font with Hangul for text that needs one."""
    from matplotlib.text import Text

    for text in figure.findobj(lambda artist: isinstance(artist, Text) and not artist.get_text().isascii()):
        text.set_fontfamily(_families())
    # The extension of a temporary file says nothing, and no metadata keeps the bytes the same.
    written = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": COMPRESSION}}
    figure.savefig(target, format="png", dpi=DPI, facecolor=colours.surface, **written)


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
