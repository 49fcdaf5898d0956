"""How far confidence can be believed, and the one number that mends it.

Throughout, `log_probs` is [N, C] natural logarithms and `codes` [N] the true class indices.
Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
"""

import numpy as np

COLDEST, HOTTEST = 0.01, 100.0
"""Bounds of a fitted temperature: where every row is right (or wrong), the loss falls for ever."""
NEWTON_STEPS = 100


def reliability_table(log_probs: np.ndarray, codes: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """Per bin of confidence [bins]: `low`, `high`, `rows`, mean `confidence`, `accuracy` (NaN where empty).

    Bins are of equal width and open below: (low, high], as in section 2 of the paper.
    """
    confidence = np.exp(log_probs.max(axis=1).astype(np.float64)).clip(0, 1)
    right = log_probs.argmax(axis=1) == codes
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    rows = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (confidence, right)]
    means = [np.divide(total, rows, out=np.full(bins, np.nan), where=rows > 0) for total in sums]
    return {"low": edges[:-1], "high": edges[1:], "rows": rows, "confidence": means[0], "accuracy": means[1]}


def expected_calibration_error(log_probs: np.ndarray, codes: np.ndarray, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over bins, weighted by rows (equation 3), in [0, 1]."""
    table = reliability_table(log_probs, codes, bins)
    full = table["rows"] > 0
    gap = np.abs(table["accuracy"][full] - table["confidence"][full])
    return float((gap * table["rows"][full]).sum() / table["rows"].sum())


def apply_temperature(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """log softmax(log_probs / temperature) [N, C] in the input's precision; above 1 lowers confidence."""
    scaled = log_probs.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    return (scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))).astype(log_probs.dtype)


def fit_temperature(log_probs: np.ndarray, codes: np.ndarray) -> float:
    """The temperature in [0.01, 100] at which `apply_temperature` has the least log loss (section 4.2).

    The loss is convex in 1/T, its slope the mean of E[l] - l_true under the tempered
    probabilities and its curvature their mean variance of l: Newton steps, kept inside the
    interval that is known to hold the root, and halving it where a step would leave it.
    """
    logits = np.maximum(log_probs.astype(np.float64), np.log(np.finfo(np.float64).tiny))
    true = logits[np.arange(len(codes)), codes]
    low, high = 1 / HOTTEST, 1 / COLDEST
    inverse = 1.0
    for _ in range(NEWTON_STEPS):
        slope, curvature = _slope(logits, true, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else np.inf
        new = step if low < step < high else (low + high) / 2
        if abs(new - inverse) < 1e-10 * inverse:
            break
        inverse = new
    return float(1 / inverse)


def _slope(logits: np.ndarray, true: np.ndarray, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean log loss in 1/T."""
    probs = np.exp(apply_temperature(logits, 1 / inverse))
    mean = (probs * logits).sum(axis=1)
    variance = (probs * (logits - mean[:, None]) ** 2).sum(axis=1)
    return float((mean - true).mean()), float(variance.mean())
