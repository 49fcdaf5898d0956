"""Depthwise convolutions on CPUs, whose gradients are computed by what is fast there: the kernels of the forward pass.

Of a depthwise convolution oneDNN does the forward pass in fast kernels, whatever the type and the size. Not so its
gradients: those of a wide kernel's weights (7x7, 96 channels, 32 images of 56 pixels, bf16, two cores without AMX: 105 ms
where the forward pass takes 5), and in bf16 those of the images where the stride is 2 (5x5, 144 channels: 106 ms, in float32 20).
But both gradients of stride 1 are depthwise convolutions themselves, of more channels or with the kernel turned round. Those
of another stride or dilation are oneDNN's own in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST_OF_ONEDNN = 3
"""Up to so many columns of kernel oneDNN's own kernels for the weights' gradient are fast (11x1: 4 ms, 1x11: 41, in bf16)."""
IMAGES_AT_ONCE = 8
"""So many images are laid out anew at a time: they stay in the processor's caches."""


class DepthwiseConv2d(nn.Conv2d):
    """An nn.Conv2d with a group for each channel; training on a CPU it has quick gradients, under autocast in its type."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and images.device.type == "cpu"):
            return super()._conv_forward(images, weight, bias)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        bias = None if bias is None else bias.to(dtype)
        return Depthwise.apply(images.to(dtype), weight.to(dtype), bias, self.stride, self.padding, self.dilation)


def quicken_depthwise(network: nn.Module) -> nn.Module:
    """The network with each convolution that `may_gain` made a DepthwiseConv2d; parameters and their names stay."""
    for module in network.modules():
        if may_gain(module):
            module.__class__ = DepthwiseConv2d
    return network


def may_gain(module: nn.Module) -> bool:
    """Whether it is a depthwise convolution of torch's own class, padded by zeros or not at all; a DepthwiseConv2d is one."""
    if type(module) not in (nn.Conv2d, DepthwiseConv2d):
        return False
    depthwise = module.groups == module.in_channels == module.out_channels > 1
    return depthwise and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class Depthwise(torch.autograd.Function):
    """conv2d(images [B, C, H, W], weight [C, 1, k, l], bias [C] or None, stride, padding, dilation) of C groups; one type."""

    @staticmethod
    def forward(ctx, images, weight, bias, stride, padding, dilation):
        ctx.save_for_backward(images, weight)
        ctx.geometry, ctx.has_bias = (stride, padding, dilation), bias is not None
        return F.conv2d(images, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx, grad):
        images, weight = ctx.saved_tensors
        gradients = _by_convolutions if _is_plain(weight, *ctx.geometry) else _by_torch
        to_images, to_weight = gradients(images, weight, grad, ctx.geometry, ctx.needs_input_grad[:2])
        return to_images, to_weight, grad.sum(dim=(0, 2, 3)) if ctx.has_bias else None, None, None, None


Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding and dilation, of lines and columns."""
Gradients = tuple[Tensor | None, Tensor | None]


def _is_plain(weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]) -> bool:
    within = all(pad < size for pad, size in zip(padding, weight.shape[2:], strict=True))
    return stride == dilation == (1, 1) and within


def _by_convolutions(
    images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> Gradients:
    """The images' gradient is that of the output under the kernel turned round; for a narrow kernel torch finds the weights'."""
    padding = geometry[1]
    back = [size - 1 - pad for size, pad in zip(weight.shape[2:], padding, strict=True)]
    to_images = F.conv2d(grad, weight.flip(2, 3), None, 1, back, 1, len(weight)) if needed[0] else None
    if not needed[1]:
        return to_images, None
    if weight.shape[3] <= WIDEST_OF_ONEDNN:
        return to_images, _torchs(images, weight, grad, geometry, (False, True))[1]
    pieces = zip(images.split(IMAGES_AT_ONCE), grad.split(IMAGES_AT_ONCE), strict=True)
    total = sum(_to_weight(*piece, padding) for piece in pieces)
    return to_images, total.to(weight.dtype).unsqueeze(1)  # type: ignore[union-attr]


def _to_weight(images: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    """Σ over images and pixels of grad · the pixel that each place of the kernel saw: [C, k, l], float32 at least.

    It is each channel of each image convolved by its own gradient as the kernel, and summed over the images.
    """
    count, channels = images.shape[:2]
    rows = images.contiguous().view(1, count * channels, *images.shape[2:])
    kernels = grad.contiguous().view(count * channels, 1, *grad.shape[2:])
    found = F.conv2d(rows, kernels, None, 1, padding, 1, count * channels)
    dtype = torch.promote_types(found.dtype, torch.float32)
    return found.view(count, channels, *found.shape[2:]).sum(dim=0, dtype=dtype)


def _by_torch(images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]) -> Gradients:
    """Torch's own, in float32 at least."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    found = _torchs(images.to(dtype), weight.to(dtype), grad.to(dtype), geometry, needed)
    to_images, to_weight = (None if each is None else each.to(images.dtype) for each in found)
    return to_images, to_weight


def _torchs(images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]) -> Gradients:
    """Those that are needed, from oneDNN's own kernels for them."""
    stride, padding, dilation = map(list, geometry)
    asked = (stride, padding, dilation, False, [0, 0], len(weight), [*needed, False])
    return torch.ops.aten.convolution_backward(grad, images, weight, None, *asked)[:2]
