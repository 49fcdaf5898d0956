"""Losses by name: logits [B, C] and soft targets [B, C] to a scalar.

Targets are probabilities, so that mixed images need nothing special. A row of zeros has no label
and counts for nothing: the mean is over the mass of the targets. That makes class weights a factor
of the targets, whatever the loss. Each builder takes the share of a target that is spread over all
classes, and parameters of its own. The focal losses have their least value at other probabilities than the
true ones (they are not proper), so what they train needs a temperature where probabilities count.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fivefold.choose import choose
from fivefold.errors import SettingsError
from fivefold.models.classifier import LINKS

LEAST_MASS = 1e-12


@dataclass(frozen=True)
class Loss:
    """`mean` of logits and targets over the mass of the targets; `link` says which probabilities it trains the logits to.

    `weights` [C]: how much a row of each class counts; None: all alike.
    """

    mean: Callable[[Tensor, Tensor], Tensor]
    link: str = "softmax"
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.mean(logits, self._counted(targets))

    def mass(self, targets: Tensor) -> Tensor:
        """What the mean is over, above 0."""
        return self._counted(targets).sum().clamp(min=LEAST_MASS)

    def scores(self, logits: Tensor) -> Tensor:
        """What softmax makes the probabilities of [B, C]."""
        return LINKS[self.link](logits)

    def _counted(self, targets: Tensor) -> Tensor:
        return targets if self.weights is None else targets * self.weights.to(targets.device)


def build_loss(spec: str | dict[str, Any], smoothing: float = 0.0, weights: Tensor | None = None) -> Loss:
    """The loss of a name, or of a table with `name` and that loss's parameters.

    `weights` [C]: how much a row of each class counts. Raises SettingsError for an unknown name or
    parameter, and for a value that cannot work.
    """
    parameters = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(parameters.pop("name", ""))
    make = choose(LOSSES, "loss", name)
    try:
        loss = make(smoothing, **parameters)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"loss {name!r} with {parameters}: {error}") from error
    return replace(loss, weights=weights)


def balanced_weights(targets: Tensor) -> Tensor:
    """N / (C · rows of the class), float [C], from targets [N, C]: every class counts alike (King & Zeng 2001)."""
    counts = targets.sum(dim=0)
    return counts.sum() / (len(counts) * counts.clamp(min=1))


def cross_entropy(label_smoothing: float) -> Loss:
    """-Σ t log p over the mass of t, t = (1 - ε)·target + ε/C (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        return F.cross_entropy(logits, smooth, reduction="sum") / mass.sum().clamp(min=LEAST_MASS)

    return Loss(loss)


def smoothed_cross_entropy(label_smoothing: float, *, smoothing: float = 0.1) -> Loss:
    """Cross-entropy with `smoothing` spread over the C - 1 other classes alone: the truth keeps 1 - smoothing."""
    if label_smoothing:
        raise ValueError("it smooths by its own parameter `smoothing`; train.label_smoothing must be 0")
    if not 0 <= smoothing < 1:
        raise ValueError("smoothing is a share: 0 <= smoothing < 1")

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
        return -alpha * (smooth * _unsure(log_p, gamma) * log_p).sum() / mass.sum().clamp(min=LEAST_MASS)

    return Loss(loss)


def binary_focal(label_smoothing: float, *, gamma: float = 2.0, alpha: float = 1.0) -> Loss:
    """torchvision's focal loss of each class against the rest, p by the sigmoid of its logit, mean over the classes; α is a scalar."""
    from torchvision.ops import sigmoid_focal_loss

    _check_focal(gamma, alpha)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        terms = sigmoid_focal_loss(logits, smooth / mass.clamp(min=LEAST_MASS), alpha=-1, gamma=gamma)
        return alpha * (mass * terms).mean(dim=1).sum() / mass.sum().clamp(min=LEAST_MASS)

    return Loss(loss, "sigmoid")


def bce(label_smoothing: float) -> Loss:
    """Binary cross-entropy of each class against the rest, mean over the classes (Wightman et al. 2021, arXiv 2110.00476)."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        shares = smooth / mass.clamp(min=LEAST_MASS)
        terms = F.binary_cross_entropy_with_logits(logits, shares, weight=mass, reduction="sum")
        return terms / logits.shape[1] / mass.sum().clamp(min=LEAST_MASS)

    return Loss(loss, "sigmoid")


def f1(label_smoothing: float) -> Loss:
    """1 - mean over the batch's classes of 2·Σ t p / (Σ t + Σ p): the macro F1 of probabilities, 0..1; accumulated ones are averaged."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        smooth, mass = _smooth(targets, label_smoothing)
        probs = logits.softmax(dim=1)
        right, truth, said = (smooth * probs).sum(dim=0), smooth.sum(dim=0), (mass * probs).sum(dim=0)
        score = 2 * right / (truth + said).clamp(min=LEAST_MASS)
        there = (targets.sum(dim=0) > 0).to(score.dtype)
        return (there * (1 - score)).sum() / there.sum().clamp(min=1)

    return Loss(loss)


def _smooth(targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Targets [B, C] with `share` of each row spread over all classes, and the rows' mass [B, 1]."""
    mass = targets.sum(dim=1, keepdim=True)
    return targets * (1 - share) + mass * (share / targets.shape[1]), mass


def _unsure(log_p: Tensor, gamma: float) -> Tensor | float:
    """(1 - p)^γ, with a gradient at p = 1 for every γ."""
    return (-log_p.expm1()).clamp(min=LEAST_MASS) ** gamma if gamma else 1.0


def _check_focal(gamma: float, alpha: float) -> None:
    if not gamma >= 0 or not alpha > 0:
        raise ValueError("gamma is at least 0, alpha above 0")


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "label_smoothing": smoothed_cross_entropy,
    "focal": focal,
    "binary_focal": binary_focal,
    "bce": bce,
    "f1": f1,
}
