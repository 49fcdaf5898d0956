"""A classifier: a backbone, and a head on its features."""

from torch import Tensor, nn


class Classifier(nn.Module):
    """Images float [B, 3, H, W], normalised, to logits [B, C]."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))
