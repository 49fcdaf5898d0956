"""Multinomial logistic regression on frozen features, as a linear head of the network.

The features are standardised, and the strength of the L2 penalty is chosen by cross-validation inside the training rows. The
objective is that of scikit-learn's LogisticRegression with C = 1 / (l2 · rows), here with soft targets and on the features' device.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.log import log

STRENGTHS = tuple(10.0 ** (-half / 2) for half in range(9))
"""L2 penalties to try, strongest first: 1 to 1e-4."""
INNER_FOLDS = 4
MAX_ITERATIONS = 200
TOLERANCE, ROUGH_TOLERANCE = 1e-5, 1e-3
"""L-BFGS stops when no component of the gradient is larger: for the head, and in the cross-validation."""
MIN_STD = 1e-6


@dataclass(frozen=True)
class LinearFit:
    """logits = features · `weight`ᵀ + `bias`, for weight [C, F] and bias [C]; the penalty `l2`, and the `logloss` of its cross-validation."""

    weight: Tensor
    bias: Tensor
    l2: float
    logloss: float


def fit_linear(features: Tensor, targets: Tensor, groups: np.ndarray | None = None, seed: int = 0) -> LinearFit:
    """Fit a linear head to features float32 [N, V, F] of V views of N images, and to their targets [N, C], rows of any mass.

    Every view is a row. The cross-validation, which takes most of the time, uses the mean of each image's views; rows of equal
    `groups` [N] stay together in it.
    """
    flat = features.reshape(-1, features.shape[2])
    mean, std = flat.mean(dim=0), flat.std(dim=0, correction=0)
    std = std.where(std > MIN_STD, torch.ones_like(std))
    scaled = (features - mean) / std
    means = scaled.mean(dim=1, keepdim=True)
    l2, logloss = _choose_strength(means, targets, _inner_folds(targets, groups, seed))
    solution = _minimize(scaled, targets, l2, _zeros(scaled, targets))
    weight = solution[:, :-1] / std
    return LinearFit(weight, solution[:, -1] - weight @ mean, l2, logloss)


def _inner_folds(targets: Tensor, groups: np.ndarray | None, seed: int) -> list[np.ndarray]:
    """Return the rows of each inner fold; none if there are too few rows for two."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    codes = targets.argmax(dim=1).cpu().numpy()
    units = codes if groups is None else np.unique(groups)
    folds = min(INNER_FOLDS, int(np.bincount(codes).max()), len(units))
    if folds < 2:
        return []
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return [rows for _, rows in splitter.split(codes, codes, groups) if 0 < len(rows) < len(codes)]


def _choose_strength(features: Tensor, targets: Tensor, folds: list[np.ndarray]) -> tuple[float, float]:
    """Return the penalty with the lowest logloss of cross-validation, and that logloss.

    From the strongest penalty on, each fit starts from the one before; the search ends after two penalties without gain.
    """
    if not folds:
        return STRENGTHS[0], float("nan")
    everything = torch.arange(len(targets), device=targets.device)
    held_out = [torch.from_numpy(rows).to(targets.device) for rows in folds]
    training = [everything[~torch.isin(everything, rows)] for rows in held_out]
    solutions = [_zeros(features, targets) for _ in folds]
    scores: dict[float, float] = {}
    for l2 in STRENGTHS:
        total = 0.0
        for fold, (rows, others) in enumerate(zip(held_out, training, strict=True)):
            solutions[fold] = _minimize(features[others], targets[others], l2, solutions[fold], ROUGH_TOLERANCE)
            total += float(_loss(solutions[fold], *_as_rows(features[rows], targets[rows]))) * len(rows)
        scores[l2] = total / len(targets)
        best = min(scores, key=scores.__getitem__)
        if len(scores) - list(scores).index(best) > 2:
            break
    log.info("linear probe: l2=%.2g, logloss %.4f in a cross-validation of the training rows", best, scores[best])
    return best, scores[best]


def _zeros(features: Tensor, targets: Tensor) -> Tensor:
    return features.new_zeros(targets.shape[1], features.shape[2] + 1)


def _as_rows(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return every view as a row: features [N·V, F] and targets [N·V, C]."""
    return features.reshape(-1, features.shape[2]), targets.repeat_interleave(features.shape[1], dim=0)


def _loss(parameters: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy over the mass of the targets; the last column of `parameters` [C, F + 1] is the bias."""
    logits = torch.addmm(parameters[:, -1], rows, parameters[:, :-1].T)
    return F.cross_entropy(logits, targets, reduction="sum") / targets.sum()


def _minimize(features: Tensor, targets: Tensor, l2: float, start: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Return the parameters [C, F + 1] that minimise the loss + l2 / 2 · ‖weight‖² from `start` on, by L-BFGS."""
    rows, masses = _as_rows(features, targets)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=MAX_ITERATIONS, tolerance_grad=tolerance, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(parameters, rows, masses) + l2 / 2 * parameters[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()
