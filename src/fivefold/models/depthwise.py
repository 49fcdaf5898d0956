"""The gradients of depthwise convolutions on CPUs, in float32, by what is fast there.

The gradient of the images is a depthwise convolution too, with the kernel turned round, and runs in
the kernel of the forward pass. That of a large kernel on a small map is a product of matrices for each
channel: gradient rows times image rows, summed along the diagonals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_KERNEL, WIDEST_MAP = 5, 16
"""Where the product of matrices is the faster one: at least so many pixels of kernel, at most so many of map."""


def may_gain(convolution: nn.Conv2d) -> bool:
    """Whether it is a depthwise convolution of the plain kind: stride 1, no dilation, padded by zeros or not at all."""
    depthwise = convolution.groups == convolution.in_channels == convolution.out_channels
    plain = convolution.stride == convolution.dilation == (1, 1) and convolution.padding_mode == "zeros"
    return depthwise and plain and not isinstance(convolution.padding, str) and _is_narrow(convolution)


def _is_narrow(convolution: nn.Conv2d) -> bool:
    return all(p < k for p, k in zip(convolution.padding, convolution.kernel_size, strict=True))


class Depthwise(torch.autograd.Function):
    """conv2d(images [B, C, H, W], weight [C, 1, k, l], bias [C] or None) of C groups, stride 1, padded by `padding`."""

    @staticmethod
    def forward(ctx, images, weight, bias, padding):
        ctx.save_for_backward(images, weight)
        ctx.padding, ctx.has_bias = padding, bias is not None
        return F.conv2d(images, weight, bias, 1, padding, 1, len(weight))

    @staticmethod
    def backward(ctx, grad):
        images, weight = ctx.saved_tensors
        back = tuple(kernel - 1 - padding for kernel, padding in zip(weight.shape[2:], ctx.padding, strict=True))
        to_images = (
            F.conv2d(grad, weight.flip(2, 3), None, 1, back, 1, len(weight)) if ctx.needs_input_grad[0] else None
        )
        to_weight = _to_weight(images, weight, grad, ctx.padding) if ctx.needs_input_grad[1] else None
        return to_images, to_weight, grad.sum(dim=(0, 2, 3)) if ctx.has_bias else None, None


def _to_weight(images: Tensor, weight: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    if min(weight.shape[2:]) >= SMALLEST_KERNEL and grad.shape[-1] <= WIDEST_MAP:
        return _by_products(images, weight, grad, padding)
    geometry = ([1, 1], list(padding), [1, 1], False, [0, 0], len(weight))
    return torch.ops.aten.convolution_backward(grad, images, weight, None, *geometry, [False, True, False])[1]


def _by_products(images: Tensor, weight: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    """Σ over images and pixels of grad · the pixel that each place of the kernel saw: [C, 1, k, l].

    Images and gradient lie by channel, all padded rows of all images one below the other; the gradient's rows that
    padding adds are zero. So the rows that line i of the kernel saw are those from i on, and the product of both,
    [columns of the gradient, columns of the images], holds place j of the line on its j-th diagonal.
    """
    channels, _, lines, places = weight.shape
    count, _, height, width = images.shape
    tall, wide = height + 2 * padding[0], width + 2 * padding[1]
    rows = images.new_zeros(channels, count * tall + lines - 1, wide)
    seen = rows[:, : count * tall].view(channels, count, tall, wide)
    seen[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = images.transpose(0, 1)
    given = grad.new_zeros(channels, count, tall, grad.shape[3])
    given[:, :, : grad.shape[2]] = grad.transpose(0, 1)
    columns = given.view(channels, count * tall, -1).transpose(1, 2)
    found = [_diagonals(torch.bmm(columns, rows[:, line : line + count * tall]), places) for line in range(lines)]
    return torch.stack(found, dim=1).unsqueeze(1)


def _diagonals(products: Tensor, count: int) -> Tensor:
    """The sums of the main diagonal and those right of it [C, count], of products [C, W, W + count - 1]."""
    channel, row, _ = products.stride()
    return products.as_strided((len(products), products.shape[1], count), (channel, row + 1, 1)).sum(dim=1)
