"""Boxes of many images resized at once, in whole numbers: on any device the bytes that `transforms.resize` gives on a CPU.

torch resizes uint8 images on CPUs in integers, as Pillow does: each output pixel is a sum of the pixels below a triangle,
weights rounded to 16 bits, along rows first and rounded to uint8, then along columns. Integer sums have no rounding of
their own, so the same weights give the same bytes whoever adds, in whatever order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BITS = 22
"""Weights are multiples of 2^-b, of the largest b up to this by which the largest weight stays below 2^15."""


@dataclass(frozen=True)
class Boxes:
    """A box in each of B images, and what is seen of it once it is resized: int64 on the device.

    `origin` [B]: the box's first pixel among all pixels; `stride` [B]: pixels from one row of its image to the next;
    `height`, `width` [B] of the box; `rows` [B, h] and `columns` [B, w] of the resized box, -1: black.
    `tallest`, `widest`: the largest box's sides. `size`: (h, w) that boxes are resized to.
    """

    origin: Tensor
    stride: Tensor
    height: Tensor
    width: Tensor
    rows: Tensor
    columns: Tensor
    tallest: int
    widest: int
    size: tuple[int, int]


def resampled(pixels: Tensor, boxes: Boxes) -> Tensor:
    """uint8 images [B, 3, h, w], channels last in memory, of `pixels` uint8 [P, 3]: all images, row after row."""
    across = Taps.of(boxes.width, boxes.columns, boxes.size[1], boxes.widest)
    down = Taps.of(boxes.height, boxes.rows, boxes.size[0], boxes.tallest)
    lines = torch.arange(boxes.tallest, device=pixels.device).minimum(boxes.height[:, None] - 1)
    lines = boxes.origin[:, None] + lines * boxes.stride[:, None]
    narrow = _summed(lambda k: pixels[lines[:, :, None] + across.at[k][:, None, :]], across.weights[:, :, None, :])
    narrow = _rounded(narrow, across.bits)
    image = torch.arange(len(lines), device=pixels.device)[:, None]
    found = _summed(lambda k: narrow[image, down.at[k]], down.weights[..., None])
    return _rounded(found, down.bits).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Taps:
    """Along one side of B boxes, for each of n pixels that are seen the K pixels it is a sum of.

    `at` int64 [K, B, n]: which of the box; `weights` int32 [K, B, n], multiples of 2^-`bits` (int32 [B]).
    """

    at: Tensor
    weights: Tensor
    bits: Tensor

    @classmethod
    def of(cls, lengths: Tensor, order: Tensor, size: int, longest: int) -> "Taps":
        """Of boxes `lengths` [B] long, at most `longest`, resized to `size`, of which `order` [B, n] is seen; -1: black."""
        shares, at = _triangles(lengths, size, longest)
        most = shares.amax(dim=(0, 2))
        tried = torch.arange(1, MOST_BITS + 1, device=lengths.device)
        bits = ((0.5 + most[:, None] * 2**tried).floor() < 2**15).sum(dim=1)
        weights = (0.5 + shares * (2**bits)[None, :, None]).floor().to(torch.int32)
        seen = order.clamp(min=0).expand(len(at), -1, -1)
        return cls(at.gather(2, seen), weights.gather(2, seen) * (order >= 0), bits.to(torch.int32))


def _triangles(lengths: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Shares float64 [K, B, size] of the pixels, and which they are, int64 [K, B, size]."""
    scale = (lengths.double() / size)[:, None]
    reach = scale.clamp(min=1)
    centre = scale * (torch.arange(size, device=lengths.device) + 0.5)
    first = (centre - reach + 0.5).long().clamp(min=0)
    end = (centre + reach + 0.5).long().minimum(lengths[:, None])
    taps = torch.arange(count_taps(longest, size), device=lengths.device)[:, None, None]
    at = first + taps
    shares = (1 - ((at - centre + 0.5) * (1 / reach)).abs()).clamp(min=0) * (at < end)
    return shares / shares.sum(dim=0), at.minimum(lengths[:, None] - 1)


def count_taps(length: int, size: int) -> int:
    """The most pixels that one is a sum of, where `length` pixels are resized to `size`."""
    return 2 * -(-max(length, size) // size) + 1


def _summed(pixels: Callable[[int], Tensor], weights: Tensor) -> Tensor:
    """The sum of `pixels(k)` uint8 [B, i, j, 3], each times `weights[k]` int32, broadcast before the colours: int32."""
    total = pixels(0) * weights[0][..., None]
    for k in range(1, len(weights)):
        total.addcmul_(pixels(k), weights[k][..., None])
    return total


def _rounded(total: Tensor, bits: Tensor) -> Tensor:
    """Sums [B, i, j, 3] of weights that are multiples of 2^-bits, as uint8."""
    bits = bits[:, None, None, None]
    half = 1 << (bits - 1)
    return total.add_(half).bitwise_right_shift_(bits).clamp_(0, 255).to(torch.uint8)
