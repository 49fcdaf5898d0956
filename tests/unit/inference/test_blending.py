"""Blends against numbers worked by hand, references, and their reductions."""

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
CODES = RANDOM.integers(0, 3, ROWS)
FOLD = np.arange(ROWS) % 4


def model(skill: float, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(ROWS, 3))
    logits[np.arange(ROWS), CODES] += skill
    return log_softmax(logits, axis=1).astype(np.float32)


def logs(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows)).astype(np.float32)


def system(name: str, log_probs: np.ndarray, holdout: bool = False) -> System:
    ids = np.array([f"row {n}" for n in range(ROWS)], dtype=object)
    table = Predictions(
        ids, FOLD.astype(np.int16), name, ("a", "b", "c"), log_probs, np.array(list("abc"), object)[CODES]
    )
    return System(name, 4, 1, table, table if holdout else None)


def test_the_recipe_names_every_blend():
    # A product joins classes, not members.
    assert set(get_args(Ensemble.model_fields["blend"].annotation)) == {*BLENDS, "product"}
    assert set(get_args(Ensemble.model_fields["seed_blend"].annotation)) <= set(BLENDS)


@pytest.mark.parametrize("name", BLENDS)
def test_every_blend_gives_probabilities_and_leaves_a_lone_member_alone(name):
    members = [model(1.0, 1), model(2.0, 2)]
    found = apply_blend(name, members, equal_weights(2))
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(apply_blend(name, members[:1], equal_weights(1)), members[0], atol=1e-6)


def test_the_geometric_mean_is_scipys_brought_to_sum_1():
    members = [model(1.0, 1), model(2.0, 2), model(0.5, 3)]
    stacked = np.exp(np.stack(members).astype(np.float64))
    weights = np.broadcast_to(np.array([0.5, 0.3, 0.2])[:, None, None], stacked.shape)
    expected = gmean(stacked, axis=0, weights=weights)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(geometric(members, np.array([0.5, 0.3, 0.2]))), expected, rtol=1e-5)


def test_ranks_by_hand():
    # Within class a the rows of the first member rank 2, 3, 1 of 3, in class b 2, 1, 3; the second's 1.5, 1.5, 3 and 2.5, 2.5, 1.
    first, second = logs([0.6, 0.4], [0.9, 0.1], [0.2, 0.8]), logs([0.3, 0.7], [0.3, 0.7], [0.8, 0.2])
    expected = np.array([[3.5, 4.5], [4.5, 3.5], [4.0, 4.0]])
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(rank([first, second], equal_weights(2))), expected, rtol=1e-6)
    # Only the order counts: sharpening a member's confidence, class by class, changes nothing.
    np.testing.assert_allclose(rank([first * 3 - 5, second], equal_weights(2)), rank([first, second], equal_weights(2)))


def test_defect_sketch_tied_votes_go_to_the_highest_mean_probability_and_not_to_the_smallest_index():
    # A vote of class indices gave this row to class 0, which both members together believe in least of the tied.
    tied = [logs([0.5, 0.1, 0.4]), logs([0.0001, 0.0999, 0.9])]
    indices = [int(each.argmax()) for each in tied]
    assert np.bincount(indices).argmax() == 0
    assert vote(tied, equal_weights(2)).argmax() == 2
    # The mean probability as one more voter: (1 + .25005, .09995, 1 + .65) / 3.
    np.testing.assert_allclose(np.exp(vote(tied, equal_weights(2)))[0], [1.25005 / 3, 0.09995 / 3, 1.65 / 3], rtol=1e-5)


def test_votes_count_as_a_counter_counts_them():
    members = [model(0.3, seed) for seed in range(7)]
    found = vote(members, equal_weights(7)).argmax(axis=1)
    votes = np.stack([np.bincount(row, minlength=3) for row in np.stack([m.argmax(axis=1) for m in members]).T])
    average = np.mean(np.exp(np.stack(members).astype(np.float64)), axis=0)
    expected = [max(range(3), key=lambda c: (votes[row, c], average[row, c])) for row in range(ROWS)]
    assert found.tolist() == expected
    assert (np.sort(votes, axis=1)[:, -1] == np.sort(votes, axis=1)[:, -2]).sum() > 10


@pytest.mark.parametrize("pick", [greedy, greedy_accuracy])
def test_greedy_selection_is_better_than_its_best_member_and_takes_members_again(pick):
    members = [model(1.5, 1), model(1.4, 2), model(0.1, 3)]
    loss = {greedy: logloss, greedy_accuracy: lambda found, codes: -METRICS["accuracy"](found, codes)}[pick]
    weights = pick(members, CODES)
    assert weights.sum() == pytest.approx(1)
    assert loss(arithmetic(members, weights), CODES) <= min(loss(each, CODES) for each in members)
    assert weights[2] < 0.1 < min(weights[:2])


def test_greedy_selection_by_hand():
    # Alone .4428, .5394 and 1.0397: the first is picked first. The best mixture of the first two is found again by grid.
    pairs = ([0.75, 0.25], [0.45, 0.55]), ([0.4, 0.6], [0.15, 0.85]), ([0.5, 0.5], [0.75, 0.25])
    members, codes = [logs(*rows) for rows in pairs], np.array([0, 1])
    weights = greedy(members, codes)
    grid = np.linspace(0, 1, 1001)
    losses = -np.log([0.75 * grid + 0.4 * (1 - grid), 0.55 * grid + 0.85 * (1 - grid)]).mean(axis=0)
    assert weights[2] == 0
    assert logloss(arithmetic(members, weights), codes) == pytest.approx(losses.min(), abs=1e-5)
    assert weights[0] == pytest.approx(grid[losses.argmin()], abs=0.02)
    assert greedy([members[0]] * 2, codes).tolist() == [1.0, 0.0], "equal members are picked in their order"


@pytest.mark.parametrize("name", ["fitted", "greedy", "greedy_accuracy"])
def test_weights_are_scored_without_the_rows_that_fitted_them(name):
    members, fit = [model(1.0, 1), model(1.2, 2)], BLENDS[name].fit
    found = cross_fit(members, CODES, FOLD, fit)
    changed = CODES.copy()
    changed[FOLD == 2] = (changed[FOLD == 2] + 1) % 3
    again = cross_fit(members, changed, FOLD, fit)
    np.testing.assert_array_equal(found[FOLD == 2], again[FOLD == 2])
    weights, scores = compute_weights([system("x", members[0]), system("y", members[1])], BlendConfig(name))
    np.testing.assert_array_equal(weights, fit(members, CODES))
    assert (scores[-1]["what"], scores[-1]["rows"]) == (BLENDS[name].description, "out-of-fold, cross-fitted by fold")
    assert scores[-1]["logloss"] == pytest.approx(logloss(found, CODES), abs=1e-5)


@pytest.mark.parametrize("name", ["geometric", "rank", "vote"])
def test_a_blend_without_weights_is_scored_as_it_predicts(name):
    members = [model(1.0, 1), model(1.2, 2), model(0.3, 3)]
    systems = [system(str(n), each, holdout=True) for n, each in enumerate(members)]
    weights, scores = compute_weights(systems, BlendConfig(name))
    assert weights.tolist() == [1 / 3] * 3
    assert (scores[-1]["what"], scores[-1]["rows"]) == (BLENDS[name].description, "out-of-fold")
    assert scores[-1]["accuracy"] == pytest.approx(
        METRICS["accuracy"](BLENDS[name].combine(members, weights), CODES), abs=1e-6
    )
    held, _, judged = score_holdout(systems, weights, BlendConfig(name), "none")
    np.testing.assert_array_equal(held.log_probs, BLENDS[name].combine(members, weights))
    assert judged[0]["what"] == f"12 models, mean within a system, {name} between"


def test_given_weights_go_by_name():
    systems = [system("x", model(1.0, 1)), system("y", model(1.2, 2))]
    weights, scores = compute_weights(systems, BlendConfig("weighted", {"y": 3, "x": 1}))
    assert weights.tolist() == [0.25, 0.75]
    assert scores[-1]["what"] == "given weights between the systems"
    for given, message in (({"x": 1, "z": 1}, "'z'"), ({"x": 1}, "lacks y"), ({"x": 0, "y": 0}, "all 0")):
        with pytest.raises(SettingsError, match=message):
            weights_by_name(["x", "y"], given)


def test_a_system_without_out_of_fold_rows_leaves_weights_equal(caplog):
    weights, scores = compute_weights(
        [system("x", model(1.0, 1)), System("eva", 1, 1, None, None)], BlendConfig("greedy")
    )
    assert (weights.tolist(), [score["what"] for score in scores]) == ([0.5, 0.5], ["single models of x"])
    assert "no out-of-fold rows of eva" in caplog.text
