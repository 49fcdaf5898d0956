import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fivefold.training.linear_probe import STRENGTHS, fit_linear


def draw(rows: int = 120, views: int = 2, numbers: int = 6, classes: int = 3, noise: float = 2.0):
    """Return features [N, V, F] on different scales, and class indices [N]."""
    random = np.random.default_rng(0)
    codes = random.integers(0, classes, rows)
    centres = random.standard_normal((classes, numbers)) * 2
    features = centres[codes][:, None] + noise * random.standard_normal((rows, views, numbers))
    scales = 10.0 ** random.integers(-2, 3, numbers)
    return torch.from_numpy((features * scales + scales).astype(np.float32)), codes


def one_hot(codes: np.ndarray, classes: int = 3) -> torch.Tensor:
    return torch.eye(classes)[codes]


def test_the_fit_equals_scikit_learns_logistic_regression():
    features, codes = draw()
    fit = fit_linear(features, one_hot(codes))
    rows = features.reshape(-1, features.shape[2]).double().numpy()
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    reference = LogisticRegression(C=1 / (fit.l2 * len(rows)), tol=1e-8, max_iter=10_000)
    reference.fit((rows - mean) / std, codes.repeat(features.shape[1]))
    logits = features.reshape(-1, features.shape[2]) @ fit.weight.T + fit.bias
    probabilities = reference.predict_proba((rows - mean) / std)
    assert np.abs(logits.softmax(dim=1).numpy() - probabilities).max() < 2e-3


def test_the_strength_depends_on_the_noise_and_is_scored_on_other_rows():
    fits = [fit_linear(features, one_hot(codes)) for features, codes in (draw(noise=0.3), draw(numbers=60, noise=30))]
    assert fits[0].l2 < fits[1].l2
    assert fits[0].logloss < 0.1 < fits[1].logloss


def test_rows_of_a_group_stay_together():
    # The last feature names the group, and a group has one class: it helps only if a group is in both parts.
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 6)
    codes = random.integers(0, 2, 40)[groups]
    features = np.eye(40, dtype=np.float32)[groups][:, None]
    leaky, honest = (fit_linear(torch.from_numpy(features), one_hot(codes, 2), g) for g in (None, groups))
    assert leaky.logloss < 0.3
    assert honest.logloss > 0.6


def test_soft_targets_equal_weighted_rows_of_scikit_learn():
    features, codes = draw(views=1)
    others = (codes + 1) % 3
    fit = fit_linear(features, 0.7 * one_hot(codes) + 0.3 * one_hot(others))
    rows = features[:, 0].double().numpy()
    scaled = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    reference = LogisticRegression(C=1 / (fit.l2 * len(rows)), tol=1e-8, max_iter=10_000)
    shares = np.repeat([0.7, 0.3], len(rows))
    reference.fit(np.tile(scaled, (2, 1)), np.concatenate([codes, others]), sample_weight=shares)
    logits = features[:, 0] @ fit.weight.T + fit.bias
    assert np.abs(logits.softmax(dim=1).numpy() - reference.predict_proba(scaled)).max() < 2e-3


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_few_rows_and_a_constant_feature_give_a_finite_head(rows):
    features, codes = draw(rows=rows)
    features[..., 0] = 3.0
    fit = fit_linear(features, one_hot(codes, 4))
    assert torch.isfinite(fit.weight).all()
    assert torch.isfinite(fit.bias).all()
    assert fit.l2 in STRENGTHS
    assert (fit.weight[:, 0].abs() < 1e-6).all()
