"""Blends by name: how the log-probabilities of several members become one table. No torch.

Members are [N, C] each, of the same rows and classes in the same order; `weights` [members] are
convex; `codes` [N] the true classes. A blend combines members, and may fit their weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fivefold.choose import choose, did_you_mean
from fivefold.errors import SettingsError

ROUNDS = 2000
TOLERANCE = 1e-7
PICKS = 100
"""Members that greedy selection picks at most, one after the other, each as often as it helps."""
TINY = float(np.finfo(np.float64).tiny)
Members = Sequence[np.ndarray]


def mean(log_probs: Members) -> np.ndarray:
    """The log of the equal mean probability of members, each [N, C]."""
    return arithmetic(log_probs, equal(len(log_probs)))


def arithmetic(log_probs: Members, weights: np.ndarray) -> np.ndarray:
    """log Σ w p, float32 [N, C]."""
    total = np.zeros(log_probs[0].shape)
    for each, weight in zip(log_probs, weights, strict=True):
        total += weight * np.exp(each.astype(np.float64))
    return np.log(np.maximum(total, TINY)).astype(np.float32)


def geometric(log_probs: Members, weights: np.ndarray) -> np.ndarray:
    """log of Π p^w, each row brought to sum 1 (Hinton 2002, product of experts): one doubtful member can veto a class."""
    total = np.zeros(log_probs[0].shape)
    for each, weight in zip(log_probs, weights, strict=True):
        total += weight * np.maximum(each.astype(np.float64), np.log(TINY))
    return (total - np.logaddexp.reduce(total, axis=1, keepdims=True)).astype(np.float32)


def rank(log_probs: Members, weights: np.ndarray) -> np.ndarray:
    """log of Σ w r, each row brought to sum 1, where r in (0, 1] is the rank of a row among all N in a member's class.

    Equal values share their mean rank. Members of unlike confidence get the same say; the result
    depends on which rows are ranked together, and is no calibrated probability.
    """
    from scipy.stats import rankdata

    total = np.zeros(log_probs[0].shape)
    for each, weight in zip(log_probs, weights, strict=True):
        total += weight * rankdata(each, axis=0) / len(each)
    return np.log(total / total.sum(axis=1, keepdims=True)).astype(np.float32)


def vote(log_probs: Members, weights: np.ndarray) -> np.ndarray:
    """log of the shares of votes, a member's vote going to its most probable class; of tied classes the one with the
    highest mean probability wins, of still equal ones the first.

    The mean probability counts as one further voter, who gives each class its part: so no class gets
    0, ties are parted, and at equal weights no majority is overturned (a winner is ahead by a whole vote).
    """
    votes, average = np.zeros(log_probs[0].shape), np.zeros(log_probs[0].shape)
    rows = np.arange(len(votes))
    for each, weight in zip(log_probs, weights, strict=True):
        votes[rows, each.argmax(axis=1)] += weight
        average += weight * np.exp(each.astype(np.float64))
    voter = weights[weights > 0].min()
    return np.log(np.maximum((votes + voter * average) / (1 + voter), TINY)).astype(np.float32)


def equal(members: int) -> np.ndarray:
    """Equal weights [members]."""
    return np.full(members, 1 / members)


def given_weights(names: Sequence[str], given: Mapping[str, float]) -> np.ndarray:
    """The weights [members] given by name, brought to sum 1; a SettingsError unless each of `names` has one, and no other."""
    unknown = [name for name in given if name not in names]
    if unknown:
        raise SettingsError(
            f"ensemble.weights names {unknown[0]!r}{did_you_mean(unknown[0], names)}; there are {', '.join(names)}"
        )
    missing = [name for name in names if name not in given]
    if missing:
        raise SettingsError(
            f"ensemble.weights lacks {', '.join(missing)}; give each system a number, 0 to leave it out"
        )
    weights = np.array([given[name] for name in names], dtype=np.float64)
    if weights.sum() <= 0:
        raise SettingsError("ensemble.weights are all 0; give one of the systems more")
    return weights / weights.sum()


def fit_weights(log_probs: Members, codes: np.ndarray) -> np.ndarray:
    """The convex weights [members] with the least logloss of the blend on rows of class `codes` [N].

    The problem is convex in the weights and depends on the truth's probabilities alone; expectation
    maximisation of mixture weights climbs to its optimum (Dempster, Laird & Rubin 1977, section 4.3).
    """
    truth = _of_truth(log_probs, codes)
    weights = equal(len(log_probs))
    for _ in range(ROUNDS):
        shares = weights[:, None] * truth
        new = (shares / shares.sum(axis=0)).mean(axis=1)
        moved, weights = np.abs(new - weights).max(), new
        if moved < TOLERANCE:
            break
    return weights


def greedy(log_probs: Members, codes: np.ndarray) -> np.ndarray:
    """Weights [members] of a greedy selection by logloss, which asks for the truth's probabilities alone."""
    columns = [row[:, None] for row in _of_truth(log_probs, codes)]
    return _select(columns, lambda probs: (_logloss(probs, np.zeros_like(codes)),))


def greedy_accuracy(log_probs: Members, codes: np.ndarray) -> np.ndarray:
    """Weights [members] of a greedy selection by accuracy; of equally accurate picks by logloss."""
    every = [np.exp(each.astype(np.float64)) for each in log_probs]
    return _select(every, lambda probs: (float((probs.argmax(axis=1) != codes).mean()), _logloss(probs, codes)))


def cross_fitted(log_probs: Members, codes: np.ndarray, fold: np.ndarray, fit: "Fit" = fit_weights) -> np.ndarray:
    """The blend [N, C] of each fold's rows by weights that were fitted on the other folds' rows."""
    result = np.empty(log_probs[0].shape, dtype=np.float32)
    for held_out in np.unique(fold):
        there = fold == held_out
        weights = fit([each[~there] for each in log_probs], codes[~there])
        result[there] = arithmetic([each[there] for each in log_probs], weights)
    return result


def combined(name: str, log_probs: Members, weights: np.ndarray) -> np.ndarray:
    """The members as one, [N, C], by the blend called `name`; a member that is alone stays as it is."""
    combine = choose(BLENDS, "blend", name).combine
    return (combine if len(log_probs) > 1 else arithmetic)(log_probs, weights)


def _select(probs: Members, loss: Callable[[np.ndarray], tuple[float, ...]]) -> np.ndarray:
    """Weights [members] by forward selection with replacement (Caruana et al. 2004, section 2).

    Each pick adds the member with which the mean of all picks has the least `loss`; the weights are the
    shares of the picks up to the best step. Of equal members, and of equal steps, the first counts.
    """
    counts, total, best = np.zeros(len(probs)), np.zeros(probs[0].shape), None
    for picks in range(1, PICKS + 1):
        losses = [loss((total + each) / picks) for each in probs]
        chosen = losses.index(min(losses))
        counts[chosen] += 1
        total += probs[chosen]
        if best is None or losses[chosen] < best:
            best, weights = losses[chosen], counts / picks
    return weights


def _of_truth(log_probs: Members, codes: np.ndarray) -> np.ndarray:
    """Probabilities of the true classes [members, N], above 0."""
    rows = np.arange(len(codes))
    return np.maximum(np.stack([np.exp(each[rows, codes].astype(np.float64)) for each in log_probs]), TINY)


def _logloss(probs: np.ndarray, codes: np.ndarray) -> float:
    return float(-np.log(np.maximum(probs[np.arange(len(codes)), codes], TINY)).mean())


Fit = Callable[[Members, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Blend:
    """How members are combined; how their weights are fitted on out-of-fold rows, if they are; both in words."""

    words: str
    combine: Callable[[Members, np.ndarray], np.ndarray]
    fit: Fit | None = None


BLENDS = {
    "mean": Blend("equal mean of the systems", arithmetic),
    "weighted": Blend("given weights between the systems", arithmetic),
    "fitted": Blend("fitted weights between the systems", arithmetic, fit_weights),
    "geometric": Blend("geometric mean of the systems", geometric),
    "rank": Blend("mean rank of the systems", rank),
    "vote": Blend("vote of the systems", vote),
    "greedy": Blend("greedy selection of the systems by logloss", arithmetic, greedy),
    "greedy_accuracy": Blend("greedy selection of the systems by accuracy", arithmetic, greedy_accuracy),
}
"""To add one: its function above, its line here, its name at `ensemble.blend` in `sections.py`, its test."""
