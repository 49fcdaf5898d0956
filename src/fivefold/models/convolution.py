"""Convolutions whose weight gradient is one matrix product: faster where the feature maps are small.

On CPUs with bf16 units, oneDNN computes the weight gradient of a convolution over a few pixels and
many channels at a tenth of the speed of its other two passes. The same sum as a matrix product
[out, B·h·w] @ [B·h·w, k·k·in] of gathered patches runs at theirs: 3x3, 256 channels, 3x3 pixels, batch
64: 6.3 -> 0.9 ms on one core.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_MAP = 64
"""Output pixels up to which gathering the patches costs less than it saves."""
FEWEST_CHANNELS = 128


class MatmulGradConv2d(nn.Conv2d):
    """An nn.Conv2d of one group; under bf16 autocast on a CPU, small maps get their weight gradient by a matrix product."""

    def forward(self, images: Tensor) -> Tensor:
        if not (self.training and torch.is_autocast_enabled("cpu") and self._is_small(images)):
            return super().forward(images)
        bias = None if self.bias is None else self.bias.bfloat16()
        return _Convolve.apply(images.bfloat16(), self.weight.bfloat16(), bias, self.stride, self.padding)

    def _is_small(self, images: Tensor) -> bool:
        sizes = zip(images.shape[-2:], self.padding, self.kernel_size, self.stride, strict=True)
        pixels = [(size + 2 * padding - kernel) // stride + 1 for size, padding, kernel, stride in sizes]
        return pixels[0] * pixels[1] <= LARGEST_MAP


def quicken(network: nn.Module) -> nn.Module:
    """The network with each convolution that may gain made a MatmulGradConv2d; parameters and their names stay."""
    for name, child in network.named_children():
        if type(child) is nn.Conv2d and _may_gain(child):
            setattr(network, name, _converted(child))
        else:
            quicken(child)
    return network


def _may_gain(convolution: nn.Conv2d) -> bool:
    plain = convolution.groups == 1 and convolution.dilation == (1, 1) and convolution.padding_mode == "zeros"
    wide = min(convolution.in_channels, convolution.out_channels) >= FEWEST_CHANNELS
    return plain and wide and convolution.kernel_size != (1, 1) and not isinstance(convolution.padding, str)


def _converted(convolution: nn.Conv2d) -> MatmulGradConv2d:
    """The same parameters, hooks and mode under another class."""
    made = MatmulGradConv2d.__new__(MatmulGradConv2d)
    made.__dict__ = convolution.__dict__
    return made


class _Convolve(torch.autograd.Function):
    """conv2d(images [B, I, H, W], weight [O, I, k, l], bias [O]), all bf16."""

    @staticmethod
    def forward(ctx, images, weight, bias, stride, padding):
        ctx.save_for_backward(images, weight)
        ctx.geometry, ctx.has_bias = (stride, padding), bias is not None
        return F.conv2d(images, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        images, weight = ctx.saved_tensors
        stride, padding = ctx.geometry
        to_images = None
        if ctx.needs_input_grad[0]:
            to_images = torch.nn.grad.conv2d_input(images.shape, weight, grad, stride, padding)
        to_bias = grad.sum(dim=(0, 2, 3)) if ctx.has_bias else None
        return to_images, _weight_gradient(images, weight, grad, stride, padding), to_bias, None, None


def _weight_gradient(
    images: Tensor, weight: Tensor, grad: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Σ over images and pixels of grad ⊗ patch: [O, I, k, l]."""
    outputs, inputs, *kernel = weight.shape
    batch, _, *pixels = grad.shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    image, line, pixel, _ = padded.stride()
    shape = (batch, *pixels, kernel[0], kernel[1] * inputs)
    patches = padded.as_strided(shape, (image, stride[0] * line, stride[1] * pixel, line, 1))
    flat = grad.permute(0, 2, 3, 1).reshape(-1, outputs)
    product = flat.t() @ patches.reshape(len(flat), -1)
    return product.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)
