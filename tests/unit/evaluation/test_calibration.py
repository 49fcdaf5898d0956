import numpy as np
import pytest

from fivefold.evaluation import metrics


def make_calibrated(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities and classes drawn from them: calibrated by construction."""
    rng = np.random.default_rng(seed)
    log_probs = metrics.apply_temperature(2 * rng.normal(size=(count, classes)), 1.0)
    edges = np.exp(log_probs).cumsum(axis=1)
    codes = (rng.random((count, 1)) > edges).sum(axis=1).clip(0, classes - 1)
    return log_probs, codes


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_fit_temperature_recovers_the_applied_temperature_and_has_the_smallest_logloss(temperature):
    log_probs, codes = make_calibrated(10_000, 6, seed=3)
    miscalibrated = metrics.apply_temperature(log_probs, 1 / temperature)
    fitted = metrics.fit_temperature(miscalibrated, codes)
    assert fitted == pytest.approx(temperature, rel=0.05)
    losses = [metrics.logloss(metrics.apply_temperature(miscalibrated, fitted * f), codes) for f in (0.99, 1, 1.01)]
    assert losses[1] == min(losses)


def test_fitted_temperature_stays_in_bounds_if_the_loss_has_no_minimum():
    log_probs = np.log([[0.6, 0.4], [0.3, 0.7]])
    coldest = metrics.fit_temperature(log_probs, np.array([0, 1]))
    assert metrics.MIN_TEMPERATURE <= coldest < 0.02, "the loss is 0 to the last bit below 0.02"
    assert metrics.fit_temperature(log_probs, np.array([1, 0])) == pytest.approx(metrics.MAX_TEMPERATURE, rel=1e-3)
    impossible = np.array([[0.0, -np.inf], [0.0, -np.inf], [-np.inf, 0.0], [np.log(0.5)] * 2])
    temperature = metrics.fit_temperature(impossible, np.array([0, 0, 0, 1]))
    assert metrics.MIN_TEMPERATURE <= temperature <= metrics.MAX_TEMPERATURE * (1 + 1e-9)


def test_temperature_1_is_the_identity_and_no_temperature_changes_the_order():
    log_probs, _ = make_calibrated(200, 5, seed=1)
    np.testing.assert_allclose(metrics.apply_temperature(log_probs, 1.0), log_probs, atol=1e-12)
    hot = metrics.apply_temperature(log_probs.astype(np.float32), 3.0)
    np.testing.assert_allclose(np.exp(hot).sum(axis=1), 1, atol=1e-6)
    assert (metrics.predicted_classes(hot) == metrics.predicted_classes(log_probs)).all()


def test_reliability_table_counts_every_row_once_and_equals_a_loop():
    log_probs, codes = make_calibrated(2_000, 3, seed=2)
    log_probs[:2] = np.log([1.0, 1e-30, 1e-30])
    table = metrics.reliability_table(log_probs, codes, 12)
    confidence, correct = np.exp(log_probs).max(axis=1), log_probs.argmax(axis=1) == codes
    assert table["rows"].sum() == 2_000
    error = 0.0
    for low, high, rows in zip(table["low"], table["high"], table["rows"], strict=True):
        inside = (confidence > low) & (confidence <= high)
        assert inside.sum() == rows
        if rows:
            error += rows / 2_000 * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.expected_calibration_error(log_probs, codes, 12) == pytest.approx(error)


def test_cross_fit_temperature_fits_each_part_on_the_others():
    log_probs, codes = make_calibrated(60, 4, seed=4)
    cross_fitted = metrics.cross_fit_temperature(log_probs, codes, parts=3)
    for part in range(3):
        others = np.arange(60) % 3 != part
        temperature = metrics.fit_temperature(log_probs[others], codes[others])
        np.testing.assert_allclose(cross_fitted[~others], metrics.apply_temperature(log_probs[~others], temperature))
    in_sample = metrics.apply_temperature(log_probs, metrics.fit_temperature(log_probs, codes))
    assert metrics.logloss(in_sample, codes) < metrics.logloss(cross_fitted, codes), "in-sample scores are optimistic"
