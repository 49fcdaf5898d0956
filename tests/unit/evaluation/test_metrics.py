"""Scores by hand: what scikit-learn's functions are asked for, and what is our own."""

import numpy as np
import pytest
from sklearn.metrics import log_loss, top_k_accuracy_score

from fivefold.errors import SettingsError
from fivefold.evaluation import metrics


def of_guesses(guesses: list[int], classes: int) -> np.ndarray:
    """Log-probabilities whose most probable classes are `guesses`."""
    return np.log(np.where(np.arange(classes) == np.array(guesses)[:, None], 0.6, 0.4 / (classes - 1)))


CODES = np.array([0, 0, 0, 0, 1, 1])
GUESSES = [0, 0, 1, 2, 1, 1]
"""Class 2 is guessed and never true, class 3 neither: it is no part of a mean."""


def test_every_score_by_hand():
    found = metrics.full_report(of_guesses(GUESSES, 4), CODES, top_k=2, bins=1)
    # class 0: precision 1, recall 1/2; class 1: precision 2/3, recall 1; class 2: both 0
    f1 = 2 / 3, 4 / 5, 0
    expected = {
        "n": 6,
        "accuracy": 4 / 6,
        "logloss": -(4 * np.log(0.6) + 2 * np.log(0.4 / 3)) / 6,
        "competition_logloss": -(4 * np.log(0.6) + 2 * np.log(0.4 / 3)) / 6,
        "f1_macro": sum(f1) / 3,
        "f1_weighted": (4 * f1[0] + 2 * f1[1]) / 6,
        "precision_macro": (1 + 2 / 3 + 0) / 3,
        "precision_weighted": (4 * 1 + 2 * 2 / 3) / 6,
        "recall_macro": (1 / 2 + 1 + 0) / 3,
        "recall_weighted": (4 * 1 / 2 + 2 * 1) / 6,
        "top2_accuracy": 1.0,
        "ece": 4 / 6 - 0.6,
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-12)
    assert metrics.compute_metrics(of_guesses(GUESSES, 4), CODES) == {
        name: found[name] for name in metrics.EPOCH_METRICS
    }
    with pytest.raises(SettingsError, match="f1_macro"):
        metrics.compute_metrics(of_guesses(GUESSES, 4), CODES, ["f1_marco"])


def test_tables_hold_every_class():
    log_probs = of_guesses(GUESSES, 4)
    confusion = metrics.confusion_matrix(log_probs, CODES)
    assert confusion.tolist() == [[2, 1, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    table = metrics.per_class_table(log_probs, CODES)
    expected = {
        "precision": [1, 2 / 3, 0, 0],
        "recall": [1 / 2, 1, 0, 0],
        "f1": [2 / 3, 4 / 5, 0, 0],
        "support": [4, 2, 0, 0],
        "predicted": [2, 3, 1, 0],
    }
    assert list(table) == list(expected)
    for name, column in expected.items():
        np.testing.assert_allclose(table[name], column, atol=1e-12)


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (1, 3), (30, 29), (5, 100)])
def test_few_rows_of_many_classes_are_scored_without_a_warning(rows, classes):
    draw = np.random.default_rng(0)
    log_probs, codes = np.log(draw.dirichlet(np.ones(classes), rows)), draw.permutation(np.arange(rows) % classes)
    assert all(np.isfinite(value) for value in metrics.full_report(log_probs, codes).values())
    assert metrics.confusion_matrix(log_probs, codes).sum() == rows
    assert metrics.per_class_table(log_probs, codes)["support"].sum() == rows


def test_logloss_and_top_k_are_scikit_learns():
    draw = np.random.default_rng(7)
    probs, codes = draw.dirichlet(np.ones(7), 500), draw.integers(0, 7, 500)
    assert metrics.logloss(np.log(probs), codes) == pytest.approx(log_loss(codes, probs, labels=range(7)))
    assert metrics.top_k_accuracy(np.log(probs), codes, 3) == top_k_accuracy_score(codes, probs, k=3)
    assert metrics.logloss(np.array([[-50.0, 0.0]]), np.array([0])) == 50.0
    equal = np.log(np.full((3, 3), 1 / 3))
    assert [metrics.top_k_accuracy(equal, np.arange(3), k) for k in (1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_competition_logloss_renormalises_then_clips():
    codes = np.array([0, 1])
    found = metrics.competition_logloss(np.array([[2.0, 2.0], [3.0, 1.0]]), codes)
    assert found == pytest.approx((np.log(2) + np.log(4)) / 2)
    certain_and_wrong = metrics.competition_logloss(np.array([[0.0, 1.0], [0.0, 1.0]]), codes)
    assert certain_and_wrong == pytest.approx(-np.log(1e-15) / 2)


def test_interval_of_a_share():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20
    assert metrics.wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_rows_that_are_alike_count_as_one_and_others_as_themselves():
    draw = np.random.default_rng(1)
    right = draw.random(300) < 0.8
    assert metrics.effective_rows(right, np.arange(300)) == pytest.approx(300)
    threefold = metrics.effective_rows(np.repeat(right, 3), np.repeat(np.arange(300), 3))
    assert threefold == pytest.approx(300, rel=0.01)
    assert 240 < metrics.effective_rows(right, np.arange(300) // 2) <= 300
    assert metrics.effective_rows(np.ones(9, bool), np.repeat(np.arange(3), 3)) == 3
    assert metrics.effective_rows(right, np.zeros(300, int)) == 1


def test_the_interval_of_groups_covers_what_it_says():
    """Shares of 60 groups of 10 rows that are nearly alike, drawn 300 times: the truth, 0.7, is in 95 of 100 intervals."""
    draw, inside, naive = np.random.default_rng(2), 0, 0
    groups = np.repeat(np.arange(60), 10)
    for _ in range(300):
        right = draw.random(600) < draw.beta(1.4, 0.6, 60)[groups]
        for rows in (metrics.effective_rows(right, groups), 600):
            low, high = metrics.wilson_interval(float(right.mean()), rows)
            inside, naive = inside + (low < 0.7 < high) * (rows != 600), naive + (low < 0.7 < high) * (rows == 600)
    assert 0.91 < inside / 300 < 0.98
    assert naive / 300 < 0.8
