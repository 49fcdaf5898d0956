"""Calibration: known temperatures come back, and the error is that of a sum over rows."""

import numpy as np
import pytest

from fivefold.evaluation import metrics


def calibrated(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, and a truth drawn from them: calibrated by construction."""
    draw = np.random.default_rng(seed)
    log_probs = metrics.apply_temperature(2 * draw.normal(size=(count, classes)), 1.0)
    edges = np.exp(log_probs).cumsum(axis=1)
    codes = (draw.random((count, 1)) > edges).sum(axis=1).clip(0, classes - 1)
    return log_probs, codes


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_fit_recovers_the_temperature_that_spoiled_the_probabilities(temperature):
    log_probs, codes = calibrated(30_000, 6, seed=3)
    spoiled = metrics.apply_temperature(log_probs, 1 / temperature)
    assert metrics.fit_temperature(spoiled, codes) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_has_a_smaller_logloss():
    log_probs, codes = calibrated(300, 4, seed=5)
    log_probs *= 3
    best = metrics.fit_temperature(log_probs, codes)

    def loss(temperature: float) -> float:
        return metrics.logloss(metrics.apply_temperature(log_probs, temperature), codes)

    others = [loss(t) for t in np.geomspace(0.02, 80, 400)]
    assert loss(best) <= min(others) + 1e-12
    assert loss(best) < min(loss(best * 1.01), loss(best * 0.99))


def test_a_temperature_stays_in_its_bounds_where_the_loss_falls_for_ever():
    log_probs = np.log([[0.6, 0.4], [0.3, 0.7]])
    coldest = metrics.fit_temperature(log_probs, np.array([0, 1]))
    assert metrics.MIN_TEMPERATURE <= coldest < 0.02, "the loss is 0 to the last bit below 0.02"
    assert metrics.fit_temperature(log_probs, np.array([1, 0])) == pytest.approx(metrics.MAX_TEMPERATURE, rel=1e-3)
    impossible = np.array([[0.0, -np.inf], [0.0, -np.inf], [-np.inf, 0.0], [np.log(0.5)] * 2])
    found = metrics.fit_temperature(impossible, np.array([0, 0, 0, 1]))
    assert metrics.MIN_TEMPERATURE <= found <= metrics.MAX_TEMPERATURE * (1 + 1e-9)


def test_temperature_1_changes_nothing_and_none_changes_the_order():
    log_probs, _ = calibrated(200, 5, seed=1)
    np.testing.assert_allclose(metrics.apply_temperature(log_probs, 1.0), log_probs, atol=1e-12)
    hot = metrics.apply_temperature(log_probs.astype(np.float32), 3.0)
    assert hot.dtype == np.float32
    np.testing.assert_allclose(np.exp(hot).sum(axis=1), 1, atol=1e-6)
    assert (metrics.predicted_classes(hot) == metrics.predicted_classes(log_probs)).all()


def test_calibration_error_by_hand():
    # Two rows of confidence .9, one right: |.5 - .9|; two of .6, both right: |1 - .6|.
    log_probs = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    codes = np.array([0, 1, 0, 0])
    assert metrics.expected_calibration_error(log_probs, codes, 10) == pytest.approx(0.4)
    # One bin: mean confidence .75, accuracy .75.
    assert metrics.expected_calibration_error(log_probs, codes, 1) == pytest.approx(0.0, abs=1e-12)


def test_reliability_table_counts_every_row_once_and_agrees_with_a_loop():
    log_probs, codes = calibrated(2_000, 3, seed=2)
    log_probs[:2] = np.log([1.0, 1e-30, 1e-30])
    table = metrics.reliability_table(log_probs, codes, 12)
    confidence, right = np.exp(log_probs).max(axis=1), log_probs.argmax(axis=1) == codes
    assert table["rows"].sum() == 2_000
    error = 0.0
    for low, high, rows in zip(table["low"], table["high"], table["rows"], strict=True):
        inside = (confidence > low) & (confidence <= high)
        assert inside.sum() == rows
        if rows:
            error += rows / 2_000 * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.expected_calibration_error(log_probs, codes, 12) == pytest.approx(error)


def test_each_part_is_tempered_by_the_others_alone():
    log_probs, codes = calibrated(60, 4, seed=4)
    found = metrics.cross_fit_temperature(log_probs, codes, parts=3)
    for part in range(3):
        others = np.arange(60) % 3 != part
        temperature = metrics.fit_temperature(log_probs[others], codes[others])
        np.testing.assert_allclose(found[~others], metrics.apply_temperature(log_probs[~others], temperature))
    own = metrics.apply_temperature(log_probs, metrics.fit_temperature(log_probs, codes))
    assert metrics.logloss(own, codes) < metrics.logloss(found, codes), "what fits itself flatters itself"
