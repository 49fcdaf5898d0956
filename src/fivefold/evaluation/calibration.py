"""Calibration: reliability table, expected calibration error and temperature scaling.

Throughout, `log_probs` is [N, C] natural logarithms and `codes` [N] the true class indices.
Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
"""

import numpy as np

from fivefold.evaluation.metrics import logloss

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Bounds of a fitted temperature: if every row is right (or wrong), the loss has no minimum."""


def reliability_table(log_probs: np.ndarray, codes: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """Return per bin of confidence [bins]: `low`, `high`, `rows`, mean `confidence`, `accuracy` (NaN if empty).

    Bins have equal width and are open below: (low, high], as in section 2 of the paper.
    """
    confidence = np.exp(log_probs.max(axis=1).astype(np.float64)).clip(0, 1)
    right = log_probs.argmax(axis=1) == codes
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
    """Return the temperature in [0.01, 100] that minimises the log loss of `apply_temperature` (section 4.2).

    The loss is convex in 1/T, so it has a single minimum over log T.
    """
    from scipy.optimize import minimize_scalar

    logits = np.maximum(log_probs.astype(np.float64), np.log(np.finfo(np.float64).tiny))
    fitted = minimize_scalar(
        lambda log_t: logloss(apply_temperature(logits, np.exp(log_t)), codes),
        bounds=np.log([MIN_TEMPERATURE, MAX_TEMPERATURE]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(np.exp(fitted.x))


def cross_tempered(log_probs: np.ndarray, codes: np.ndarray, parts: int = 5) -> np.ndarray:
    """Return `apply_temperature` [N, C] of each of `parts` of the rows, with the temperature fitted on the other rows."""
    result, part = np.empty_like(log_probs), np.arange(len(codes)) % parts
    for held_out in range(parts):
        in_part = part == held_out
        result[in_part] = apply_temperature(log_probs[in_part], fit_temperature(log_probs[~in_part], codes[~in_part]))
    return result
