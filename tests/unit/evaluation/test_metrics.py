import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

from fivefold.evaluation import metrics


def make_log_probs(guesses: list[int], classes: int) -> np.ndarray:
    """Return log-probabilities whose most probable classes are `guesses`."""
    return np.log(np.where(np.arange(classes) == np.array(guesses)[:, None], 0.6, 0.4 / (classes - 1)))


CODES = np.array([0, 0, 0, 0, 1, 1])
GUESSES = [0, 0, 1, 2, 1, 1]
"""Class 2 is guessed but never true. Class 3 is neither, so no mean includes it."""


def test_full_report_equals_values_computed_by_hand():
    scores = metrics.full_report(make_log_probs(GUESSES, 4), CODES, top_k=2, bins=1)
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
    assert list(scores) == list(expected)
    assert scores == pytest.approx(expected, abs=1e-12)
    of_epoch = metrics.compute_metrics(make_log_probs(GUESSES, 4), CODES)
    assert of_epoch == {name: scores[name] for name in metrics.EPOCH_METRICS}


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (5, 100)])
def test_few_rows_of_many_classes_are_scored_without_a_warning(rows, classes):
    rng = np.random.default_rng(0)
    log_probs, codes = np.log(rng.dirichlet(np.ones(classes), rows)), rng.permutation(np.arange(rows) % classes)
    assert all(np.isfinite(value) for value in metrics.full_report(log_probs, codes).values())


def test_logloss_and_top_k_equal_scikit_learn():
    rng = np.random.default_rng(7)
    probs, codes = rng.dirichlet(np.ones(7), 500), rng.integers(0, 7, 500)
    assert metrics.logloss(np.log(probs), codes) == pytest.approx(log_loss(codes, probs, labels=range(7)))
    assert metrics.top_k_accuracy(np.log(probs), codes, 3) == top_k_accuracy_score(codes, probs, k=3)
    assert metrics.logloss(np.array([[-50.0, 0.0]]), np.array([0])) == 50.0
    equal = np.log(np.full((3, 3), 1 / 3))
    assert [metrics.top_k_accuracy(equal, np.arange(3), k) for k in (1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 30), (500, 7)])
def test_accuracy_and_f1_equal_scikit_learn(rows, classes):
    rng = np.random.default_rng(rows)
    log_probs, codes = np.log(rng.dirichlet(np.ones(classes), rows)), rng.integers(0, classes, rows)
    guesses = log_probs.argmax(axis=1)
    assert metrics.accuracy(log_probs, codes) == pytest.approx(accuracy_score(codes, guesses), abs=1e-12)
    assert metrics.f1_macro(log_probs, codes) == pytest.approx(
        f1_score(codes, guesses, average="macro", zero_division=0), abs=1e-12
    )


def test_competition_logloss_renormalises_then_clips():
    codes = np.array([0, 1])
    loss = metrics.competition_logloss(np.array([[2.0, 2.0], [3.0, 1.0]]), codes)
    assert loss == pytest.approx((np.log(2) + np.log(4)) / 2)
    certain_and_wrong = metrics.competition_logloss(np.array([[0.0, 1.0], [0.0, 1.0]]), codes)
    assert certain_and_wrong == pytest.approx(-np.log(1e-15) / 2)


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20
    assert metrics.wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_effective_rows_count_equal_rows_of_a_group_once():
    rng = np.random.default_rng(1)
    correct = rng.random(300) < 0.8
    assert metrics.effective_rows(correct, np.arange(300)) == pytest.approx(300)
    threefold = metrics.effective_rows(np.repeat(correct, 3), np.repeat(np.arange(300), 3))
    assert threefold == pytest.approx(300, rel=0.01)
    assert 240 < metrics.effective_rows(correct, np.arange(300) // 2) <= 300
    assert metrics.effective_rows(np.ones(9, bool), np.repeat(np.arange(3), 3)) == 3
    assert metrics.effective_rows(correct, np.zeros(300, int)) == 1


def test_interval_of_grouped_rows_has_its_nominal_coverage():
    """Accuracies of 60 groups of 10 similar rows, drawn 300 times: 95 of 100 intervals contain the true value, 0.7."""
    rng, inside, naive = np.random.default_rng(2), 0, 0
    groups = np.repeat(np.arange(60), 10)
    for _ in range(300):
        correct = rng.random(600) < rng.beta(1.4, 0.6, 60)[groups]
        for rows in (metrics.effective_rows(correct, groups), 600):
            low, high = metrics.wilson_interval(float(correct.mean()), rows)
            inside, naive = inside + (low < 0.7 < high) * (rows != 600), naive + (low < 0.7 < high) * (rows == 600)
    assert 0.91 < inside / 300 < 0.98
    assert naive / 300 < 0.8
