from dataclasses import replace
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
from fivefold.inference.blending import apply_blend, arithmetic, fit_weights, mean
from fivefold.inference.ensemble_spec import Ensemble, check_combinable, group_by_system, read_ensemble
from fivefold.inference.submission import write_submission
from fivefold.inference.submission_reader import read_submission
from fivefold.inference.systems import BlendConfig, System, compute_weights, score_holdout
from fivefold.predictions import Predictions

RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(0, 4, 600)
FOLD = np.arange(600) % 5
CLASSES = ("a", "b", "c", "d")


def model(skill: float, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(600, 4))
    logits[np.arange(600), CODES] += skill
    return log_softmax(logits, axis=1).astype(np.float32)


def table(log_probs: np.ndarray, system: str, fold: np.ndarray = FOLD) -> Predictions:
    ids = np.array([f"row {n}" for n in range(len(log_probs))], dtype=object)
    labels = np.array(CLASSES, dtype=object)[CODES[: len(log_probs)]]
    return Predictions(ids, fold.astype(np.int16), system, CLASSES, log_probs, labels)


def test_the_mean_is_that_of_probabilities():
    members = [model(1.0, 1), model(2.0, 2), model(0.5, 3)]
    np.testing.assert_allclose(np.exp(mean(members)), np.mean(np.exp(members), axis=0), rtol=1e-5)
    np.testing.assert_allclose(mean(members[:1]), members[0], atol=1e-6)


def test_fitted_weights_are_the_optimum_that_scipy_finds():
    members = [model(1.0, 1), model(2.0, 2), model(1.5, 3)]
    weights = fit_weights(members, CODES)
    sum_is_1 = {"type": "eq", "fun": lambda w: w.sum() - 1}
    loss = lambda w: logloss(arithmetic(members, w), CODES)  # noqa: E731
    reference = minimize(loss, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=[sum_is_1], tol=1e-10)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights, reference.x, atol=5e-3)
    assert logloss(arithmetic(members, weights), CODES) <= reference.fun + 1e-6


def info(fold: int | None, **changes) -> ModelDir:
    facts = {
        "role": "fold", "system": "s", "seed": 1, "fold": fold, "folds": 3, "split": "x", "classes": ["a", "b"],
        "training": {"train.lr": 0.1}, "best": {"epoch": 1}, **changes,
    }  # fmt: skip
    return ModelDir(Path(), facts)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([info(0), info(1)], "lacks fold 2 of 3"),
        ([info(0), info(1), info(2, split="y")], "fold 0 of s, seed 1 and fold 2 of s, seed 1 .* different splits"),
        ([info(0), info(1), info(2, classes=["a", "c"])], "different classes"),
        ([info(0), info(1), info(2, training={"train.lr": 0.2})], r"differ in train\.lr"),
        ([info(0), info(1), info(2), info(0, seed=2)], "seed 2 lacks fold 1, fold 2"),
        ([info(0), info(1), info(2), info(2)], "4 models for 3 folds"),
        ([info(None, role="student"), info(None, role="student", seed=2)], "several students"),
    ],
)
def test_what_may_not_stand_together_is_refused_by_name(members, message):
    with pytest.raises(DataError, match=message):
        check_combinable(members)


def test_whole_systems_and_seeds_may_stand_together():
    check_combinable([info(fold, seed=seed, system=s) for fold in range(3) for seed in (1, 2) for s in "st"])
    check_combinable([info(None, role="student")])


def test_what_ensemble_json_says_is_read_again(tmp_path):
    models = [info(fold, system=s) for s in "st" for fold in range(3)]
    ensemble = Ensemble(group_by_system(models), (0.75, 0.25), 1.5, "geometric", "weighted")
    assert ensemble.model_weights == [0.25] * 3 + [0.25 / 3] * 3
    write_json(tmp_path / "ensemble.json", ensemble.describe([]))
    assert read_ensemble(tmp_path / "ensemble.json", models) == ensemble
    assert read_ensemble(tmp_path / "ensemble.json", models[:3]) is None
    each = [model(1.0, seed) for seed in range(6)]
    systems = [
        apply_blend("geometric", each[:3], np.full(3, 1 / 3)),
        apply_blend("geometric", each[3:], np.full(3, 1 / 3)),
    ]
    expected = apply_temperature(arithmetic(systems, np.array([0.75, 0.25])), 1.5)
    np.testing.assert_array_equal(ensemble.blend(each), expected)


def test_scores_say_what_they_speak_of_and_a_single_system_is_not_weighted():
    system = System("s", 5, 1, table(model(1.0, 1), "s"), table(model(2.0, 2), "s"))
    weights, scores = compute_weights([system], BlendConfig())
    assert weights.tolist() == [1.0]
    assert [score["rows"] for score in scores] == ["out-of-fold"]
    held, temperature, scores = score_holdout([system], weights, BlendConfig(), "holdout")
    assert temperature != 1.0
    assert [score["rows"] for score in scores] == ["holdout", "holdout, temperature cross-fitted"]
    assert scores[1]["logloss"] <= scores[0]["logloss"]
    tempered = apply_temperature(system.holdout.log_probs, temperature)
    assert scores[1]["logloss"] > round(logloss(tempered, CODES), 6), "no row is scored at a temperature that it fitted"
    assert round(logloss(held.log_probs, CODES), 6) == scores[1]["logloss"]
    assert len(held) == 600
    assert score_holdout([system], weights, BlendConfig(), "none")[1] == 1.0
    assert score_holdout([System("s", 5, 1, system.oof, None)], weights, BlendConfig(), "holdout") == (None, 1.0, [])


def test_rows_that_chose_an_epoch_are_scored_as_such_and_fit_no_temperature():
    held = table(model(2.0, 2), "s")
    student = System("s", 1, 1, None, held, selected=True)
    for systems in ([student], [System("t", 5, 1, None, held), student]):
        found, temperature, (score,) = score_holdout(
            systems, np.full(len(systems), 1 / len(systems)), BlendConfig(), "holdout"
        )
        assert (temperature, score["rows"]) == (1.0, "holdout, which chose the epoch")
        np.testing.assert_allclose(found.log_probs, held.log_probs, atol=1e-5)


def test_between_systems_weights_are_fitted_and_scored_cross_fitted(caplog):
    strong = System("x", 5, 1, table(model(3.0, 1), "x"), None)
    weak = System("y", 10, 2, table(model(0.5, 2), "y"), None)
    weights, scores = compute_weights([strong, weak], BlendConfig())
    assert weights[0] > 0.9
    assert [score["what"] for score in scores[:2]] == ["single models of x", "means of 2 seeds of y"]
    assert scores[-1]["rows"] == "out-of-fold, cross-fitted by fold"
    assert scores[-1]["logloss"] < scores[-2]["logloss"]
    assert compute_weights([strong, weak], BlendConfig("mean"))[0].tolist() == [0.5, 0.5]
    without_folds = [replace(each, oof=replace(each.oof, fold=np.zeros_like(each.oof.fold))) for each in (strong, weak)]
    assert not caplog.records
    assert compute_weights(without_folds, BlendConfig())[0].tolist() == [0.5, 0.5]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "weights that are not fitted are told"


def test_a_submission_has_the_samples_columns_and_order(tmp_path):
    predicted = table(model(1.0, 1), "s").take(np.arange(3))
    write_submission(
        tmp_path / "s.csv", predicted, SampleSubmission("ID", ("c", "a", "d", "b"), ["row 2", "row 0", "row 1"])
    )
    lines = (tmp_path / "s.csv").read_text(encoding="utf-8-sig").splitlines()
    assert lines[0] == "ID,c,a,d,b"
    assert [line.split(",")[0] for line in lines[1:]] == ["row 2", "row 0", "row 1"]
    values = np.array([line.split(",")[1:] for line in lines[1:]], dtype=float)
    np.testing.assert_allclose(values, np.exp(predicted.log_probs)[[2, 0, 1]][:, [2, 0, 3, 1]], rtol=1e-4)
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-7)
    marked = SampleSubmission("ImageID", ("ans",), list(predicted.ids), has_bom=True, line_ending="\r\n")
    write_submission(tmp_path / "l.csv", predicted, marked)
    assert (tmp_path / "l.csv").read_bytes().startswith(b"\xef\xbb\xbfImageID,ans\r\n")
    assert (tmp_path / "s.csv").read_bytes().startswith(b"ID,c,a,d,b\nrow 2,")
    assert (tmp_path / "l.csv").read_text(encoding="utf-8-sig").splitlines()[1].split(",")[1] in CLASSES


@pytest.mark.parametrize(("delimiter", "decimal"), [(";", ","), (";", "."), ("\t", ".")])
def test_a_submission_is_parted_as_its_sample_and_read_again(tmp_path, delimiter, decimal):
    predicted = table(model(1.0, 1), "s").take(np.arange(3))
    wanted = SampleSubmission("ID", ("c", "a", "d", "b"), list(predicted.ids), delimiter=delimiter, decimal=decimal)
    path = write_submission(tmp_path / "s.csv", predicted, wanted)
    header, first, *_ = path.read_text().splitlines()
    assert header.split(delimiter) == ["ID", "c", "a", "d", "b"]
    assert first.split(delimiter)[1].replace("0" + decimal, "").isdigit()
    found = read_submission(path, list(predicted.ids), CLASSES)
    np.testing.assert_allclose(found.log_probs, predicted.log_probs, atol=1e-5)


def test_a_submission_of_answers_may_number_its_rows(tmp_path):
    predicted = table(model(1.0, 1), "s").take(np.arange(3))
    answers = [CLASSES[code] for code in predicted.log_probs.argmax(axis=1)]
    path, wanted = tmp_path / "output.csv", ["row 2", "row 0", "row 1"]
    write_submission(path, predicted, SampleSubmission("image_path", ("target",), wanted, row_number_column="ID"))
    expected = ["ID,image_path,target", f"0,row 2,{answers[2]}", f"1,row 0,{answers[0]}", f"2,row 1,{answers[1]}"]
    assert path.read_text().splitlines() == expected
    again = read_submission(path, wanted, CLASSES).reindex(predicted.ids)
    assert [again.classes[code] for code in again.log_probs.argmax(axis=1)] == answers


def test_a_submission_that_does_not_fit_is_refused_by_name(tmp_path):
    predicted = table(model(1.0, 1), "s").take(np.arange(3))
    for classes, ids, message in (
        (("a", "b", "c", "e"), list(predicted.ids), "'e' unknown to the models, 'd' without a column"),
        (CLASSES, ["row 0", "row 9"], r"1 of the \d+ ids of the sample submission .*'row 9'"),
        (CLASSES, ["row 0"], "2 of the 3 ids of the predictions"),
    ):
        with pytest.raises(DataError, match=message):
            write_submission(tmp_path / "s.csv", predicted, SampleSubmission("ID", classes, ids))
