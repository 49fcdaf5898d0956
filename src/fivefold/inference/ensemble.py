"""Blending log-probabilities, and what may be blended with what. No torch.

The folds of one system are averaged equally: each out-of-fold row has one fold's prediction, so
nothing could fit weights between them. Between systems that share one split, convex weights are
fitted on the out-of-fold rows, and scored by fitting them again without each fold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fivefold.errors import DataError

ROUNDS = 2000
TOLERANCE = 1e-7


def mean(log_probs: Sequence[np.ndarray]) -> np.ndarray:
    """The log of the equal mean probability of members, each [N, C]."""
    return blend(log_probs, np.full(len(log_probs), 1 / len(log_probs)))


def blend(log_probs: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """log Σ w p, float32 [N, C], for members' log-probabilities [N, C] and convex `weights` [members]."""
    total = np.zeros(log_probs[0].shape)
    for each, weight in zip(log_probs, weights, strict=True):
        total += weight * np.exp(each.astype(np.float64))
    return np.log(np.maximum(total, np.finfo(np.float64).tiny)).astype(np.float32)


def fit_weights(log_probs: Sequence[np.ndarray], codes: np.ndarray) -> np.ndarray:
    """The convex weights [members] with the least logloss of the blend on rows of class `codes` [N].

    The problem is convex in the weights and depends on the truth's probabilities alone; expectation
    maximisation of mixture weights climbs to its optimum (Dempster, Laird & Rubin 1977, section 4.3).
    """
    rows = np.arange(len(codes))
    truth = np.stack([np.exp(each[rows, codes].astype(np.float64)) for each in log_probs])
    truth = np.maximum(truth, np.finfo(np.float64).tiny)
    weights = np.full(len(log_probs), 1 / len(log_probs))
    for _ in range(ROUNDS):
        shares = weights[:, None] * truth
        new = (shares / shares.sum(axis=0)).mean(axis=1)
        moved, weights = np.abs(new - weights).max(), new
        if moved < TOLERANCE:
            break
    return weights


def cross_fitted(log_probs: Sequence[np.ndarray], codes: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The blend [N, C] of each fold's rows by weights that were fitted on the other folds' rows."""
    result = np.empty(log_probs[0].shape, dtype=np.float32)
    for held_out in np.unique(fold):
        there = fold == held_out
        weights = fit_weights([each[~there] for each in log_probs], codes[~there])
        result[there] = blend([each[there] for each in log_probs], weights)
    return result


def check_members(members: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises a DataError, with the names, unless all members may stand in one ensemble.

    `members`: a name and the `model.json` of each. All must share one split and the same classes;
    within a system all folds must be there, for every seed, trained with the same settings.
    """
    _check_same(members, "split", "come from different splits (folds.parquet)")
    _check_same(members, "classes", "know different classes")
    systems: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, info in members:
        systems.setdefault(info["system"], []).append((name, info))
    for system, models in systems.items():
        _check_settings(system, models)
        _check_folds(system, models)


def _check_same(members: Sequence[tuple[str, Mapping[str, Any]]], field: str, problem: str) -> None:
    first, expected = members[0][0], members[0][1][field]
    for name, info in members[1:]:
        if info[field] != expected:
            raise DataError(f"{first} and {name} {problem}; an ensemble needs models of one split and the same classes")


def _check_settings(system: str, models: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    first, expected = models[0][0], models[0][1]["training"]
    for name, info in models[1:]:
        other = info["training"]
        differing = sorted(key for key in {*expected, *other} if expected.get(key) != other.get(key))
        if differing:
            raise DataError(
                f"{first} and {name} carry the system's name {system!r} but differ in {', '.join(differing[:5])}; "
                "train them again, or give one of them another name by system="
            )


def _check_folds(system: str, models: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    folds = models[0][1]["folds"]
    for seed in sorted({info["seed"] for _, info in models}):
        there = [info["fold"] for _, info in models if info["seed"] == seed]
        missing = sorted(set(range(folds)) - set(there))
        if missing:
            raise DataError(
                f"system {system!r} with seed {seed} lacks {', '.join(f'fold {fold}' for fold in missing)} of {folds}: "
                "train them first"
            )
        if len(there) > folds:
            raise DataError(f"system {system!r} with seed {seed} has {len(there)} models for {folds} folds")
