"""Small networks of our own, such as for images of 8 to 96 pixels, which ImageNet's networks shrink away."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fivefold.choose import choose

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class SmallNet(nn.Module):
    """Images [B, 3, H, W] to features [B, num_features]: a 2x2 stem, then blocks that halve the image.

    Each block is a 3x3 convolution, a 2x2 max-pool, BatchNorm and an activation, then a second 3x3
    convolution, BatchNorm and activation (`gelu`, or `relu`, which is faster). Dense convolutions alone, since grouped ones are slow in
    bf16 on CPUs. After the design of Jordan 2024, "94% on CIFAR-10 in 3.29 seconds" (arXiv
    2404.00498), whose Dirac initialisation (section 3.3) it shares: a convolution starts by
    passing its input on.
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 256), stem: int = 32, activation: str = "gelu") -> None:
        super().__init__()
        bend = choose(ACTIVATIONS, "activation", activation)
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 2, bias=False), nn.BatchNorm2d(stem), bend())
        channels = [stem, *widths]
        self.blocks = nn.Sequential(*(_block(a, b, bend) for a, b in pairwise(channels)))
        self.num_features = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, num_features]: the largest value of each channel over the image."""
        return self.blocks(self.stem(images)).amax(dim=(2, 3))


def _block(inputs: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        _passing_on(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs),
        activation(),
        _passing_on(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)),
        nn.BatchNorm2d(outputs),
        activation(),
    )


@torch.no_grad()
def _passing_on(convolution: nn.Conv2d) -> nn.Conv2d:
    """Starts the first `in_channels` filters as the identity; the others keep their random start."""
    nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return convolution


def small_net(widths: Sequence[int] = (64, 256, 256), stem: int = 32, activation: str = "gelu") -> nn.Module:
    """A SmallNet; `widths` gives a block each, so an image of 2^n pixels takes at most n - 1 of them."""
    return SmallNet(widths, stem, activation)


def base_model(dropout: float = 0.25) -> nn.Module:
    """Images [B, 3, H, W] to features [B, 128]: a 7x7 and two 3x3 convolutions, then the mean over the image.

    The second and third are followed by a 2x2 max-pool and dropout. It is the smallest network of
    the mask system, against which its others are measured.
    """
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 7), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        *(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


SMALL: dict[str, Callable[..., nn.Module]] = {
    "small_net": small_net,
    "base_model": base_model,
}
