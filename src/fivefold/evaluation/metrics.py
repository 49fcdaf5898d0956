"""Metrics of log-probabilities against the true classes: scikit-learn's metrics by name, and log losses.

Throughout, `log_probs` is [N, C] natural logarithms and `codes` [N] the true class indices, N >= 1.
Calibration follows Guo et al. 2017, "On calibration of modern neural networks", arXiv 1706.04599.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

EPOCH_METRICS = ("accuracy", "logloss", "f1_macro")
"""The metrics of an epoch. They need no scikit-learn, whose import would delay every training."""
FLOOR = 1e-15
"""Competitions clip probabilities to [FLOOR, 1 - FLOOR]."""
Metric = Callable[[np.ndarray, np.ndarray], float]


def predicted_classes(log_probs: np.ndarray) -> np.ndarray:
    """Return the most probable class of each row [N] int64; the first one in a tie."""
    return log_probs.argmax(axis=1)


def sklearn_metric(name: str, log_probs: np.ndarray, codes: np.ndarray, **options: object) -> float:
    """Return the metric `sklearn.metrics.<name>` of the most probable classes; `options` are its other arguments."""
    from sklearn import metrics

    return float(getattr(metrics, name)(codes, predicted_classes(log_probs), **options))


def accuracy(log_probs: np.ndarray, codes: np.ndarray) -> float:
    """Return the share of rows whose most probable class is the true one."""
    return float((predicted_classes(log_probs) == codes).mean())


def f1_macro(log_probs: np.ndarray, codes: np.ndarray) -> float:
    """Return the mean F1 over the classes that occur as truth or as prediction, as scikit-learn's f1_score does."""
    guesses, classes = predicted_classes(log_probs), log_probs.shape[1]
    hits, true, guessed = (np.bincount(each, minlength=classes) for each in (codes[guesses == codes], codes, guesses))
    occurs = true + guessed > 0
    return float((2 * hits[occurs] / (true + guessed)[occurs]).mean())


def top_k_accuracy(log_probs: np.ndarray, codes: np.ndarray, k: int = 5) -> float:
    """Return the share of rows with the true class among the k most probable ones; 1 if k >= C.

    Of equal probabilities the earlier class ranks higher (in scikit-learn the later one), so that k = 1 is the accuracy.
    """
    ranked = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]
    return float((ranked == codes[:, None]).any(axis=1).mean())


def logloss(log_probs: np.ndarray, codes: np.ndarray) -> float:
    """Return the mean negative log-probability of the true class, in nats; infinite if a true class has probability 0."""
    return float(-log_probs[np.arange(len(codes)), codes].astype(np.float64).mean())


def competition_logloss(probs: np.ndarray, codes: np.ndarray) -> float:
    """Return the log loss by competition rules: probabilities are normalised to sum 1 per row, then clipped."""
    shares = probs[np.arange(len(codes)), codes] / probs.sum(axis=1, dtype=np.float64)
    return float(-np.log(np.clip(shares, FLOOR, 1 - FLOOR)).mean())


def compute_metrics(log_probs: np.ndarray, codes: np.ndarray, names: Iterable[str] = EPOCH_METRICS) -> dict[str, float]:
    """Return the metrics `names`, by default those of an epoch."""
    return {name: METRICS[name](log_probs, codes) for name in names}


def full_report(log_probs: np.ndarray, codes: np.ndarray, top_k: int = 5, bins: int = 15) -> dict[str, float | int]:
    """Return all figures: METRICS, `top<k>_accuracy`, `ece`, and `n`, the number of rows."""
    return {
        "n": len(codes),
        **compute_metrics(log_probs, codes, METRICS),
        f"top{top_k}_accuracy": top_k_accuracy(log_probs, codes, top_k),
        "ece": expected_calibration_error(log_probs, codes, bins),
    }


def wilson_interval(share: float, rows: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of `rows` independent rows (Wilson 1927, score interval)."""
    z = 1.959963984540054
    middle, half = share + z**2 / (2 * rows), z * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    low, high = ((middle + sign * half) / (1 + z**2 / rows) for sign in (-1, 1))
    return max(0.0, float(low)), min(1.0, float(high))


def bootstrap_interval(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `values` [N]: percentiles of means of N rows drawn with replacement."""
    random, count = np.random.default_rng(0), len(values)
    means = [values[random.integers(0, count, count)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def effective_rows(correct: np.ndarray, clusters: np.ndarray) -> float:
    """Return the effective number of independent rows of `correct` [N], given clusters of correlated rows [N], from 0.

    It is N over the design effect: the variance of the share between clusters over the variance of N independent rows
    (Kish 1965, section 5.4). It is at most N, and the number of clusters if there is no variance.
    """
    rows, hits, share = np.bincount(clusters), np.bincount(clusters, correct), correct.mean()
    groups, count, spread = len(rows), len(correct), ((hits - share * rows) ** 2).sum()
    if groups < 2 or spread == 0:
        return float(groups)
    effect = spread * groups / (groups - 1) / (share * (1 - share) * count**2 / (count - 1))
    return float(count / max(effect, 1.0))


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "logloss": logloss,
    "competition_logloss": lambda log_probs, codes: competition_logloss(np.exp(log_probs), codes),
    **{
        f"{name}_{average}": partial(sklearn_metric, f"{name}_score", average=average, zero_division=0)
        for name in ("f1", "precision", "recall")
        for average in ("macro", "weighted")
    },
    "f1_macro": f1_macro,
}
"""All metrics of a report; macro metrics cover the classes that occur as truth or as prediction. To add one, add a line."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Bounds of a fitted temperature: if every row is right (or wrong), the loss has no minimum."""


def reliability_table(log_probs: np.ndarray, codes: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """Return per bin of confidence [bins]: `low`, `high`, `rows`, mean `confidence`, `accuracy` (NaN if empty).

    Bins have equal width and are open below: (low, high], as in section 2 of the paper.
    """
    confidence = np.exp(log_probs.max(axis=1).astype(np.float64)).clip(0, 1)
    right = predicted_classes(log_probs) == codes
    edges = np.linspace(0, 1, bins + 1)
    bin_index = np.searchsorted(edges[1:-1], confidence, side="left")
    rows = np.bincount(bin_index, minlength=bins)
    sums = [np.bincount(bin_index, weights=values, minlength=bins) for values in (confidence, right)]
    means = [np.divide(total, rows, out=np.full(bins, np.nan), where=rows > 0) for total in sums]
    return {"low": edges[:-1], "high": edges[1:], "rows": rows, "confidence": means[0], "accuracy": means[1]}


def expected_calibration_error(log_probs: np.ndarray, codes: np.ndarray, bins: int = 15) -> float:
    """Return the mean distance between confidence and accuracy over bins, weighted by rows (equation 3), in [0, 1]."""
    table = reliability_table(log_probs, codes, bins)
    full = table["rows"] > 0
    gap = np.abs(table["accuracy"][full] - table["confidence"][full])
    return float((gap * table["rows"][full]).sum() / table["rows"].sum())


def apply_temperature(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Return log softmax(log_probs / temperature) [N, C] in the input's precision; a temperature above 1 lowers confidence."""
    from scipy.special import log_softmax

    return log_softmax(log_probs.astype(np.float64) / temperature, axis=1).astype(log_probs.dtype)


def fit_temperature(log_probs: np.ndarray, codes: np.ndarray) -> float:
    """Return the temperature in [0.01, 100] with the lowest log loss (section 4.2), which is convex in 1/T."""
    from scipy.optimize import minimize_scalar

    logits = np.maximum(log_probs.astype(np.float64), np.log(np.finfo(np.float64).tiny))
    fitted = minimize_scalar(
        lambda log_t: logloss(apply_temperature(logits, np.exp(log_t)), codes),
        bounds=np.log([MIN_TEMPERATURE, MAX_TEMPERATURE]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(np.exp(fitted.x))


def cross_fit_temperature(log_probs: np.ndarray, codes: np.ndarray, parts: int = 5) -> np.ndarray:
    """Return `apply_temperature` [N, C] of each of `parts` of the rows, with the temperature fitted on the other rows."""
    result, part = np.empty_like(log_probs), np.arange(len(codes)) % parts
    for held_out in range(parts):
        in_part = part == held_out
        result[in_part] = apply_temperature(log_probs[in_part], fit_temperature(log_probs[~in_part], codes[~in_part]))
    return result
