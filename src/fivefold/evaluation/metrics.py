"""Scores of log-probabilities against the truth, in numpy alone: training validates with them.

Throughout, `log_probs` is [N, C] natural logarithms, `codes` [N] the true class indices, N >= 1;
`confusion` is [C, C] counts, true class by row, predicted class by column.
References: scikit-learn's functions of the same names.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fivefold.choose import choose

FLOOR = 1e-15
"""Competitions clip probabilities to [FLOOR, 1 - FLOOR]."""


def predicted(log_probs: np.ndarray) -> np.ndarray:
    """The most probable class of each row [N] int64; of equal ones the first."""
    return log_probs.argmax(axis=1)


def accuracy(log_probs: np.ndarray, codes: np.ndarray) -> float:
    """Share of rows whose most probable class is the true one."""
    return float((predicted(log_probs) == codes).mean())


def top_k_accuracy(log_probs: np.ndarray, codes: np.ndarray, k: int = 5) -> float:
    """Share of rows whose true class is among the k most probable ones; 1 where k >= C.

    Of equal probabilities the earlier class counts as the more probable, as in `predicted`,
    so that k = 1 is the accuracy.
    """
    true = np.take_along_axis(log_probs, codes[:, None], axis=1)
    before = np.arange(log_probs.shape[1]) < codes[:, None]
    rank = (log_probs > true).sum(axis=1) + ((log_probs == true) & before).sum(axis=1)
    return float((rank < k).mean())


def logloss(log_probs: np.ndarray, codes: np.ndarray) -> float:
    """Mean negative log-probability of the true class, in nats; infinite where one is impossible."""
    return float(-log_probs[np.arange(len(codes)), codes].astype(np.float64).mean())


def competition_logloss(probs: np.ndarray, codes: np.ndarray) -> float:
    """The log loss that competitions score: of probabilities, each row brought to sum 1, then clipped."""
    shares = probs[np.arange(len(codes)), codes] / probs.sum(axis=1, dtype=np.float64)
    return float(-np.log(np.clip(shares, FLOOR, 1 - FLOOR)).mean())


def confusion_matrix(guesses: np.ndarray, codes: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes] int64: true class by row, predicted class by column."""
    return np.bincount(codes * classes + guesses, minlength=classes * classes).reshape(classes, classes)


def per_class_table(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Per class [C]: `precision`, `recall`, `f1` in [0, 1] (0 where undefined), `support`, `predicted` counts."""
    hits = np.diag(confusion).astype(np.float64)
    support, guessed = confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        "precision": _ratio(hits, guessed),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, support + guessed),
        "support": support,
        "predicted": guessed,
    }


def precision(confusion: np.ndarray, average: str = "macro") -> float:
    """Share of the rows given a class that are of it, averaged over classes by `average`."""
    return _averaged("precision", confusion, average)


def recall(confusion: np.ndarray, average: str = "macro") -> float:
    """Share of the rows of a class that are given it, averaged over classes by `average`."""
    return _averaged("recall", confusion, average)


def f1(confusion: np.ndarray, average: str = "macro") -> float:
    """Harmonic mean of a class's precision and recall, averaged over classes by `average`."""
    return _averaged("f1", confusion, average)


def summary(log_probs: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    """The figures of one epoch: `accuracy`, `logloss`, `f1_macro`."""
    return _figures(log_probs, codes, ("accuracy", "logloss", "f1_macro"))


def full_report(log_probs: np.ndarray, codes: np.ndarray, top_k: int = 5, bins: int = 15) -> dict[str, float | int]:
    """All figures: those of METRICS, `top<k>_accuracy` and `ece`, and `n`, the number of rows."""
    from fivefold.evaluation.calibration import expected_calibration_error

    return {
        "n": len(codes),
        **_figures(log_probs, codes, METRICS),
        f"top{top_k}_accuracy": top_k_accuracy(log_probs, codes, top_k),
        "ece": expected_calibration_error(log_probs, codes, bins),
    }


def wilson_interval(share: float, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share of `rows` independent rows, 95 % by default (Wilson 1927, score interval)."""
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))


def _figures(log_probs: np.ndarray, codes: np.ndarray, names: Mapping | tuple[str, ...]) -> dict[str, float]:
    confusion = confusion_matrix(predicted(log_probs), codes, log_probs.shape[1])
    return {name: choose(METRICS, "metric", name)(log_probs, codes, confusion) for name in names}


def _averaged(column: str, confusion: np.ndarray, average: str) -> float:
    table = per_class_table(confusion)
    return float(choose(AVERAGES, "average", average)(table[column], table))


def _macro(values: np.ndarray, table: Mapping[str, np.ndarray]) -> float:
    """The mean over the classes that occur, as truth or as prediction."""
    return values[(table["support"] + table["predicted"]) > 0].mean()


def _weighted(values: np.ndarray, table: Mapping[str, np.ndarray]) -> float:
    return (values * table["support"]).sum() / table["support"].sum()


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


AVERAGES = {"macro": _macro, "weighted": _weighted}

METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda log_probs, codes, confusion: accuracy(log_probs, codes),
    "logloss": lambda log_probs, codes, confusion: logloss(log_probs, codes),
    "competition_logloss": lambda log_probs, codes, confusion: competition_logloss(np.exp(log_probs), codes),
    "f1_macro": lambda log_probs, codes, confusion: f1(confusion, "macro"),
    "f1_weighted": lambda log_probs, codes, confusion: f1(confusion, "weighted"),
    "precision_macro": lambda log_probs, codes, confusion: precision(confusion, "macro"),
    "precision_weighted": lambda log_probs, codes, confusion: precision(confusion, "weighted"),
    "recall_macro": lambda log_probs, codes, confusion: recall(confusion, "macro"),
    "recall_weighted": lambda log_probs, codes, confusion: recall(confusion, "weighted"),
}
"""Every score of a report. To add one: its function above, its line here, its test."""
