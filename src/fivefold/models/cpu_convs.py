"""Convolutions that train faster on CPUs than torch's own, with the same outputs: oneDNN's forward pass, other gradients.

oneDNN computes forward passes in fast kernels, whatever the type and the size, but not all gradients:

- The weights' gradient of a small map of many channels takes ten times a product of matrices, where the CPU has units for
  bf16 products (AMX). As [out, B·h·w] @ [B·h·w, k·k·in] of gathered patches: 3x3, 256 channels, 3x3 pixels, batch 64,
  6.3 -> 0.9 ms on one core.
- The gradients of depthwise convolutions take many times the forward pass: those of a wide kernel's weights (7x7, 96
  channels, 32 images of 56 pixels, bf16, two cores without AMX: 105 ms, the forward pass 5), and in bf16 those of the
  images at stride 2 (5x5, 144 channels: 106 ms, in float32 20). Both gradients of stride 1 are depthwise convolutions
  themselves, of more channels or with the kernel turned round (22 ms for the first). Those of another stride or dilation
  are oneDNN's own in float32. A step of ConvNeXt-Tiny takes 3.24 s instead of 3.86.
- In bf16 the gradients of other grouped convolutions run in a reference kernel (5x5, 240 channels: 92 ms, in float32
  21). `groups_in_float32` keeps those in float32 while all else of the network gains by bf16.

`quicken` is the switch of the first two (`train.cpu_convs`), `train.precision=bf16_grouped_fp32` that of the third.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_MAP = 64
"""Output pixels up to which gathering the patches costs less than it saves."""
FEWEST_CHANNELS = 128
WIDEST_OF_ONEDNN = 3
"""Up to so many columns of kernel oneDNN's own kernels for the weights' gradient are fast (11x1: 4 ms, 1x11: 41, in bf16)."""
IMAGES_AT_ONCE = 8
"""So many images are laid out anew at a time: they stay in the processor's caches."""
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding and dilation, of lines and columns."""
Gradients = tuple[Tensor | None, Tensor | None]
"""Of images and weight; None where it is not needed."""


def quicken(network: nn.Module, amx: bool) -> nn.Module:
    """Changes the class of each convolution that trains faster by it; parameters and their names stay.

    `amx`: the network trains in bf16 on a CPU with units for bf16 products.
    """
    for module in network.modules():
        if is_depthwise(module):
            module.__class__ = DepthwiseConv2d
        elif amx and _is_wide(module):
            module.__class__ = MatmulGradConv2d
    return network


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a depthwise convolution of torch's own class, padded by zeros or not at all; a DepthwiseConv2d is one."""
    if type(module) not in (nn.Conv2d, DepthwiseConv2d):
        return False
    depthwise = module.groups == module.in_channels == module.out_channels > 1
    return depthwise and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _is_wide(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d:
        return False
    plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    wide = min(module.in_channels, module.out_channels) >= FEWEST_CHANNELS
    return plain and wide and module.kernel_size != (1, 1) and not isinstance(module.padding, str)


class MatmulGradConv2d(nn.Conv2d):
    """An nn.Conv2d of one group; under bf16 autocast on a CPU, small maps get their weight gradient by a matrix product."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self.training and torch.is_autocast_enabled("cpu") and self._is_small(images)):
            return super()._conv_forward(images, weight, bias)
        return _convolve(self, images, weight, bias)

    def _is_small(self, images: Tensor) -> bool:
        sizes = zip(images.shape[-2:], self.padding, self.kernel_size, self.stride, strict=True)
        pixels = [(size + 2 * padding - kernel) // stride + 1 for size, padding, kernel, stride in sizes]
        return pixels[0] * pixels[1] <= LARGEST_MAP

    @staticmethod
    def gradients(
        images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]
    ) -> Gradients:
        stride, padding, _ = geometry
        to_images = torch.nn.grad.conv2d_input(images.shape, weight, grad, stride, padding) if needed[0] else None
        return to_images, _by_product(images, weight, grad, stride, padding) if needed[1] else None


class DepthwiseConv2d(nn.Conv2d):
    """An nn.Conv2d with a group for each channel; training on a CPU it has quick gradients, under autocast in its type."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and images.device.type == "cpu"):
            return super()._conv_forward(images, weight, bias)
        return _convolve(self, images, weight, bias)

    @staticmethod
    def gradients(
        images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]
    ) -> Gradients:
        stride, padding, dilation = geometry
        within = all(pad < size for pad, size in zip(padding, weight.shape[2:], strict=True))
        if stride == dilation == (1, 1) and within:
            return _by_convolutions(images, weight, grad, geometry, needed)
        wider = torch.promote_types(images.dtype, torch.float32)
        exact = _by_onednn(images.to(wider), weight.to(wider), grad.to(wider), geometry, needed)
        to_images, to_weight = (None if gradient is None else gradient.to(images.dtype) for gradient in exact)
        return to_images, to_weight


def _convolve(convolution: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of images [B, C, H, W] in autocast's type, or their own without it."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
    bias = None if bias is None else bias.to(dtype)
    return Convolution.apply(images.to(dtype), weight.to(dtype), bias, convolution)


class Convolution(torch.autograd.Function):
    """F.conv2d of one type, whose gradients are those of its `convolution`'s class."""

    @staticmethod
    def forward(ctx, images, weight, bias, convolution):
        ctx.save_for_backward(images, weight)
        ctx.geometry = convolution.stride, convolution.padding, convolution.dilation
        ctx.gradients, ctx.has_bias = convolution.gradients, bias is not None
        return F.conv2d(images, weight, bias, *ctx.geometry, convolution.groups)

    @staticmethod
    def backward(ctx, grad):
        images, weight = ctx.saved_tensors
        to_images, to_weight = ctx.gradients(images, weight, grad, ctx.geometry, ctx.needs_input_grad[:2])
        return to_images, to_weight, grad.sum(dim=(0, 2, 3)) if ctx.has_bias else None, None


def _by_product(
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


def _by_convolutions(
    images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> Gradients:
    """The images' gradient is that of the output under the kernel turned round; for a narrow kernel oneDNN finds the weights'."""
    padding = geometry[1]
    back = [size - 1 - pad for size, pad in zip(weight.shape[2:], padding, strict=True)]
    to_images = F.conv2d(grad, weight.flip(2, 3), None, 1, back, 1, len(weight)) if needed[0] else None
    if not needed[1]:
        return to_images, None
    if weight.shape[3] <= WIDEST_OF_ONEDNN:
        return to_images, _by_onednn(images, weight, grad, geometry, (False, True))[1]
    pieces = zip(images.split(IMAGES_AT_ONCE), grad.split(IMAGES_AT_ONCE), strict=True)
    total = sum(_of_each_place(*piece, padding) for piece in pieces)
    return to_images, total.to(weight.dtype).unsqueeze(1)  # type: ignore[union-attr]


def _of_each_place(images: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    """Σ over images and pixels of grad · the pixel that each place of the kernel saw: [C, k, l], float32 at least.

    It is each channel of each image convolved by its own gradient as the kernel, and summed over the images.
    """
    count, channels = images.shape[:2]
    rows = images.contiguous().view(1, count * channels, *images.shape[2:])
    kernels = grad.contiguous().view(count * channels, 1, *grad.shape[2:])
    sums = F.conv2d(rows, kernels, None, 1, padding, 1, count * channels)
    wider = torch.promote_types(sums.dtype, torch.float32)
    return sums.view(count, channels, *sums.shape[2:]).sum(dim=0, dtype=wider)


def _by_onednn(
    images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> Gradients:
    """Those that are needed, from oneDNN's own kernels for them."""
    stride, padding, dilation = map(list, geometry)
    options = (stride, padding, dilation, False, [0, 0], len(weight), [*needed, False])
    return torch.ops.aten.convolution_backward(grad, images, weight, None, *options)[:2]


class InFloat32:
    """To stand before a convolution's class: under autocast it runs on float32, and gives the autocast type again."""

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(images)  # type: ignore[misc]
        with torch.autocast(device, enabled=False):
            output = super().forward(images.float())  # type: ignore[misc]
        return output.to(torch.get_autocast_dtype(device))


def has_slow_groups(network: nn.Module) -> bool:
    """Whether any convolution of the network is grouped and none that is quick in bf16."""
    return any(_is_slow(module) for module in network.modules())


def groups_in_float32(network: nn.Module) -> nn.Module:
    """The network with grouped convolutions made ones that run in float32, less those that are quick in bf16.

    Parameters and their names stay. Convolutions of other classes (those of timm or efficientnet_pytorch that pad to the same
    size) keep their own forward.
    """
    for module in network.modules():
        if _is_slow(module) and not isinstance(module, InFloat32):
            module.__class__ = _in_float32(type(module))
    return network


def _is_slow(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module)


@lru_cache
def _in_float32(kind: type) -> type:
    return type(f"{kind.__name__}InFloat32", (InFloat32, kind), {})
