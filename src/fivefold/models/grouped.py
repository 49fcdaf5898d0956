"""Grouped convolutions in float32 under bf16 autocast: faster where bf16 misses the fast kernels.

On CPUs the backward of many grouped convolutions in bf16 runs in a reference kernel (5x5, 240 channels, depthwise: 92 ms,
where float32 in NHWC takes 21). All else of such a network gains by bf16, and so do depthwise convolutions of torch's own
class, which `depthwise.py` gives gradients that are quick in both types: they stay in bf16.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from fivefold.models.depthwise import may_gain


class InFloat32:
    """To stand before a convolution's class: under autocast it runs on float32, and gives the autocast type again."""

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(images)  # type: ignore[misc]
        with torch.autocast(device, enabled=False):
            found = super().forward(images.float())  # type: ignore[misc]
        return found.to(torch.get_autocast_dtype(device))


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
    return isinstance(module, nn.Conv2d) and module.groups > 1 and not may_gain(module)


@lru_cache
def _in_float32(kind: type) -> type:
    return type(f"{kind.__name__}InFloat32", (InFloat32, kind), {})
