from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import gmean

from fivefold.config.schema import Ensemble
from fivefold.contract.artifacts import ModelDir
from fivefold.contract.files import write_json
from fivefold.data.readers.eval_images import SampleSubmission
from fivefold.errors import DataError, SettingsError
from fivefold.evaluation.metrics import METRICS, apply_temperature, logloss
from fivefold.inference import blending
from fivefold.inference.blending import BLENDS, apply_blend, arithmetic, fit_weights
from fivefold.inference.ensemble_spec import EnsembleSpec, check_combinable, group_by_system, read_ensemble
from fivefold.inference.submission import write_submission
from fivefold.inference.submission_reader import read_submission
from fivefold.inference.systems import BlendConfig, System, compute_weights, score_holdout
from fivefold.predictions import Predictions

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 600)
FOLD = np.arange(600) % 5
CLASSES = ("a", "b", "c", "d")


def make_log_probs(skill: float, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(600, 4))
    logits[np.arange(600), LABELS] += skill
    return log_softmax(logits, axis=1).astype(np.float32)


def log(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows)).astype(np.float32)


def make_predictions(log_probs: np.ndarray, system: str) -> Predictions:
    ids = np.array([f"row {n}" for n in range(600)], dtype=object)
    return Predictions(ids, FOLD.astype(np.int16), system, CLASSES, log_probs, np.array(CLASSES, object)[LABELS])


def make_system(name: str, log_probs: np.ndarray, holdout: bool = False) -> System:
    predictions = make_predictions(log_probs, name)
    return System(name, 4, 1, predictions, predictions if holdout else None)


def test_recipe_schema_lists_every_blend():
    # A product combines classes instead of models.
    assert set(get_args(Ensemble.model_fields["blend"].annotation)) == {*BLENDS, "product"}
    assert set(get_args(Ensemble.model_fields["seed_blend"].annotation)) <= set(BLENDS)


@pytest.mark.parametrize("name", BLENDS)
def test_every_blend_gives_probabilities_and_keeps_a_single_model_unchanged(name):
    models = [make_log_probs(1.0, 1), make_log_probs(2.0, 2)]
    blended = apply_blend(name, models)
    np.testing.assert_allclose(np.exp(blended.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    assert np.isfinite(blended).all()
    np.testing.assert_allclose(apply_blend(name, models[:1]), models[0], atol=1e-6)


def test_geometric_mean_equals_that_of_scipy_normalised_to_sum_1():
    models = [make_log_probs(1.0, 1), make_log_probs(2.0, 2), make_log_probs(0.5, 3)]
    stacked = np.exp(np.stack(models).astype(np.float64))
    weights = np.array([0.5, 0.3, 0.2])
    expected = gmean(stacked, axis=0, weights=np.broadcast_to(weights[:, None, None], stacked.shape))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(blending.geometric(models, weights)), expected, rtol=1e-5)


def test_rank_blend_equals_a_hand_computed_example():
    # Row ranks of the first model: 2, 3, 1 in class a and 2, 1, 3 in class b; of the second: 1.5, 1.5, 3 and 2.5, 2.5, 1.
    first, second = log([0.6, 0.4], [0.9, 0.1], [0.2, 0.8]), log([0.3, 0.7], [0.3, 0.7], [0.8, 0.2])
    ranked = apply_blend("rank", [first, second])
    np.testing.assert_allclose(np.exp(ranked), [[3.5 / 8, 4.5 / 8], [4.5 / 8, 3.5 / 8], [0.5, 0.5]], rtol=1e-6)
    # Only the order counts: scaling a model's log-probabilities within each class changes nothing.
    np.testing.assert_allclose(apply_blend("rank", [first * 3 - 5, second]), ranked)


def test_vote_equals_counted_votes_with_ties_broken_by_mean_probability():
    models = [make_log_probs(0.3, seed) for seed in range(7)]
    votes = np.stack([np.bincount(row, minlength=4) for row in np.stack([model.argmax(axis=1) for model in models]).T])
    average = np.mean(np.exp(np.stack(models).astype(np.float64)), axis=0)
    expected = [max(range(4), key=lambda label: (votes[row, label], average[row, label])) for row in range(600)]
    assert apply_blend("vote", models).argmax(axis=1).tolist() == expected
    assert (np.sort(votes, axis=1)[:, -1] == np.sort(votes, axis=1)[:, -2]).sum() > 10


@pytest.mark.parametrize("name", ["greedy", "greedy_accuracy"])
def test_greedy_selection_beats_its_best_model_and_repeats_models(name):
    models = [make_log_probs(1.5, 1), make_log_probs(1.4, 2), make_log_probs(0.1, 3)]
    score = METRICS["accuracy"] if name == "greedy_accuracy" else lambda log_probs, codes: -logloss(log_probs, codes)
    weights = BLENDS[name].fit(models, LABELS)
    assert weights.sum() == pytest.approx(1)
    assert score(arithmetic(models, weights), LABELS) >= max(score(model, LABELS) for model in models)
    assert weights[2] < min(0.15, *weights[:2])


def test_greedy_selection_equals_a_hand_computed_example():
    # Single losses are .4428, .5394 and 1.0397: the first model is picked first. A grid search gives the best mixture of the first two.
    probabilities = ([0.75, 0.25], [0.45, 0.55]), ([0.4, 0.6], [0.15, 0.85]), ([0.5, 0.5], [0.75, 0.25])
    models, labels = [log(*rows) for rows in probabilities], np.array([0, 1])
    weights = blending.greedy(models, labels)
    grid = np.linspace(0, 1, 1001)
    losses = -np.log([0.75 * grid + 0.4 * (1 - grid), 0.55 * grid + 0.85 * (1 - grid)]).mean(axis=0)
    assert weights[2] == 0
    assert logloss(arithmetic(models, weights), labels) == pytest.approx(losses.min(), abs=1e-5)
    assert weights[0] == pytest.approx(grid[losses.argmin()], abs=0.02)
    assert blending.greedy([models[0]] * 2, labels).tolist() == [1.0, 0.0], "the first of equal models is picked"


@pytest.mark.parametrize("name", ["fitted", "greedy", "greedy_accuracy"])
def test_weights_are_scored_on_rows_that_did_not_fit_them(name):
    models, fit = [make_log_probs(1.0, 1), make_log_probs(1.2, 2)], BLENDS[name].fit
    predicted = blending.cross_fit(models, LABELS, FOLD, fit)
    changed = LABELS.copy()
    changed[FOLD == 2] = (changed[FOLD == 2] + 1) % 4
    predicted_after_change = blending.cross_fit(models, changed, FOLD, fit)
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
    for configured in ({"x": 1, "z": 1}, {"x": 1}, {"x": 0, "y": 0}):
        with pytest.raises(SettingsError, match="systems x, y "):
            blending.weights_by_name(["x", "y"], configured)


def test_weights_are_equal_if_a_system_lacks_out_of_fold_rows(caplog):
    systems = [make_system("x", make_log_probs(1.0, 1)), System("eva", 1, 1, None, None)]
    weights, scores = compute_weights(systems, BlendConfig("greedy"))
    assert (weights.tolist(), [score["what"] for score in scores]) == ([0.5, 0.5], ["single models of x"])
    assert "no out-of-fold rows of eva" in caplog.text


def test_fitted_weights_equal_the_optimum_of_scipy():
    models = [make_log_probs(1.0, 1), make_log_probs(2.0, 2), make_log_probs(1.5, 3)]
    weights = fit_weights(models, LABELS)
    sum_is_1 = {"type": "eq", "fun": lambda w: w.sum() - 1}
    loss = lambda w: logloss(arithmetic(models, w), LABELS)  # noqa: E731
    reference = minimize(loss, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=[sum_is_1], tol=1e-10)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights, reference.x, atol=5e-3)
    assert logloss(arithmetic(models, weights), LABELS) <= reference.fun + 1e-6


def make_model_dir(fold: int | None, **changes) -> ModelDir:
    metadata = {
        "role": "fold", "system": "s", "seed": 1, "fold": fold, "folds": 3, "split": "x", "classes": ["a", "b"],
        "training": {"train.lr": 0.1}, "best": {"epoch": 1}, **changes,
    }  # fmt: skip
    return ModelDir(Path(), metadata)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([make_model_dir(0), make_model_dir(1)], "lacks fold 2 of 3"),
        (
            [make_model_dir(0), make_model_dir(1), make_model_dir(2, split="y")],
            "fold 0 of s, seed 1 and fold 2 of s, seed 1 .* different splits",
        ),
        ([make_model_dir(0), make_model_dir(1), make_model_dir(2, classes=["a", "c"])], "different classes"),
        ([make_model_dir(0), make_model_dir(1), make_model_dir(2, training={"train.lr": 0.2})], r"differ in train\.lr"),
        (
            [make_model_dir(0), make_model_dir(1), make_model_dir(2), make_model_dir(0, seed=2)],
            "seed 2 lacks fold 1, fold 2",
        ),
        ([make_model_dir(None, role="student"), make_model_dir(None, role="student", seed=2)], "several students"),
    ],
)
def test_models_that_cannot_be_combined_raise_an_error_that_names_them(models, message):
    with pytest.raises(DataError, match=message):
        check_combinable(models)


def test_complete_systems_and_seeds_can_be_combined():
    grid = product(range(3), (1, 2), "st")
    check_combinable([make_model_dir(fold, seed=seed, system=system) for fold, seed, system in grid])
    check_combinable([make_model_dir(None, role="student")])


def test_ensemble_json_round_trips(tmp_path):
    models = [make_model_dir(fold, system=system) for system in "st" for fold in range(3)]
    ensemble = EnsembleSpec(group_by_system(models), (0.75, 0.25), 1.5, "geometric", "weighted")
    assert ensemble.model_weights == [0.25] * 3 + [0.25 / 3] * 3
    write_json(tmp_path / "ensemble.json", ensemble.describe([]))
    assert read_ensemble(tmp_path / "ensemble.json", models) == ensemble
    assert read_ensemble(tmp_path / "ensemble.json", models[:3]) is None
    log_probs = [make_log_probs(1.0, seed) for seed in range(6)]
    systems = [apply_blend("geometric", group) for group in (log_probs[:3], log_probs[3:])]
    expected = apply_temperature(arithmetic(systems, np.array([0.75, 0.25])), 1.5)
    np.testing.assert_array_equal(ensemble.blend(log_probs), expected)


def test_scores_name_their_rows_and_a_single_system_has_weight_1():
    oof, predicted = make_predictions(make_log_probs(1.0, 1), "s"), make_predictions(make_log_probs(2.0, 2), "s")
    system = System("s", 5, 1, oof, predicted)
    weights, scores = compute_weights([system], BlendConfig())
    assert weights.tolist() == [1.0]
    assert [score["rows"] for score in scores] == ["out-of-fold"]
    holdout, temperature, scores = score_holdout([system], weights, BlendConfig(), "holdout")
    assert temperature != 1.0
    assert [score["rows"] for score in scores] == ["holdout", "holdout, temperature cross-fitted"]
    assert scores[1]["logloss"] <= scores[0]["logloss"]
    tempered = apply_temperature(system.holdout.log_probs, temperature)
    assert scores[1]["logloss"] > round(logloss(tempered, LABELS), 6), "a score is not optimistic"
    assert round(logloss(holdout.log_probs, LABELS), 6) == scores[1]["logloss"]
    assert len(holdout) == 600
    assert score_holdout([system], weights, BlendConfig(), "none")[1] == 1.0
    assert score_holdout([System("s", 5, 1, system.oof, None)], weights, BlendConfig(), "holdout") == (None, 1.0, [])


def test_holdout_that_chose_the_epoch_is_labelled_and_fits_no_temperature():
    holdout = make_predictions(make_log_probs(2.0, 2), "s")
    student = System("s", 1, 1, None, holdout, selected=True)
    for systems in ([student], [System("t", 5, 1, None, holdout), student]):
        weights = np.full(len(systems), 1 / len(systems))
        predictions, temperature, (score,) = score_holdout(systems, weights, BlendConfig(), "holdout")
        assert (temperature, score["rows"]) == (1.0, "holdout, which chose the epoch")
        np.testing.assert_allclose(predictions.log_probs, holdout.log_probs, atol=1e-5)


def test_weights_between_systems_are_fitted_and_scored_by_cross_fitting(caplog):
    strong = System("x", 5, 1, make_predictions(make_log_probs(3.0, 1), "x"), None)
    weak = System("y", 10, 2, make_predictions(make_log_probs(0.5, 2), "y"), None)
    weights, scores = compute_weights([strong, weak], BlendConfig())
    assert weights[0] > 0.9
    assert [score["what"] for score in scores[:2]] == ["single models of x", "means of 2 seeds of y"]
    assert scores[-1]["rows"] == "out-of-fold, cross-fitted by fold"
    assert scores[-1]["logloss"] < scores[-2]["logloss"]
    assert compute_weights([strong, weak], BlendConfig("mean"))[0].tolist() == [0.5, 0.5]
    of_one_fold = [replace(s, oof=replace(s.oof, fold=np.zeros_like(s.oof.fold))) for s in (strong, weak)]
    assert not caplog.records
    assert compute_weights(of_one_fold, BlendConfig())[0].tolist() == [0.5, 0.5]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "the weights are not fitted"


@pytest.mark.parametrize(("delimiter", "decimal"), [(";", ","), (";", "."), ("\t", ".")])
def test_submission_uses_the_separators_of_its_sample_and_can_be_read(tmp_path, delimiter, decimal):
    predicted = make_predictions(make_log_probs(1.0, 1), "s").take(np.arange(3))
    options = {"delimiter": delimiter, "decimal": decimal, "has_bom": True, "line_ending": "\r\n"}
    sample = SampleSubmission("ID", ("c", "a", "d", "b"), list(predicted.ids), **options)
    path = write_submission(tmp_path / "s.csv", predicted, sample)
    header, first, *_ = path.read_bytes().decode().split("\r\n")
    assert header.split(delimiter) == ["\ufeffID", "c", "a", "d", "b"]
    assert first.split(delimiter)[1].replace("0" + decimal, "").isdigit()
    restored = read_submission(path, list(predicted.ids), CLASSES)
    np.testing.assert_allclose(restored.log_probs, predicted.log_probs, atol=1e-5)
