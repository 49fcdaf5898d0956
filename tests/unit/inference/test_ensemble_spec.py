from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from fivefold.contract.artifacts import ModelDir
from fivefold.contract.files import write_json
from fivefold.data.readers.eval_images import SampleSubmission
from fivefold.errors import DataError
from fivefold.evaluation.metrics import apply_temperature, logloss
from fivefold.inference.blending import apply_blend, arithmetic, fit_weights
from fivefold.inference.ensemble_spec import EnsembleSpec, check_combinable, group_by_system, read_ensemble
from fivefold.inference.submission import write_submission
from fivefold.inference.submission_reader import read_submission
from fivefold.inference.systems import BlendConfig, System, compute_weights, score_holdout
from fivefold.predictions import Predictions
from toy_data import read_cells

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 600)
FOLD = np.arange(600) % 5
CLASSES = ("a", "b", "c", "d")


def make_log_probs(skill: float, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(600, 4))
    logits[np.arange(600), LABELS] += skill
    return log_softmax(logits, axis=1).astype(np.float32)


def make_predictions(log_probs: np.ndarray, system: str, fold: np.ndarray = FOLD) -> Predictions:
    ids = np.array([f"row {n}" for n in range(len(log_probs))], dtype=object)
    labels = np.array(CLASSES, dtype=object)[LABELS[: len(log_probs)]]
    return Predictions(ids, fold.astype(np.int16), system, CLASSES, log_probs, labels)


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
        ([make_model_dir(0), make_model_dir(1), make_model_dir(2), make_model_dir(2)], "4 models for 3 folds"),
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
    systems = [apply_blend("geometric", group, np.full(3, 1 / 3)) for group in (log_probs[:3], log_probs[3:])]
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


def test_submission_has_the_columns_and_row_order_of_the_sample(tmp_path):
    predicted = make_predictions(make_log_probs(1.0, 1), "s").take(np.arange(3))
    sample = SampleSubmission("ID", ("c", "a", "d", "b"), ["row 2", "row 0", "row 1"])
    header, *rows = read_cells(write_submission(tmp_path / "s.csv", predicted, sample))
    assert (header, [row[0] for row in rows]) == (sample.header, sample.ids)
    expected = np.exp(predicted.log_probs)[[2, 0, 1]][:, [2, 0, 3, 1]]
    np.testing.assert_allclose(np.array([row[1:] for row in rows], dtype=float), expected, rtol=1e-4)
    sample_with_bom = SampleSubmission("ImageID", ("ans",), list(predicted.ids), has_bom=True, line_ending="\r\n")
    write_submission(tmp_path / "l.csv", predicted, sample_with_bom)
    assert (tmp_path / "l.csv").read_bytes().startswith(b"\xef\xbb\xbfImageID,ans\r\n")
    assert (tmp_path / "s.csv").read_bytes().startswith(b"ID,c,a,d,b\nrow 2,")


@pytest.mark.parametrize(("delimiter", "decimal"), [(";", ","), (";", "."), ("\t", ".")])
def test_submission_uses_the_separators_of_its_sample_and_can_be_read(tmp_path, delimiter, decimal):
    predicted = make_predictions(make_log_probs(1.0, 1), "s").take(np.arange(3))
    sample = SampleSubmission("ID", ("c", "a", "d", "b"), list(predicted.ids), delimiter=delimiter, decimal=decimal)
    path = write_submission(tmp_path / "s.csv", predicted, sample)
    header, first, *_ = path.read_text().splitlines()
    assert header.split(delimiter) == ["ID", "c", "a", "d", "b"]
    assert first.split(delimiter)[1].replace("0" + decimal, "").isdigit()
    restored = read_submission(path, list(predicted.ids), CLASSES)
    np.testing.assert_allclose(restored.log_probs, predicted.log_probs, atol=1e-5)
