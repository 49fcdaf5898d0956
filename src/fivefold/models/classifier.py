"""A classifier: a backbone, and a head on its features, which meta features may join."""

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Images float [B, 3, H, W], normalised, to logits [B, C].

    With `meta` it takes meta features [B, M] too: standardised, they stand behind the backbone's.
    Both halves may be called by themselves: `head(features(…))` is the whole.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, meta: "Standardised | None" = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.meta = meta

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        return self.head(self.features(images, meta))

    def features(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        """All that the head sees [B, F]."""
        features = self.backbone(images)
        return features if self.meta is None else torch.cat([features, self.meta(meta)], dim=1)


class Standardised(nn.Module):
    """(x - mean) / std of each of M numbers; mean and std are saved with the weights, and no gradient moves them."""

    mean: Tensor
    std: Tensor

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))

    def forward(self, numbers: Tensor) -> Tensor:
        return (numbers - self.mean) / self.std

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Takes mean and std of the training rows [N, M]; a number that is the same in all of them is only centred."""
        rows = rows.double().cpu()
        std = rows.std(dim=0, correction=0)
        self.mean.copy_(rows.mean(dim=0))
        self.std.copy_(std.where(std > CONSTANT, torch.ones_like(std)))


CONSTANT = 1e-6
"""A standard deviation below this is rounding."""
