"""Losses by name: logits [B, C] and soft targets [B, C] to a scalar.

Targets are probabilities, so that mixed images need nothing special. A row of zeros has no label
and counts for nothing: the mean is over the mass of the targets.
"""

from collections.abc import Callable

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(label_smoothing: float) -> Loss:
    """-Σ t log p over the mass of t, t = (1 - ε)·target + ε/C (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        mass = targets.sum(dim=1, keepdim=True)
        smooth = targets * (1 - label_smoothing) + mass * (label_smoothing / targets.shape[1])
        return -(smooth * logits.log_softmax(dim=1)).sum() / mass.sum().clamp(min=1e-12)

    return loss


LOSSES: dict[str, Callable[[float], Loss]] = {
    "cross_entropy": cross_entropy,
}
