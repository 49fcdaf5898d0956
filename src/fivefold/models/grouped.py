"""Grouped convolutions in float32 under bf16 autocast: faster where bf16 misses the fast kernels.

On CPUs the backward of a depthwise convolution in bf16 runs in a reference kernel (5x5, 240
channels: 92 ms, where float32 in NHWC takes 21). All else of such a network gains by bf16.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from fivefold.models.depthwise import Depthwise, may_gain


class InFloat32:
    """To stand before a convolution's class: under autocast it runs on float32, and gives the autocast type again."""

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(images)  # type: ignore[misc]
        with torch.autocast(device, enabled=False):
            found = super().forward(images.float())  # type: ignore[misc]
        return found.to(torch.get_autocast_dtype(device))

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What torch's own forward ends in; other classes' may not, and keep torch's gradients."""
        if images.device.type == "cpu" and self.training and torch.is_grad_enabled() and may_gain(self):  # type: ignore[attr-defined]
            return Depthwise.apply(images, weight, bias, self.padding)  # type: ignore[attr-defined]
        return super()._conv_forward(images, weight, bias)  # type: ignore[misc]


def has_groups(network: nn.Module) -> bool:
    """Whether any convolution of the network is grouped (depthwise is a group a channel)."""
    return any(_is_grouped(module) for module in network.modules())


def groups_in_float32(network: nn.Module) -> nn.Module:
    """The network with each grouped convolution made one that runs in float32; parameters and their names stay.

    Convolutions of other classes (those of timm or efficientnet_pytorch that pad to the same size) keep their own forward.
    """
    for module in network.modules():
        if _is_grouped(module) and not isinstance(module, InFloat32):
            module.__class__ = _in_float32(type(module))
    return network


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1


@lru_cache
def _in_float32(kind: type) -> type:
    return type(f"{kind.__name__}InFloat32", (InFloat32, kind), {})
