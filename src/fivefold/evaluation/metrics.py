"""Metrics of log-probabilities against the true classes: scikit-learn's metrics by name, and log losses.

Throughout, `log_probs` is [N, C] natural logarithms and `codes` [N] the true class indices, N >= 1.
"""

from collections.abc import Callable, Iterable

import numpy as np

from fivefold.lookup import choose

EPOCH = ("accuracy", "logloss", "f1_macro")
FLOOR = 1e-15
"""Competitions clip probabilities to [FLOOR, 1 - FLOOR]."""
Metric = Callable[[np.ndarray, np.ndarray], float]


def predicted(log_probs: np.ndarray) -> np.ndarray:
    """Return the most probable class of each row [N] int64; the first one in a tie."""
    return log_probs.argmax(axis=1)


def of_classes(name: str, **options: object) -> Metric:
    """Return the metric `sklearn.metrics.<name>` of the most probable classes; `options` are its other arguments."""

    def metric(log_probs: np.ndarray, codes: np.ndarray) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(codes, predicted(log_probs), **options))

    return metric


def top_k_accuracy(log_probs: np.ndarray, codes: np.ndarray, k: int = 5) -> float:
    """Return the share of rows with the true class among the k most probable ones; 1 if k >= C.

    Of equal probabilities the earlier class ranks higher, as in `predicted` (scikit-learn takes the
    later one), so that k = 1 is the accuracy.
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


def confusion_matrix(log_probs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return counts [C, C] int64: true class by row, predicted class by column."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(codes, predicted(log_probs), labels=range(log_probs.shape[1]))


def per_class_table(log_probs: np.ndarray, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Return per class [C]: `precision`, `recall`, `f1` in [0, 1] (0 if undefined), `support`, `predicted` counts."""
    from sklearn.metrics import precision_recall_fscore_support

    guesses, labels = predicted(log_probs), range(log_probs.shape[1])
    scores = precision_recall_fscore_support(codes, guesses, labels=labels, zero_division=0)
    table = dict(zip(("precision", "recall", "f1", "support"), scores, strict=True))
    return table | {"predicted": np.bincount(guesses, minlength=len(labels))}


def summary(log_probs: np.ndarray, codes: np.ndarray, names: Iterable[str] = EPOCH) -> dict[str, float]:
    """Return the metrics `names`, by default those of an epoch."""
    return {name: choose(METRICS, "metric", name)(log_probs, codes) for name in names}


def full_report(log_probs: np.ndarray, codes: np.ndarray, top_k: int = 5, bins: int = 15) -> dict[str, float | int]:
    """Return all figures: METRICS, `top<k>_accuracy`, `ece`, and `n`, the number of rows."""
    from fivefold.evaluation.calibration import expected_calibration_error

    return {
        "n": len(codes),
        **summary(log_probs, codes, METRICS),
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


def independent_rows(right: np.ndarray, clusters: np.ndarray) -> float:
    """Return the effective number of independent rows of `right` [N], given the clusters of correlated rows `clusters` [N].

    It is N over the design effect: the variance of the share between clusters over the variance of N independent rows
    (Kish 1965, section 5.4). It is at most N, and the number of clusters if there is no variance. Clusters count from 0.
    """
    rows, hits, share = np.bincount(clusters), np.bincount(clusters, right), right.mean()
    groups, count, spread = len(rows), len(right), ((hits - share * rows) ** 2).sum()
    if groups < 2 or spread == 0:
        return float(groups)
    effect = spread * groups / (groups - 1) / (share * (1 - share) * count**2 / (count - 1))
    return float(count / max(effect, 1.0))


METRICS: dict[str, Metric] = {
    "accuracy": of_classes("accuracy_score"),
    "logloss": logloss,
    "competition_logloss": lambda log_probs, codes: competition_logloss(np.exp(log_probs), codes),
    "f1_macro": of_classes("f1_score", average="macro", zero_division=0),
    "f1_weighted": of_classes("f1_score", average="weighted", zero_division=0),
    "precision_macro": of_classes("precision_score", average="macro", zero_division=0),
    "precision_weighted": of_classes("precision_score", average="weighted", zero_division=0),
    "recall_macro": of_classes("recall_score", average="macro", zero_division=0),
    "recall_weighted": of_classes("recall_score", average="weighted", zero_division=0),
}
"""All metrics of a report; macro metrics cover the classes that occur as truth or as prediction. To add one, add a line."""
