"""Blends by name: functions that combine the log-probabilities of several members into one table. No torch.

Each member is [N, C], with the same rows and classes in the same order. `weights` [members] are
convex. `codes` [N] are the true classes. A blend combines members and may fit their weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fivefold.errors import SettingsError
from fivefold.lookup import choose

MAX_ITERATIONS = 2000
TOLERANCE = 1e-7
MAX_PICKS = 100
"""Maximum number of picks of the greedy selection; it may pick a member several times."""
EPS = float(np.finfo(np.float64).tiny)
LogProbs = Sequence[np.ndarray]


def mean(log_probs: LogProbs) -> np.ndarray:
    """Return the log of the members' mean probability, float32 [N, C]."""
    return arithmetic(log_probs, equal_weights(len(log_probs)))


def arithmetic(log_probs: LogProbs, weights: np.ndarray) -> np.ndarray:
    """Return log Σ w p, float32 [N, C]."""
    total = sum(w * np.exp(member.astype(np.float64)) for member, w in zip(log_probs, weights, strict=True))
    return np.log(np.maximum(total, EPS)).astype(np.float32)


def geometric(log_probs: LogProbs, weights: np.ndarray) -> np.ndarray:
    """Return log Π p^w, each row normalised to sum 1 (Hinton 2002, product of experts): one low probability can veto a class."""
    floor = np.log(EPS)
    total = sum(w * np.maximum(member.astype(np.float64), floor) for member, w in zip(log_probs, weights, strict=True))
    return (total - np.logaddexp.reduce(total, axis=1, keepdims=True)).astype(np.float32)


def rank(log_probs: LogProbs, weights: np.ndarray) -> np.ndarray:
    """Return log Σ w r, each row normalised to sum 1; r in (0, 1] is the rank of a row among all N in a member's class.

    Equal values share their mean rank. The result depends on which rows are ranked together, and is not a calibrated
    probability.
    """
    from scipy.stats import rankdata

    total = sum(w * rankdata(member, axis=0) / len(member) for member, w in zip(log_probs, weights, strict=True))
    return np.log(total / total.sum(axis=1, keepdims=True)).astype(np.float32)


def vote(log_probs: LogProbs, weights: np.ndarray) -> np.ndarray:
    """Return the log of the shares of votes; a member votes for its most probable class.

    The mean probability counts as one further vote, split over the classes. So no class gets 0, ties are
    broken, and at equal weights no majority is overturned (the winner leads by a whole vote).
    """
    votes, average = np.zeros(log_probs[0].shape), np.zeros(log_probs[0].shape)
    rows = np.arange(len(votes))
    for member, weight in zip(log_probs, weights, strict=True):
        votes[rows, member.argmax(axis=1)] += weight
        average += weight * np.exp(member.astype(np.float64))
    smallest = weights[weights > 0].min()
    return np.log(np.maximum((votes + smallest * average) / (1 + smallest), EPS)).astype(np.float32)


def equal_weights(members: int) -> np.ndarray:
    """Return equal weights [members]."""
    return np.full(members, 1 / members)


def weights_by_name(names: Sequence[str], by_name: Mapping[str, float]) -> np.ndarray:
    """Return the weights [members] of `names`, normalised to sum 1; raise a SettingsError for a missing or unknown name."""
    if set(by_name) != set(names) or sum(by_name.values()) <= 0:
        raise SettingsError(
            f"ensemble.weights must have a number for each of the systems {', '.join(names)} (0 excludes one, at least "
            f"one must be above 0), not {dict(by_name)}"
        )
    weights = np.array([by_name[name] for name in names], dtype=np.float64)
    return weights / weights.sum()


def fit_weights(log_probs: LogProbs, codes: np.ndarray) -> np.ndarray:
    """Return the convex weights [members] that minimise the blend's log loss on rows of class `codes` [N].

    The problem is convex in the weights and depends only on the true classes' probabilities. Expectation
    maximisation of mixture weights reaches its optimum (Dempster, Laird & Rubin 1977, section 4.3).
    """
    truth = _true_class_probs(log_probs, codes)
    weights = equal_weights(len(log_probs))
    for _ in range(MAX_ITERATIONS):
        shares = weights[:, None] * truth
        new = (shares / shares.sum(axis=0)).mean(axis=1)
        moved, weights = np.abs(new - weights).max(), new
        if moved < TOLERANCE:
            break
    return weights


def greedy(log_probs: LogProbs, codes: np.ndarray) -> np.ndarray:
    """Return weights [members] of a greedy selection by log loss, which needs only the true classes' probabilities."""
    return _select(_true_class_probs(log_probs, codes), lambda truth: (-np.log(truth).mean(),))


def greedy_accuracy(log_probs: LogProbs, codes: np.ndarray) -> np.ndarray:
    """Return weights [members] of a greedy selection by accuracy; log loss breaks ties."""
    rows = np.arange(len(codes))

    def loss(probs: np.ndarray) -> tuple[float, float]:
        return (probs.argmax(axis=1) != codes).mean(), -np.log(np.maximum(probs[rows, codes], EPS)).mean()

    return _select([np.exp(member.astype(np.float64)) for member in log_probs], loss)


def cross_fit(log_probs: LogProbs, codes: np.ndarray, fold: np.ndarray, fit: "Fit" = fit_weights) -> np.ndarray:
    """Return the blend [N, C] of each fold's rows with weights that are fitted on the other folds' rows."""
    result = np.empty(log_probs[0].shape, dtype=np.float32)
    for held_out in np.unique(fold):
        in_fold = fold == held_out
        weights = fit([member[~in_fold] for member in log_probs], codes[~in_fold])
        result[in_fold] = arithmetic([member[in_fold] for member in log_probs], weights)
    return result


def apply_blend(name: str, log_probs: LogProbs, weights: np.ndarray | None = None) -> np.ndarray:
    """Combine the members into one [N, C] by the blend `name`, by default with equal weights; a single one stays unchanged."""
    combine = choose(BLENDS, "blend", name).combine if len(log_probs) > 1 else arithmetic
    return combine(log_probs, equal_weights(len(log_probs)) if weights is None else weights)


def _select(probs: LogProbs, loss: Callable[[np.ndarray], tuple[float, ...]]) -> np.ndarray:
    """Return weights [members] by forward selection with replacement (Caruana et al. 2004, section 2).

    Each pick adds the member that minimises the `loss` of the mean of all picks. The weights are the
    shares of the picks up to the best step. Of equal members, and of equal steps, the first wins.
    """
    counts, total, best = np.zeros(len(probs)), np.zeros(probs[0].shape), None
    for picks in range(1, MAX_PICKS + 1):
        losses = [loss((total + member) / picks) for member in probs]
        chosen = losses.index(min(losses))
        counts[chosen] += 1
        total += probs[chosen]
        if best is None or losses[chosen] < best:
            best, weights = losses[chosen], counts / picks
    return weights


def _true_class_probs(log_probs: LogProbs, codes: np.ndarray) -> np.ndarray:
    """Return the probabilities of the true classes [members, N], above 0."""
    rows = np.arange(len(codes))
    return np.maximum(np.stack([np.exp(member[rows, codes].astype(np.float64)) for member in log_probs]), EPS)


Fit = Callable[[LogProbs, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Blend:
    """A blend: its description, how it combines members, and how it fits their weights on out-of-fold rows, if it does."""

    description: str
    combine: Callable[[LogProbs, np.ndarray], np.ndarray]
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
"""To add a blend: add its function above, a line here, its name to `ensemble.blend` in `config/schema.py`, and a test."""
