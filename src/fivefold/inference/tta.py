"""Views of a batch at prediction, by name: the same images seen otherwise, and the mean is taken over them.

A view maps images [B, 3, H, W] to images of the same shape. Nothing is drawn at random: two
predictions agree bit by bit. What lies outside an image is its mirror, or for a rotation black, as
it was in training.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.choose import choose
from fivefold.errors import SettingsError
from fivefold.recipe import Spec

Change = Callable[[Tensor], Tensor]


def _as_is(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class View:
    """Images [B, 3, H, W] seen otherwise: first their pixels are `moved`, then new ones are `resampled` from them.

    Moving is the same before and after normalising, and quicker before, on bytes; resampling is done on normalised floats.
    """

    moved: Change = _as_is
    resampled: Change = _as_is

    def __call__(self, normalised: Tensor) -> Tensor:
        """The view of images that are normalised already."""
        return self.resampled(self.moved(normalised))

    def of_mirrored(self) -> "View":
        """The same view of the images mirrored left and right."""
        first = self.moved
        return replace(self, moved=_mirrored if first is _as_is else lambda images: first(_mirrored(images)))


def build_views(specs: Sequence[Spec], black: Tensor | float = 0.0) -> list[View]:
    """The views of `specs`, each a name, or a table with `name` and parameters; five_crops gives five.

    With `flip = true` each is taken of the mirrored images too.
    `black` [1, 3, 1, 1]: a black pixel, normalised. Raises SettingsError for an unknown name or
    parameter, or a value that cannot be.
    """
    views: list[View] = []
    for spec in specs:
        name, given = identity(spec)
        make, _ = VIEWS[name]
        parameters = dict(given)
        mirrored_too = parameters.pop("flip", False)
        made = make(black=black, **parameters) if make in FILLED else make(**parameters)
        views += made + [view.of_mirrored() for view in made if mirrored_too]
    return views


def identity(spec: Spec) -> tuple[str, tuple[tuple[str, Hashable], ...]]:
    """The name of a view with all its parameters, given or default: equal for specs that mean the same."""
    parameters = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(parameters.pop("name", ""))
    _, defaults = choose(VIEWS, "view", name)
    for key in parameters:
        choose(defaults, f"parameter of view {name!r}:", key)
    for key, value in parameters.items():
        _check(name, key, value)
    return name, tuple(sorted({**defaults, **parameters}.items()))


def same_views(first: Sequence[Spec], second: Sequence[Spec]) -> bool:
    """Whether both mean the same views, in whatever order and however they are written."""
    return sorted(map(identity, first)) == sorted(map(identity, second))


def distinct(specs: Sequence[Spec]) -> list[Spec]:
    """The specs in order, of those that mean the same the first."""
    found: dict[Any, Spec] = {}
    for spec in specs:
        found.setdefault(identity(spec), spec)
    return list(found.values())


def plain() -> list[View]:
    """The images as they are."""
    return [View()]


def flip() -> list[View]:
    """Mirrored left and right."""
    return [View(moved=_mirrored)]


def rotate(degrees: float, black: Tensor | float) -> list[View]:
    """Turned by `degrees` counter-clockwise about the centre, bilinear; the corners are black."""
    return [View(resampled=partial(_rotated, degrees=degrees, black=black))]


def shift(x: int, y: int) -> list[View]:
    """Moved by `x` pixels to the right and `y` down; what was left free is mirrored at the edge."""
    return [View(moved=partial(_moved, x=x, y=y))]


def scale(factor: float) -> list[View]:
    """Enlarged by `factor` about the centre; below 1 the smaller image is mirrored at its edges."""
    return [View(resampled=partial(_zoomed, factor=factor))]


def five_crops(share: float) -> list[View]:
    """Five views: the corners and the centre, each `share` of both sides, at the size of the whole."""
    places = ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))
    return [View(resampled=partial(_cropped, share=share, top=top, left=left)) for top, left in places]


def _mirrored(images: Tensor) -> Tensor:
    return images.flip(-1)


def _rotated(images: Tensor, degrees: float, black: Tensor | float) -> Tensor:
    """By coordinates written out, since a product of matrices would lose its last digits under autocast."""
    height, width = images.shape[-2:]
    angle = math.radians(degrees)
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    from_x, from_y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    grid = torch.stack([from_x * 2 / width, from_y * 2 / height], dim=-1).expand(images.shape[0], -1, -1, -1)
    return F.grid_sample(images - black, grid, align_corners=False) + black


def _moved(images: Tensor, x: int, y: int) -> Tensor:
    height, width = images.shape[-2:]
    return _taken(images, range(-y, height - y), range(-x, width - x))


def _zoomed(images: Tensor, factor: float) -> Tensor:
    height, width = images.shape[-2:]
    if factor >= 1:
        return _cropped(images, share=1 / factor, top=0.5, left=0.5)
    smaller = _resized(images, max(1, round(height * factor)), max(1, round(width * factor)))
    top, left = (height - smaller.shape[-2]) // 2, (width - smaller.shape[-1]) // 2
    return _taken(smaller, range(-top, height - top), range(-left, width - left))


def _cropped(images: Tensor, share: float, top: float, left: float) -> Tensor:
    """The box of `share` of both sides that lies `top` and `left` (0 to 1) of the free way from the corner."""
    height, width = images.shape[-2:]
    h, w = max(1, round(height * share)), max(1, round(width * share))
    y, x = int((height - h) * top), int((width - w) * left)
    return _resized(images[..., y : y + h, x : x + w], height, width)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def _taken(images: Tensor, rows: range, columns: range) -> Tensor:
    """The pixels at `rows` and `columns`, which may lie outside: there the image is mirrored, its edge not repeated.

    What lies inside is copied as a block, in a quarter of the time that looking up each float takes and an eighth of each byte's; the
    memory format stays.
    """
    if images.is_contiguous(memory_format=torch.channels_last):
        return _along(_along(images.permute(0, 2, 3, 1), 1, rows), 2, columns).permute(0, 3, 1, 2)
    return _along(_along(images, 2, rows), 3, columns)


def _along(images: Tensor, dim: int, at: range) -> Tensor:
    """The images at the positions `at` of a dimension."""
    size = images.shape[dim]
    start, stop = (min(max(end, 0), size) for end in (at.start, at.stop))
    if (start, stop) == (at.start, at.stop) == (0, size):
        return images
    beyond = ((at.start, max(at.start, min(at.stop, 0))), (min(at.stop, max(at.start, size)), at.stop))
    # made on the device: a copy of them would wait for it
    mirrored = (reflected(torch.arange(*ends, device=images.device), size) for ends in beyond)
    first, last = (images.index_select(dim, ends) for ends in mirrored)
    return torch.cat([first, images.narrow(dim, start, stop - start), last], dim)


def reflected(at: Tensor, size: int) -> Tensor:
    """Positions in 0 to size - 1 for any whole positions: mirrored at the ends, which are not repeated."""
    last = max(1, size - 1)
    return (last - (at % (2 * last) - last).abs()).clamp(max=size - 1)


def _check(view: str, name: str, value: object) -> None:
    """Raises a SettingsError for a value that the parameter `name` cannot have."""
    if name == "flip":
        if not isinstance(value, bool):
            raise SettingsError(f"view {view!r}: flip={value!r}, but true or false is needed")
        return
    kind, least, most = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        number = "whole number" if kind is int else "number"
        raise SettingsError(f"view {view!r}: {name}={value!r}, but a {number} from {least:g} to {most:g} is needed")


VIEWS: dict[str, tuple[Callable[..., list[View]], dict[str, float]]] = {
    "plain": (plain, {}),
    "flip": (flip, {}),
    "rotate": (rotate, {"degrees": 15, "flip": False}),
    "shift": (shift, {"x": 1, "y": 1, "flip": False}),
    "scale": (scale, {"factor": 1.1, "flip": False}),
    "five_crops": (five_crops, {"share": 0.875, "flip": False}),
}
"""Each view with its parameters' defaults."""

FILLED = {rotate}
BOUNDS: dict[str, tuple[type, float, float]] = {
    "degrees": (int | float, -360, 360),
    "x": (int, -4096, 4096),
    "y": (int, -4096, 4096),
    "factor": (int | float, 0.25, 4),
    "share": (int | float, 0.05, 1),
}
