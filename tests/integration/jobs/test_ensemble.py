"""The ensemble stage on submission files and prediction tables; class aliases from the split to the score."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold import predictions
from fivefold.contract.files import read_json
from fivefold.data.split.fold_table import read_folds
from fivefold.predictions import Predictions
from toy_data import failure, noise_in, read_cells, run_stage, write_csv, write_data

CARS = ("718_박스터", "718_스파이더", "K5")
IDS = [f"TEST_{number}" for number in range(6)]
PAIR = 'data.class_aliases=[["718_박스터", "718_스파이더"]]'


def write_submission(path: Path, probs: np.ndarray, columns: tuple[str, ...] = CARS) -> Path:
    return write_csv(path, [["ID", *columns], *([name, *row] for name, row in zip(IDS, probs.tolist(), strict=True))])


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A test table with its images, a sample submission, a ground truth, and submission files of three models."""
    write_data(tmp_path / "eval", *(f"test/{name}.png" for name in IDS))
    write_csv(tmp_path / "eval" / "test.csv", [["ID", "img_path"], *([name, f"test/{name}.png"] for name in IDS)])
    write_csv(tmp_path / "eval" / "sample_submission.csv", [["ID", *CARS], *([name, 0, 0, 0] for name in IDS)])
    write_csv(tmp_path / "gt.csv", [["ID", "label"], *([name, CARS[n % 3]] for n, name in enumerate(IDS))])
    random = np.random.default_rng(0)
    write_submission(tmp_path / "csv" / "output_eva.csv", random.dirichlet(np.ones(3), 6))
    write_submission(tmp_path / "csv" / "output_nfnet.csv", random.dirichlet(np.ones(3), 6)[:, ::-1])
    labels = [[name, f"./test/{name}.png", CARS[n % 2]] for n, name in reversed(list(enumerate(IDS)))]
    write_csv(tmp_path / "labels.csv", [["ID", "image_path", "target"], *labels])
    return tmp_path


def run_without_train(root: Path, name: str, step: str, *arguments: str, **channels: object) -> int:
    return run_stage(root, name, step, *arguments, **{"TRAIN": None, "FOLDS": None, **channels})


def read_values(path: Path) -> np.ndarray:
    return np.array([row[1:] for row in read_cells(path)[1:]], dtype=float)


def blend_files(root: Path, *arguments: str, **channels: object) -> tuple[np.ndarray, dict[str, Any]]:
    """Run the ensemble, by default on the files in `csv`; return the submission's probabilities and `ensemble.json`."""
    channels = {"SUBMISSIONS": root / "csv", **channels}
    assert run_without_train(root, "ensemble", "blended", *arguments, **channels) == 0
    output = root / "blended" / "output"
    return read_values(output / "submission.csv"), read_json(output / "ensemble.json")


def test_ensemble_blends_submission_files_without_fold_models(workspace):
    files = [read_values(workspace / "csv" / f"output_{name}.csv") for name in ("eva", "nfnet")]
    blended, facts = blend_files(workspace)
    np.testing.assert_allclose(blended, np.mean(files, axis=0), atol=1e-6)
    assert facts["weights"] == {"eva": 0.5, "nfnet": 0.5}
    blended, _ = blend_files(workspace, "ensemble.blend=weighted", 'ensemble.weights={"eva": 3, "nfnet": 1}')
    np.testing.assert_allclose(blended, 0.75 * files[0] + 0.25 * files[1], atol=1e-6)


def test_label_file_named_in_the_settings_counts_as_a_vote(workspace):
    setting = f"ensemble.submissions={json.dumps([str(workspace / 'labels.csv')])}"
    blended, facts = blend_files(workspace, "ensemble.blend=vote", setting)
    assert set(facts["weights"]) == {"eva", "nfnet", "labels"}
    votes = [read_values(workspace / "csv" / f"output_{name}.csv") for name in ("eva", "nfnet")]
    votes.append(np.eye(3)[[n % 2 for n in range(6)]])
    counts = sum(np.eye(3)[probs.argmax(axis=1)] for probs in votes)
    np.testing.assert_allclose(blended, (counts + np.mean(votes, axis=0)) / 4, atol=1e-6)


@pytest.mark.parametrize("with_probabilities", [False, True])
def test_label_files_share_the_classes_of_all_files(workspace, with_probabilities):
    (workspace / "eval" / "sample_submission.csv").unlink()
    for name, codes in (("a", [0, 1, 0, 1, 0, 1]), ("b", [0, 1, 2, 1, 0, 1])):
        labels = [[row, CARS[code]] for row, code in zip(IDS, codes, strict=True)]
        write_csv(workspace / "votes" / f"output_{name}.csv", [["ID", "target"], *labels])
    if with_probabilities:
        write_submission(workspace / "votes" / "output_c.csv", np.full((6, 3), 1 / 3))
    blended, _ = blend_files(workspace, "ensemble.blend=vote", SUBMISSIONS=workspace / "votes")
    assert read_cells(workspace / "blended" / "output" / "submission.csv")[0] == ["ID", *sorted(CARS)]
    assert blended[2].argmax() in (0, 2)


def test_ensemble_rejects_sample_with_other_ids_and_ignores_index_column(workspace):
    rows = read_cells(workspace / "csv" / "output_eva.csv")
    write_csv(workspace / "csv" / "output_eva.csv", [["", *rows[0]], *([n, *row] for n, row in enumerate(rows[1:]))])
    sample = (workspace / "eval" / "sample_submission.csv").rename(workspace / "eval" / "sampleSubmission.csv")
    blend_files(workspace)
    assert read_cells(workspace / "blended" / "output" / "submission.csv")[0] == ["ID", *CARS]
    write_csv(sample, [["ID", *CARS], *([name.lower(), 0, 0, 0] for name in IDS)])
    assert run_without_train(workspace, "ensemble", "bad", SUBMISSIONS=workspace / "csv") == 65
    assert "6 of the 6 ids of the sample submission" in failure(workspace / "bad")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ensemble.submissions=absent.csv"], 66, "no file absent.csv"),
        (["ensemble.blend=geometric", "ensemble.submissions=labels.csv"], 64, "labels "),
        (["ensemble.submissions=other/output_eva.csv"], 65, "'eva'"),
        (["ensemble.submissions=gt.csv", PAIR, "data.alias_policy=sum", "ensemble.blend=rank"], 64, "gt "),
        (['data.class_aliases=[["K5", "K6"]]', "data.alias_policy=sum"], 65, "'K6'"),
        (["data.alias_policy=merge"], 64, "needs class_aliases"),
    ],
)
def test_invalid_input_fails_with_one_error_and_no_output(workspace, monkeypatch, arguments, code, message):
    write_submission(workspace / "other" / "output_eva.csv", np.full((6, 3), 1 / 3))
    monkeypatch.chdir(workspace)
    assert run_without_train(workspace, "ensemble", "bad", *arguments, SUBMISSIONS=workspace / "csv") == code
    assert message in failure(workspace / "bad")
    assert not list((workspace / "bad" / "output").rglob("*.*"))


def save_table(path: Path, system: str, seed: int, rows: int = len(IDS), classes: tuple[str, ...] = CARS) -> np.ndarray:
    """Write a prediction table and return its probabilities."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logits = np.random.default_rng(seed).standard_normal((rows, len(classes)), np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.array([f"TEST_{number}" for number in range(rows)], object)
    predictions.write(path, Predictions(ids, np.full(rows, -1, np.int16), system, classes, log_probs))
    return np.exp(log_probs)


@pytest.fixture
def tables(workspace: Path) -> list[np.ndarray]:
    """The probabilities of two runs with prediction tables."""
    names = enumerate(("eva", "nfnet"))
    return [save_table(workspace / "runs" / n / "predictions.parquet", n, seed) for seed, n in names]


def test_prediction_tables_are_blended_without_images(workspace, tables):
    submitted, facts = blend_files(workspace, "ensemble.blend=geometric", EVAL=None, SUBMISSIONS=workspace / "runs")
    expected = np.sqrt(np.prod(tables, axis=0))
    expected /= expected.sum(axis=1, keepdims=True)
    blended = predictions.read(workspace / "blended" / "output" / "predictions.parquet")
    assert (blended.system, blended.classes, blended.labels) == ("eva + nfnet", CARS, None)
    np.testing.assert_allclose(np.exp(blended.log_probs), expected, rtol=1e-5)
    np.testing.assert_allclose(submitted, expected, rtol=1e-5)
    assert [model["model"] for model in facts["members"]] == ["file predictions.parquet"] * 2


def test_blended_tables_use_weights_label_columns_and_the_row_order_of_the_sample(workspace, tables):
    extra = save_table(workspace / "output_extra.parquet", "x", 9)
    weights = 'ensemble.weights={"eva": 3, "nfnet": 0, "extra": 1}'
    arguments = ["ensemble.blend=weighted", weights, f"ensemble.submissions={workspace / 'output_extra.parquet'}"]
    arguments += ["ensemble.label_column=target", "ensemble.row_number_column=no"]
    channels = {"SUBMISSIONS": workspace / "runs", "EVAL": None}
    assert run_without_train(workspace, "ensemble", "out", *arguments, **channels) == 0
    best = [CARS[code] for code in (0.75 * tables[0] + 0.25 * extra).argmax(axis=1)]
    expected = [["no", "ID", "target"], *([str(n), *row] for n, row in enumerate(zip(IDS, best, strict=True)))]
    assert read_cells(workspace / "out" / "output" / "submission.csv") == expected
    sample = [["key", *CARS[::-1]], *([name, 0, 0, 0] for name in IDS[::-1])]
    write_csv(workspace / "eval" / "sample_submission.csv", sample)
    submitted, _ = blend_files(workspace, SUBMISSIONS=workspace / "runs")
    rows = read_cells(workspace / "blended" / "output" / "submission.csv")
    assert (rows[0], [row[0] for row in rows[1:]]) == (["key", *CARS[::-1]], IDS[::-1])
    np.testing.assert_allclose(submitted, np.mean(tables, axis=0)[::-1, ::-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda runs: save_table(runs / "x" / "predictions.parquet", "eva", 5), "are both called 'eva'"),
        (lambda runs: save_table(runs / "nfnet" / "predictions.parquet", "nfnet", 0, 5), "('TEST_5')"),
        (lambda runs: save_table(runs / "nfnet" / "predictions.parquet", "nfnet", 0, 6, CARS[:2]), "classes differ: 'K5'"),
    ],
)  # fmt: skip
def test_incompatible_tables_fail_with_an_error_and_no_output(workspace, tables, damage, message):
    damage(workspace / "runs")
    assert run_without_train(workspace, "ensemble", "out", EVAL=None, SUBMISSIONS=workspace / "runs") == 65
    assert message in failure(workspace / "out")
    assert not list((workspace / "out" / "output").rglob("*.*"))


def test_split_merges_aliased_classes(workspace):
    noise_in(workspace / "train", CARS, 2)
    merge = (PAIR, "data.alias_policy=merge")
    assert run_without_train(workspace, "split", "split", *merge, "split.folds=2", TRAIN=workspace / "train") == 0
    split = read_folds(workspace / "split" / "output" / "folds.parquet")
    assert split.classes == ("718_박스터", "K5")
    assert np.bincount(split.codes).tolist() == [4, 2]


def test_truth_with_either_alias_matches_the_merged_class(workspace):
    probs = np.array([[0.45, 0.45, 0.1], [0.45, 0.45, 0.1], [0.05, 0.05, 0.9]] * 2)
    channels = {"PREDICTIONS": write_submission(workspace / "s.csv", probs), "GROUND_TRUTH": workspace / "gt.csv"}
    assert run_without_train(workspace, "evaluate", "score", PAIR, "data.alias_policy=merge", **channels) == 0
    metrics = read_json(workspace / "score" / "output" / "metrics.json")["test"]
    assert (metrics["accuracy"], metrics["logloss"]) == (1.0, pytest.approx(-np.log(0.9), abs=1e-5))


def test_summed_aliases_change_the_submission_but_not_the_prediction_table(workspace):
    channels = {"SUBMISSIONS": workspace / "csv" / "output_eva.csv"}
    submitted, _ = blend_files(workspace, PAIR, "data.alias_policy=sum", **channels)
    eva = read_values(workspace / "csv" / "output_eva.csv")
    both = eva[:, 0] + eva[:, 1]
    np.testing.assert_allclose(submitted, np.stack([both, both, eva[:, 2]], axis=1) / (1 + both)[:, None], atol=1e-6)
    table = predictions.read(workspace / "blended" / "output" / "predictions.parquet").with_classes(CARS)
    np.testing.assert_allclose(np.exp(table.log_probs), eva, atol=1e-6)


def test_single_probability_submission_can_be_evaluated_and_compared(workspace):
    dog = np.array([0.9, 0.2, 0.7, 0.4, 0.1, 0.6])
    for name, shift in (("a", 0.05), ("b", -0.05)):
        path = workspace / "pets" / f"output_{name}.csv"
        write_submission(path, np.stack([1 - dog - shift, dog + shift], axis=1), ("cat", "dog"))
    write_csv(workspace / "eval" / "sample_submission.csv", [["ID", "label"], *([name, 0.5] for name in IDS)])
    write_csv(workspace / "gt.csv", [["ID", "label"], *([name, ["cat", "dog"][n % 2]] for n, name in enumerate(IDS))])
    setting, path = "ensemble.positive_class=dog", workspace / "blended" / "output" / "submission.csv"
    submitted, _ = blend_files(workspace, setting, SUBMISSIONS=workspace / "pets")
    assert read_cells(path)[0] == ["ID", "label"]
    np.testing.assert_allclose(submitted[:, 0], dog, atol=1e-6)
    channels = {"GROUND_TRUTH": workspace / "gt.csv", "EVAL": None}
    assert run_without_train(workspace, "evaluate", "scored", setting, PREDICTIONS=path, **channels) == 0
    metrics, truth = read_json(workspace / "scored" / "output" / "metrics.json")["test"], np.arange(6) % 2
    assert metrics["accuracy"] == pytest.approx(np.mean((dog > 0.5) == truth))
    assert metrics["logloss"] == pytest.approx(-np.log(np.where(truth, dog, 1 - dog)).mean(), abs=1e-6)
    files = f"compare.submissions={path},{workspace / 'pets' / 'output_a.csv'}"
    assert run_without_train(workspace, "compare", "compared", files, setting, **channels) == 0
    facts = read_json(workspace / "compared" / "output" / "comparison.json")["experiments"]
    assert facts[0]["test"]["logloss"] == pytest.approx(metrics["logloss"], abs=1e-5)


def test_ensemble_reruns_after_a_file_changes(workspace):
    setting = f"ensemble.submissions={workspace / 'csv' / 'output_eva.csv'},{workspace / 'csv' / 'output_nfnet.csv'}"
    first, _ = blend_files(workspace, setting, SUBMISSIONS=None)
    write_submission(workspace / "csv" / "output_eva.csv", np.full((6, 3), 1 / 3))
    assert (blend_files(workspace, setting, SUBMISSIONS=None)[0] != first).any()
