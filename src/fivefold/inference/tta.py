"""Test-time augmentation: named views of a batch; predictions are averaged over the views.

Views are deterministic: two predictions are equal bit by bit. Pixels outside an image are mirrored, or black for a
rotation, as in training.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.config.schema import Spec
from fivefold.errors import SettingsError
from fivefold.lookup import choose, parse_spec

View = Callable[[Tensor], Tensor]
"""A transform of normalised images [B, 3, H, W] that keeps their shape and memory format."""


def build_views(specs: Sequence[Spec], black: Tensor | float = 0.0) -> list[View]:
    """Build the views of `specs`; each spec is a name, or a table with `name` and parameters. five_crops makes five views.

    `flip = true` adds each view of the mirrored images. `black` [1, 3, 1, 1]: a black pixel, normalised.
    Raise a SettingsError for an unknown name or parameter, or an invalid value.
    """
    views: list[View] = []
    for spec in specs:
        name, items = identity(spec)
        view, _ = VIEWS[name]
        parameters = dict(items) | ({"black": black} if view is rotate else {})
        mirrored_too = parameters.pop("flip", False)
        positions = CROP_POSITIONS if view is crop else [{}]
        new: list[View] = [partial(view, **parameters, **position) for position in positions]
        views += new + [lambda images, view=view: view(mirror(images)) for view in new if mirrored_too]
    return views


def identity(spec: Spec) -> tuple[str, tuple[tuple[str, Hashable], ...]]:
    """Return the view's name with all its parameters, defaults included; equal for specs that mean the same."""
    name, parameters = parse_spec(spec, VIEWS, "view")
    defaults = VIEWS[name][1]
    for key, value in parameters.items():
        choose(defaults, f"parameter of view {name!r}:", key)
        _check(name, key, value)
    return name, tuple(sorted({**defaults, **parameters}.items()))


def views_equal(first: Sequence[Spec], second: Sequence[Spec]) -> bool:
    """Return whether both mean the same views, regardless of order and spelling."""
    return sorted(map(identity, first)) == sorted(map(identity, second))


def deduplicate(specs: Sequence[Spec]) -> list[Spec]:
    """Return the specs in order, only one of those that mean the same."""
    return list({identity(spec): spec for spec in specs}.values())


def mirror(images: Tensor) -> Tensor:
    """Mirror left and right."""
    return images.flip(-1)


def rotate(images: Tensor, degrees: float, black: Tensor | float) -> Tensor:
    """Rotate by `degrees` counter-clockwise about the centre, bilinear; the corners are black.

    The coordinates are explicit, because a matrix product would lose its last digits under autocast.
    """
    height, width = images.shape[-2:]
    angle = math.radians(degrees)
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    from_x, from_y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    grid = torch.stack([from_x * 2 / width, from_y * 2 / height], dim=-1).expand(images.shape[0], -1, -1, -1)
    return F.grid_sample(images - black, grid, align_corners=False) + black


def shift(images: Tensor, x: int, y: int) -> Tensor:
    """Shift by `x` pixels to the right and `y` down; the uncovered border is mirrored at the edge."""
    height, width = images.shape[-2:]
    return _take(images, range(-y, height - y), range(-x, width - x))


def scale(images: Tensor, factor: float) -> Tensor:
    """Scale by `factor` about the centre; below 1 the smaller image is mirrored at its edges."""
    height, width = images.shape[-2:]
    if factor >= 1:
        return crop(images, share=1 / factor, top=0.5, left=0.5)
    smaller = _resize(images, max(1, round(height * factor)), max(1, round(width * factor)))
    top, left = (height - smaller.shape[-2]) // 2, (width - smaller.shape[-1]) // 2
    return _take(smaller, range(-top, height - top), range(-left, width - left))


def crop(images: Tensor, share: float, top: float, left: float) -> Tensor:
    """Crop `share` of both sides, at `top` and `left` (0 to 1) of the free distance from the corner, and resize to full size."""
    height, width = images.shape[-2:]
    h, w = max(1, round(height * share)), max(1, round(width * share))
    y, x = int((height - h) * top), int((width - w) * left)
    return _resize(images[..., y : y + h, x : x + w], height, width)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def _take(images: Tensor, rows: range, columns: range) -> Tensor:
    """Take the pixels at `rows` and `columns`; the memory format stays the same.

    Positions outside the image are mirrored, without repeating the edge.
    """
    if images.is_contiguous(memory_format=torch.channels_last):
        return _take_along(_take_along(images.permute(0, 2, 3, 1), 1, rows), 2, columns).permute(0, 3, 1, 2)
    return _take_along(_take_along(images, 2, rows), 3, columns)


def _take_along(images: Tensor, dim: int, positions: range) -> Tensor:
    # Created on the device: copying the positions would synchronise with it.
    index = torch.arange(positions.start, positions.stop, device=images.device)
    last = max(1, images.shape[dim] - 1)
    mirrored = (last - (index % (2 * last) - last).abs()).clamp(max=images.shape[dim] - 1)
    return images.index_select(dim, mirrored)


def _check(view: str, name: str, value: object) -> None:
    """Raise a SettingsError for an invalid value of the parameter `name`."""
    if name == "flip":
        if not isinstance(value, bool):
            raise SettingsError(f"view {view!r}: flip={value!r}, but it must be true or false")
        return
    kind, low, high = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        number = "whole number" if kind is int else "number"
        raise SettingsError(f"view {view!r}: {name}={value!r}, but it must be a {number} from {low:g} to {high:g}")


VIEWS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "plain": (lambda images: images, {}),
    "flip": (mirror, {}),
    "rotate": (rotate, {"degrees": 15, "flip": False}),
    "shift": (shift, {"x": 1, "y": 1, "flip": False}),
    "scale": (scale, {"factor": 1.1, "flip": False}),
    "five_crops": (crop, {"share": 0.875, "flip": False}),
}
"""Each view's function and its parameters' defaults."""

CROP_POSITIONS = [{"top": y, "left": x} for y, x in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
"""The corners and the centre."""
BOUNDS: dict[str, tuple[type, float, float]] = {
    "degrees": (int | float, -360, 360),
    "x": (int, -4096, 4096),
    "y": (int, -4096, 4096),
    "factor": (int | float, 0.25, 4),
    "share": (int | float, 0.05, 1),
}
