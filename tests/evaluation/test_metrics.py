"""Scores, against scikit-learn and by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as reference

from fivefold.errors import SettingsError
from fivefold.evaluation import metrics


def rows(count: int, classes: int, seed: int, missing: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of a weak model and the truth, in which the last `missing` classes never occur."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, classes - missing, count)
    logits = draw.normal(size=(count, classes))
    logits[np.arange(count), codes] += 1.0
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_probs.astype(np.float32), codes


@pytest.mark.parametrize(("classes", "missing"), [(2, 0), (7, 0), (7, 3), (40, 5)])
def test_every_score_is_that_of_scikit_learn(classes, missing):
    log_probs, codes = rows(500, classes, seed=classes, missing=missing)
    guesses, probs = log_probs.argmax(axis=1), np.exp(log_probs.astype(np.float64))
    found = metrics.full_report(log_probs, codes, top_k=3)
    expected = {
        "n": 500,
        "accuracy": reference.accuracy_score(codes, guesses),
        "logloss": reference.log_loss(codes, probs / probs.sum(axis=1, keepdims=True), labels=range(classes)),
        "f1_macro": reference.f1_score(codes, guesses, average="macro"),
        "f1_weighted": reference.f1_score(codes, guesses, average="weighted"),
        "recall_weighted": reference.recall_score(codes, guesses, average="weighted", zero_division=0),
        "precision_macro": reference.precision_score(codes, guesses, average="macro", zero_division=0),
        "precision_weighted": reference.precision_score(codes, guesses, average="weighted", zero_division=0),
        "recall_macro": reference.recall_score(codes, guesses, average="macro", zero_division=0),
    }
    if classes > 2:
        expected["top3_accuracy"] = reference.top_k_accuracy_score(codes, log_probs, k=3, labels=range(classes))
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_summary_is_a_part_of_the_full_report():
    log_probs, codes = rows(100, 5, seed=1)
    full = metrics.full_report(log_probs, codes)
    assert metrics.summary(log_probs, codes) == {name: full[name] for name in ("accuracy", "logloss", "f1_macro")}


def test_scores_by_hand():
    probs = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    codes = np.array([0, 1, 0, 2])
    log_probs = np.log(probs)
    assert metrics.accuracy(log_probs, codes) == 0.75
    assert metrics.logloss(log_probs, codes) == pytest.approx(-np.log([0.5, 0.8, 0.25, 0.6]).mean())
    # Class 0: precision 1, recall 1/2; class 1: precision 1/2, recall 1; class 2: both 1.
    assert metrics.summary(log_probs, codes)["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_top_k_with_equal_probabilities_is_the_accuracy_at_1_and_everything_at_c():
    log_probs = np.log(np.full((6, 3), 1 / 3))
    codes = np.array([0, 0, 1, 1, 2, 2])
    found = [metrics.top_k_accuracy(log_probs, codes, k) for k in (1, 2, 3, 9)]
    assert found == pytest.approx([metrics.accuracy(log_probs, codes), 2 / 3, 1.0, 1.0])
    assert found[0] == pytest.approx(1 / 3)


def test_competition_logloss_renormalises_then_clips():
    codes = np.array([0, 1])
    assert metrics.competition_logloss(np.array([[2.0, 2.0], [3.0, 1.0]]), codes) == pytest.approx(
        (np.log(2) + np.log(4)) / 2
    )
    certain_and_wrong = metrics.competition_logloss(np.array([[0.0, 1.0], [0.0, 1.0]]), codes)
    assert certain_and_wrong == pytest.approx(-np.log(1e-15) / 2)
    assert metrics.logloss(np.array([[-50.0, 0.0]]), np.array([0])) == 50.0


def test_confusion_matrix_and_per_class_table_are_scikit_learns():
    log_probs, codes = rows(300, 9, seed=4, missing=2)
    guesses = metrics.predicted(log_probs)
    confusion = metrics.confusion_matrix(guesses, codes, 9)
    np.testing.assert_array_equal(confusion, reference.confusion_matrix(codes, guesses, labels=range(9)))
    expected = reference.precision_recall_fscore_support(codes, guesses, labels=range(9), zero_division=0)
    table = metrics.per_class_table(confusion)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose(table[name], column, atol=1e-12)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (357, 360), (410, 500)])
def test_interval_is_scipys(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert metrics.wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_unknown_average_lists_the_known():
    with pytest.raises(SettingsError, match="macro, weighted"):
        metrics.f1(np.eye(2, dtype=int), "marco")
