"""Labels that the models contradict, by confident learning (Northcutt et al. 2021, arXiv:1911.00068) as cleanlab implements it.

Every row is judged by models that were not trained on it. Features of a frozen network show its neighbours, which are another
witness than the models.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

LISTED_SHARE = 0.1
"""Fraction of the rows that are listed at least, so that a reader sees where the errors end."""
NEIGHBOURS = 10
BLOCK = 256
"""Rows whose similarity to all rows is computed at a time."""
CONFUSED = 0.1
"""Two classes count as confused if this fraction of each is predicted as the other."""


def find_suspects(log_probs: np.ndarray, codes: np.ndarray, limit: int) -> pd.DataFrame:
    """Return the rows whose label may be wrong, the most suspicious first, at most `limit`.

    `log_probs` float [N, C] of models that were not trained on the row; `codes` int [N], the given classes. Columns: `row`; `given`
    and `suggested`, class indices, the second the most probable other class; `given_probability`, `suggested_probability` in
    0..1; `issue`: whether cleanlab counts the label as an error. Rows that are no issue follow, up to LISTED_SHARE of all rows.
    """
    from cleanlab.filter import find_label_issues

    probs = np.exp(log_probs.astype(np.float64))
    probs /= probs.sum(axis=1, keepdims=True)
    rows = np.arange(len(codes))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "May not flag all label issues", UserWarning)  # classes of a few rows
        issues = find_label_issues(codes, probs, n_jobs=1)
    given = probs[rows, codes]
    others = probs.copy()
    others[rows, codes] = -1
    suggested = others.argmax(axis=1)
    order = np.lexsort((given, ~issues))
    order = order[: min(limit, max(int(issues.sum()), int(np.ceil(LISTED_SHARE * len(codes)))))]
    columns = {"row": rows, "given": codes, "suggested": suggested, "given_probability": given}
    columns |= {"suggested_probability": probs[rows, suggested], "issue": issues}
    return pd.DataFrame({name: values[order] for name, values in columns.items()})


def agreement(suspects: pd.DataFrame, guesses: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each suspect the fraction of the models that predict the suggested class; `guesses`: classes [N], -1 for none."""
    votes = np.stack([guess[suspects["row"]] for guess in guesses])
    counted = votes >= 0
    return ((votes == suspects["suggested"].to_numpy()) & counted).sum(axis=0) / np.maximum(1, counted.sum(axis=0))


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of suspects in feature space.

    `given_share` and `suggested_share` [S]: the fractions of the ten nearest rows that have these classes. `nearest_given` and
    `nearest_suggested` [S]: the nearest row of each class, -1 if there is none.
    """

    given_share: np.ndarray
    suggested_share: np.ndarray
    nearest_given: np.ndarray
    nearest_suggested: np.ndarray


def find_neighbours(suspects: pd.DataFrame, features: np.ndarray, codes: np.ndarray, images: np.ndarray) -> Neighbours:
    """Return the neighbours of the suspects by cosine similarity of centred features float [N, F].

    `images` [N] are equal for rows with the same image, which are not neighbours.
    """
    centred = features - features.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    parts = []
    for start in range(0, len(suspects), BLOCK):
        block = suspects.iloc[start : start + BLOCK]
        rows, given, suggested = (block[name].to_numpy() for name in ("row", "given", "suggested"))
        similarity = centred[rows] @ centred.T
        similarity[images[rows, None] == images[None]] = -np.inf
        count = min(NEIGHBOURS, len(codes) - 1)
        near = codes[np.argpartition(-similarity, count - 1, axis=1)[:, :count]]
        of_class = [np.where(codes[None] == wanted[:, None], similarity, -np.inf) for wanted in (given, suggested)]
        nearest = [np.where(np.isinf(values.max(axis=1)), -1, values.argmax(axis=1)) for values in of_class]
        shares = [(near == wanted[:, None]).mean(axis=1) for wanted in (given, suggested)]
        parts.append((*shares, *nearest))
    return Neighbours(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def confused_classes(log_probs: np.ndarray, codes: np.ndarray) -> list[tuple[int, int, float, float]]:
    """Return the pairs of classes that the models confuse both ways, the most confused first.

    Each is (class a, class b, fraction of a predicted as b, fraction of b predicted as a); both fractions are at least CONFUSED.
    """
    classes = log_probs.shape[1]
    counts = np.zeros((classes, classes))
    np.add.at(counts, (codes, log_probs.argmax(axis=1)), 1)
    rates = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    both = np.triu(np.minimum(rates, rates.T), 1)
    pairs = [
        divmod(int(cell), classes) for cell in np.argsort(-both, axis=None, kind="stable")[: np.sum(both >= CONFUSED)]
    ]
    return [(a, b, float(rates[a, b]), float(rates[b, a])) for a, b in pairs]
