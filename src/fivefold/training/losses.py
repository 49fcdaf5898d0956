"""Losses by name: logits [B, C] and soft targets [B, C] to a scalar.

Targets are probabilities, so mixed images need no special case. A row of zeros has no label and does not count: the mean
is over the mass of the targets. So class weights are a factor of the targets, for every loss. Each builder takes the
label smoothing (the fraction of a target that is spread over all classes) and its own parameters. The focal losses are
not proper: their minimum is not at the true probabilities, so their models need temperature scaling if probabilities
matter.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fivefold.errors import SettingsError
from fivefold.lookup import parse_spec
from fivefold.models.classifier import LINKS

MIN_MASS = 1e-12


@dataclass(frozen=True)
class Loss:
    """A loss: `mean` maps logits and targets to the mean over the targets' mass; `link` turns logits into probabilities (`LINKS`).

    `weights` [C]: weight of the rows of each class; None: equal weights.
    """

    mean: Callable[[Tensor, Tensor], Tensor]
    link: str = "softmax"
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.mean(logits, self._weighted(targets))

    def mass(self, targets: Tensor) -> Tensor:
        """Return the total mass of the weighted targets, the denominator of the mean; above 0."""
        return self._weighted(targets).sum().clamp(min=MIN_MASS)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the values [B, C] whose softmax gives the probabilities."""
        return LINKS[self.link](logits)

    def _weighted(self, targets: Tensor) -> Tensor:
        return targets if self.weights is None else targets * self.weights.to(targets.device)


def build_loss(spec: str | dict[str, Any], smoothing: float = 0.0, weights: Tensor | None = None) -> Loss:
    """Return the loss of `spec`: a name, or a table with `name` and the parameters of that loss.

    `weights` [C]: weight of the rows of each class. Raise a SettingsError for an unknown name or parameter, and for an
    invalid value.
    """
    name, parameters = parse_spec(spec, LOSSES, "loss")
    try:
        loss = LOSSES[name](smoothing, **parameters)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"loss {name!r} with {parameters}: {error}") from error
    return replace(loss, weights=weights)


def balanced_weights(targets: Tensor) -> Tensor:
    """Return the weights N / (C · rows of the class), float [C], of targets [N, C]: equal total weight per class (King & Zeng 2001)."""
    counts = targets.sum(dim=0)
    return counts.sum() / (len(counts) * counts.clamp(min=1))


def cross_entropy(label_smoothing: float) -> Loss:
    """-Σ t log p over the mass of t, t = (1 - ε)·target + ε/C (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        return F.cross_entropy(logits, smooth, reduction="sum") / mass.sum().clamp(min=MIN_MASS)

    return Loss(loss)


def smoothed_cross_entropy(label_smoothing: float, *, smoothing: float = 0.1) -> Loss:
    """Cross-entropy with `smoothing` spread over the C - 1 other classes only: the true class keeps 1 - smoothing."""
    if label_smoothing or not 0 <= smoothing < 1:
        raise ValueError("this loss needs train.label_smoothing=0 and its own parameter 0 <= smoothing < 1")

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        classes = targets.shape[1]
        return cross_entropy(min(smoothing * classes / max(classes - 1, 1), 1.0))(logits, targets)

    return Loss(loss)


def focal(label_smoothing: float, *, gamma: float = 2.0, alpha: float = 1.0) -> Loss:
    """-α Σ t (1 - p)^γ log p (Lin et al. 2017, arXiv 1708.02002, equation 5, for p by softmax); α is a scalar."""
    _check_focal(gamma, alpha)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        log_p = logits.log_softmax(dim=1)
        modulation = (-log_p.expm1()).clamp(min=MIN_MASS) ** gamma if gamma else 1.0  # its gradient is finite at p = 1
        return -alpha * (smooth * modulation * log_p).sum() / mass.sum().clamp(min=MIN_MASS)

    return Loss(loss)


def binary_focal(label_smoothing: float, *, gamma: float = 2.0, alpha: float = 1.0) -> Loss:
    """torchvision's focal loss of each class against the rest, with p = sigmoid(logit), mean over the classes; α is a scalar."""
    from torchvision.ops import sigmoid_focal_loss

    _check_focal(gamma, alpha)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        terms = sigmoid_focal_loss(logits, smooth / mass.clamp(min=MIN_MASS), alpha=-1, gamma=gamma)
        return alpha * (mass * terms).mean(dim=1).sum() / mass.sum().clamp(min=MIN_MASS)

    return Loss(loss, "sigmoid")


def bce(label_smoothing: float) -> Loss:
    """Binary cross-entropy of each class against the rest, mean over the classes (Wightman et al. 2021, arXiv 2110.00476)."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        shares = smooth / mass.clamp(min=MIN_MASS)
        terms = F.binary_cross_entropy_with_logits(logits, shares, weight=mass, reduction="sum")
        return terms / logits.shape[1] / mass.sum().clamp(min=MIN_MASS)

    return Loss(loss, "sigmoid")


def f1(label_smoothing: float) -> Loss:
    """1 - mean over the batch's classes of 2·Σ t p / (Σ t + Σ p): soft macro F1, 0..1; the mean over accumulated micro-batches."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        probs = logits.softmax(dim=1)
        hits, truth, predicted = (smooth * probs).sum(dim=0), smooth.sum(dim=0), (mass * probs).sum(dim=0)
        score = 2 * hits / (truth + predicted).clamp(min=MIN_MASS)
        present = (targets.sum(dim=0) > 0).to(score.dtype)
        return (present * (1 - score)).sum() / present.sum().clamp(min=1)

    return Loss(loss)


def _smooth(targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return targets [B, C] with the fraction `share` of each row spread over all classes, and the rows' mass [B, 1]."""
    mass = targets.sum(dim=1, keepdim=True)
    return targets * (1 - share) + mass * (share / targets.shape[1]), mass


def _check_focal(gamma: float, alpha: float) -> None:
    if not gamma >= 0 or not alpha > 0:
        raise ValueError("gamma must be at least 0, and alpha above 0")


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "label_smoothing": smoothed_cross_entropy,
    "focal": focal,
    "binary_focal": binary_focal,
    "bce": bce,
    "f1": f1,
}
