"""Convolutions that train faster on CPUs than torch's, with the same outputs: oneDNN's forward pass, other gradients.

Some gradients of oneDNN are slow (docs/performance.md has times):

- The weight gradient of a small map with many channels, if the CPU has bf16 matrix units (AMX). It becomes the matrix product
  [out, B·h·w] @ [B·h·w, k·k·in] of gathered patches, which takes a seventh of the time.
- The gradients of depthwise convolutions. At stride 1, both are depthwise convolutions themselves, with more channels or with
  the flipped kernel. At another stride or dilation, oneDNN computes them in float32.
- In bf16, the gradients of other grouped convolutions. `run_grouped_convs_in_fp32` keeps these convolutions in float32.

`train.cpu_convs` (`use_fast_convs`) turns the first two on, `train.precision=bf16_grouped_fp32` the third.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_OUTPUT_PIXELS = 64
"""Output pixels up to which gathering the patches saves more than it costs."""
MIN_CHANNELS = 128
MAX_ONEDNN_KERNEL_WIDTH = 3
"""Kernel width up to which oneDNN's weight gradient is fast (11x1: 4 ms, 1x11: 41, in bf16)."""
CHUNK_IMAGES = 8
"""Images per chunk whose memory layout is changed at a time, so that they stay in the CPU's caches."""
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding and dilation, each for height and width."""
Needed = tuple[bool, bool]
Gradients = tuple[Tensor | None, Tensor | None]
"""Whether the gradients of images and weight are needed, and these gradients; None if not needed."""


def use_fast_convs(network: nn.Module, amx: bool) -> nn.Module:
    """Replace the class of each convolution that trains faster with another; parameters and their names stay.

    `amx`: the network trains in bf16 on a CPU with bf16 matrix units.
    """
    for module in network.modules():
        if is_depthwise(module):
            module.__class__ = DepthwiseConv2d
        elif amx and _has_many_channels(module):
            module.__class__ = MatmulGradConv2d
    return network


def is_depthwise(module: nn.Module) -> bool:
    """Return whether `module` is a depthwise nn.Conv2d (or DepthwiseConv2d) with zero padding or no padding."""
    if type(module) not in (nn.Conv2d, DepthwiseConv2d):
        return False
    depthwise = module.groups == module.in_channels == module.out_channels > 1
    return depthwise and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _has_many_channels(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or min(module.in_channels, module.out_channels) < MIN_CHANNELS:
        return False
    plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return plain and module.kernel_size != (1, 1) and not isinstance(module.padding, str)


class MatmulGradConv2d(nn.Conv2d):
    """An nn.Conv2d of one group whose weight gradient is a matrix product, for small maps under bf16 autocast on a CPU."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self.training and torch.is_autocast_enabled("cpu") and self._is_small(images)):
            return super()._conv_forward(images, weight, bias)
        return _convolve(self, images, weight, bias)

    def _is_small(self, images: Tensor) -> bool:
        sizes = zip(images.shape[-2:], self.padding, self.kernel_size, self.stride, strict=True)
        pixels = [(size + 2 * padding - kernel) // stride + 1 for size, padding, kernel, stride in sizes]
        return pixels[0] * pixels[1] <= MAX_OUTPUT_PIXELS

    @staticmethod
    def gradients(images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: Needed) -> Gradients:
        stride, padding, _ = geometry
        to_images = torch.nn.grad.conv2d_input(images.shape, weight, grad, stride, padding) if needed[0] else None
        return to_images, _matmul_weight_grad(images, weight, grad, stride, padding) if needed[1] else None


class DepthwiseConv2d(nn.Conv2d):
    """An nn.Conv2d with one group per channel and fast gradients when training on a CPU, under autocast in its type."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and images.device.type == "cpu"):
            return super()._conv_forward(images, weight, bias)
        return _convolve(self, images, weight, bias)

    @staticmethod
    def gradients(images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: Needed) -> Gradients:
        stride, padding, dilation = geometry
        within = all(pad < size for pad, size in zip(padding, weight.shape[2:], strict=True))
        if stride == dilation == (1, 1) and within:
            return _conv_grads(images, weight, grad, geometry, needed)
        wider = torch.promote_types(images.dtype, torch.float32)
        exact = _onednn_grads(images.to(wider), weight.to(wider), grad.to(wider), geometry, needed)
        to_images, to_weight = (None if gradient is None else gradient.to(images.dtype) for gradient in exact)
        return to_images, to_weight


def _convolve(convolution: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve images [B, C, H, W] in autocast's type, or in their own type without autocast."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
    bias = None if bias is None else bias.to(dtype)
    return ConvFunction.apply(images.to(dtype), weight.to(dtype), bias, convolution)


class ConvFunction(torch.autograd.Function):
    """F.conv2d in one type with the gradients of the class of `convolution`."""

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


def _matmul_weight_grad(
    images: Tensor, weight: Tensor, grad: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Return the weight gradient Σ over images and pixels of grad ⊗ patch: [O, I, k, l]."""
    outputs, inputs, *kernel = weight.shape
    batch, _, *pixels = grad.shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    image, line, pixel, _ = padded.stride()
    shape = (batch, *pixels, kernel[0], kernel[1] * inputs)
    patches = padded.as_strided(shape, (image, stride[0] * line, stride[1] * pixel, line, 1))
    flat = grad.permute(0, 2, 3, 1).reshape(-1, outputs)
    product = flat.t() @ patches.reshape(len(flat), -1)
    return product.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def _conv_grads(images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: Needed) -> Gradients:
    """Convolve the output's gradient with the flipped kernel for the images' gradient; oneDNN handles narrow kernels' weights."""
    padding = geometry[1]
    grad_padding = [size - 1 - pad for size, pad in zip(weight.shape[2:], padding, strict=True)]
    to_images = F.conv2d(grad, weight.flip(2, 3), None, 1, grad_padding, 1, len(weight)) if needed[0] else None
    if not needed[1]:
        return to_images, None
    if weight.shape[3] <= MAX_ONEDNN_KERNEL_WIDTH:
        return to_images, _onednn_grads(images, weight, grad, geometry, (False, True))[1]
    pieces = zip(images.split(CHUNK_IMAGES), grad.split(CHUNK_IMAGES), strict=True)
    total = sum(_wide_weight_grad(*piece, padding) for piece in pieces)
    return to_images, total.to(weight.dtype).unsqueeze(1)  # type: ignore[union-attr]


def _wide_weight_grad(images: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    """Return Σ over images and pixels of grad · the input pixel at each kernel position: [C, k, l], at least float32."""
    count, channels = images.shape[:2]
    rows = images.contiguous().view(1, count * channels, *images.shape[2:])
    kernels = grad.contiguous().view(count * channels, 1, *grad.shape[2:])
    sums = F.conv2d(rows, kernels, None, 1, padding, 1, count * channels)
    wider = torch.promote_types(sums.dtype, torch.float32)
    return sums.view(count, channels, *sums.shape[2:]).sum(dim=0, dtype=wider)


def _onednn_grads(images: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry, needed: Needed) -> Gradients:
    stride, padding, dilation = map(list, geometry)
    options = (stride, padding, dilation, False, [0, 0], len(weight), [*needed, False])
    return torch.ops.aten.convolution_backward(grad, images, weight, None, *options)[:2]


class Float32Mixin:
    """Mixin for convolutions of any class: under autocast, compute in float32 and return autocast's type."""

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(images)  # type: ignore[misc]
        with torch.autocast(device, enabled=False):
            output = super().forward(images.float())  # type: ignore[misc]
        return output.to(torch.get_autocast_dtype(device))


def has_slow_grouped_convs(network: nn.Module) -> bool:
    """Return whether the network has a grouped convolution that is slow in bf16."""
    return any(_is_slow(module) for module in network.modules())


def run_grouped_convs_in_fp32(network: nn.Module) -> nn.Module:
    """Make the grouped convolutions that are slow in bf16 run in float32, and return the network; parameter names stay."""
    for module in network.modules():
        if _is_slow(module) and not isinstance(module, Float32Mixin):
            module.__class__ = _in_float32(type(module))
    return network


def _is_slow(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module)


@lru_cache
def _in_float32(kind: type) -> type:
    return type(f"{kind.__name__}InFloat32", (Float32Mixin, kind), {})
