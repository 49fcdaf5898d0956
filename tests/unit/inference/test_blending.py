"""Blends compared with hand-computed numbers, reference implementations and simpler special cases."""

from typing import get_args

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import gmean

from fivefold.config.schema import Ensemble
from fivefold.errors import SettingsError
from fivefold.evaluation.metrics import METRICS, logloss
from fivefold.inference.blending import (
    BLENDS,
    apply_blend,
    arithmetic,
    cross_fit,
    equal_weights,
    geometric,
    greedy,
    greedy_accuracy,
    rank,
    vote,
    weights_by_name,
)
from fivefold.inference.systems import BlendConfig, System, compute_weights, score_holdout
from fivefold.predictions import Predictions

RANDOM = np.random.default_rng(1)
ROWS = 400
LABELS = RANDOM.integers(0, 3, ROWS)
FOLD = np.arange(ROWS) % 4


def make_log_probs(skill: float, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(ROWS, 3))
    logits[np.arange(ROWS), LABELS] += skill
    return log_softmax(logits, axis=1).astype(np.float32)


def log(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows)).astype(np.float32)


def make_system(name: str, log_probs: np.ndarray, holdout: bool = False) -> System:
    ids = np.array([f"row {n}" for n in range(ROWS)], dtype=object)
    labels = np.array(list("abc"), object)[LABELS]
    predictions = Predictions(ids, FOLD.astype(np.int16), name, ("a", "b", "c"), log_probs, labels)
    return System(name, 4, 1, predictions, predictions if holdout else None)


def test_recipe_schema_lists_every_blend():
    # A product combines classes instead of models.
    assert set(get_args(Ensemble.model_fields["blend"].annotation)) == {*BLENDS, "product"}
    assert set(get_args(Ensemble.model_fields["seed_blend"].annotation)) <= set(BLENDS)


@pytest.mark.parametrize("name", BLENDS)
def test_every_blend_gives_probabilities_and_keeps_a_single_model_unchanged(name):
    models = [make_log_probs(1.0, 1), make_log_probs(2.0, 2)]
    blended = apply_blend(name, models, equal_weights(2))
    np.testing.assert_allclose(np.exp(blended.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    assert np.isfinite(blended).all()
    np.testing.assert_allclose(apply_blend(name, models[:1], equal_weights(1)), models[0], atol=1e-6)


def test_geometric_mean_equals_that_of_scipy_normalised_to_sum_1():
    models = [make_log_probs(1.0, 1), make_log_probs(2.0, 2), make_log_probs(0.5, 3)]
    stacked = np.exp(np.stack(models).astype(np.float64))
    weights = np.broadcast_to(np.array([0.5, 0.3, 0.2])[:, None, None], stacked.shape)
    expected = gmean(stacked, axis=0, weights=weights)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(geometric(models, np.array([0.5, 0.3, 0.2]))), expected, rtol=1e-5)


def test_rank_blend_equals_a_hand_computed_example():
    # Row ranks of the first model: 2, 3, 1 in class a and 2, 1, 3 in class b; of the second: 1.5, 1.5, 3 and 2.5, 2.5, 1.
    first, second = log([0.6, 0.4], [0.9, 0.1], [0.2, 0.8]), log([0.3, 0.7], [0.3, 0.7], [0.8, 0.2])
    expected = np.array([[3.5, 4.5], [4.5, 3.5], [4.0, 4.0]])
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(rank([first, second], equal_weights(2))), expected, rtol=1e-6)
    # Only the order counts: scaling a model's log-probabilities within each class changes nothing.
    np.testing.assert_allclose(rank([first * 3 - 5, second], equal_weights(2)), rank([first, second], equal_weights(2)))


def test_vote_equals_counted_votes_with_ties_broken_by_mean_probability():
    models = [make_log_probs(0.3, seed) for seed in range(7)]
    predicted = vote(models, equal_weights(7)).argmax(axis=1)
    votes = np.stack([np.bincount(row, minlength=3) for row in np.stack([model.argmax(axis=1) for model in models]).T])
    average = np.mean(np.exp(np.stack(models).astype(np.float64)), axis=0)
    expected = [max(range(3), key=lambda label: (votes[row, label], average[row, label])) for row in range(ROWS)]
    assert predicted.tolist() == expected
    assert (np.sort(votes, axis=1)[:, -1] == np.sort(votes, axis=1)[:, -2]).sum() > 10


@pytest.mark.parametrize("pick", [greedy, greedy_accuracy])
def test_greedy_selection_beats_its_best_model_and_repeats_models(pick):
    models = [make_log_probs(1.5, 1), make_log_probs(1.4, 2), make_log_probs(0.1, 3)]
    loss = {greedy: logloss, greedy_accuracy: lambda predicted, labels: -METRICS["accuracy"](predicted, labels)}[pick]
    weights = pick(models, LABELS)
    assert weights.sum() == pytest.approx(1)
    assert loss(arithmetic(models, weights), LABELS) <= min(loss(model, LABELS) for model in models)
    assert weights[2] < 0.1 < min(weights[:2])


def test_greedy_selection_equals_a_hand_computed_example():
    # Single losses are .4428, .5394 and 1.0397: the first model is picked first. A grid search gives the best mixture of the first two.
    probabilities = ([0.75, 0.25], [0.45, 0.55]), ([0.4, 0.6], [0.15, 0.85]), ([0.5, 0.5], [0.75, 0.25])
    models, labels = [log(*rows) for rows in probabilities], np.array([0, 1])
    weights = greedy(models, labels)
    grid = np.linspace(0, 1, 1001)
    losses = -np.log([0.75 * grid + 0.4 * (1 - grid), 0.55 * grid + 0.85 * (1 - grid)]).mean(axis=0)
    assert weights[2] == 0
    assert logloss(arithmetic(models, weights), labels) == pytest.approx(losses.min(), abs=1e-5)
    assert weights[0] == pytest.approx(grid[losses.argmin()], abs=0.02)
    assert greedy([models[0]] * 2, labels).tolist() == [1.0, 0.0], "the first of equal models is picked"


@pytest.mark.parametrize("name", ["fitted", "greedy", "greedy_accuracy"])
def test_weights_are_scored_on_rows_that_did_not_fit_them(name):
    models, fit = [make_log_probs(1.0, 1), make_log_probs(1.2, 2)], BLENDS[name].fit
    predicted = cross_fit(models, LABELS, FOLD, fit)
    changed = LABELS.copy()
    changed[FOLD == 2] = (changed[FOLD == 2] + 1) % 3
    predicted_after_change = cross_fit(models, changed, FOLD, fit)
    np.testing.assert_array_equal(predicted[FOLD == 2], predicted_after_change[FOLD == 2])
    weights, scores = compute_weights([make_system("x", models[0]), make_system("y", models[1])], BlendConfig(name))
    np.testing.assert_array_equal(weights, fit(models, LABELS))
    assert (scores[-1]["what"], scores[-1]["rows"]) == (BLENDS[name].description, "out-of-fold, cross-fitted by fold")
    assert scores[-1]["logloss"] == pytest.approx(logloss(predicted, LABELS), abs=1e-5)


@pytest.mark.parametrize("name", ["geometric", "rank", "vote"])
def test_blend_without_weights_is_scored_as_it_predicts(name):
    models = [make_log_probs(1.0, 1), make_log_probs(1.2, 2), make_log_probs(0.3, 3)]
    systems = [make_system(str(n), model, holdout=True) for n, model in enumerate(models)]
    weights, scores = compute_weights(systems, BlendConfig(name))
    assert weights.tolist() == [1 / 3] * 3
    assert (scores[-1]["what"], scores[-1]["rows"]) == (BLENDS[name].description, "out-of-fold")
    combined = BLENDS[name].combine(models, weights)
    assert scores[-1]["accuracy"] == pytest.approx(METRICS["accuracy"](combined, LABELS), abs=1e-6)
    holdout, _, holdout_scores = score_holdout(systems, weights, BlendConfig(name), "none")
    np.testing.assert_array_equal(holdout.log_probs, combined)
    assert holdout_scores[0]["what"] == f"12 models, mean within a system, {name} between"


def test_configured_weights_are_matched_by_system_name():
    systems = [make_system("x", make_log_probs(1.0, 1)), make_system("y", make_log_probs(1.2, 2))]
    weights, scores = compute_weights(systems, BlendConfig("weighted", {"y": 3, "x": 1}))
    assert weights.tolist() == [0.25, 0.75]
    assert scores[-1]["what"] == "given weights between the systems"
    for configured, message in (({"x": 1, "z": 1}, "'z'"), ({"x": 1}, "lacks y"), ({"x": 0, "y": 0}, "all 0")):
        with pytest.raises(SettingsError, match=message):
            weights_by_name(["x", "y"], configured)


def test_weights_are_equal_if_a_system_lacks_out_of_fold_rows(caplog):
    systems = [make_system("x", make_log_probs(1.0, 1)), System("eva", 1, 1, None, None)]
    weights, scores = compute_weights(systems, BlendConfig("greedy"))
    assert (weights.tolist(), [score["what"] for score in scores]) == ([0.5, 0.5], ["single models of x"])
    assert "no out-of-fold rows of eva" in caplog.text
