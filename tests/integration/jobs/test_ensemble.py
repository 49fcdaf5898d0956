"""The ensemble stage on submission files and prediction tables; class aliases from the split to the score."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fivefold import predictions
from fivefold.data.split.fold_table import read_folds
from fivefold.predictions import Predictions
from toy_data import environment, failure, noise_in, read_cells, run_stage, write_csv, write_data

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


def test_ensemble_blends_submission_files_without_fold_models(workspace):
    channels = {"SUBMISSIONS": workspace / "csv"}
    assert run_without_train(workspace, "ensemble", "mean", **channels) == 0
    actual = read_values(workspace / "mean" / "output" / "submission.csv")
    files = [read_values(workspace / "csv" / f"output_{name}.csv") for name in ("eva", "nfnet")]
    np.testing.assert_allclose(actual, np.mean(files, axis=0), atol=1e-6)
    facts = json.loads((workspace / "mean" / "output" / "ensemble.json").read_text())
    assert facts["weights"] == {"eva": 0.5, "nfnet": 0.5}
    weights = 'ensemble.weights={"eva": 3, "nfnet": 1}'
    assert run_without_train(workspace, "ensemble", "weighted", "ensemble.blend=weighted", weights, **channels) == 0
    actual = read_values(workspace / "weighted" / "output" / "submission.csv")
    np.testing.assert_allclose(actual, 0.75 * files[0] + 0.25 * files[1], atol=1e-6)


def test_label_file_named_in_the_settings_counts_as_a_vote(workspace):
    setting = f"ensemble.submissions={json.dumps([str(workspace / 'labels.csv')])}"
    channels = {"SUBMISSIONS": workspace / "csv"}
    assert run_without_train(workspace, "ensemble", "vote", "ensemble.blend=vote", setting, **channels) == 0
    facts = json.loads((workspace / "vote" / "output" / "ensemble.json").read_text())
    assert set(facts["weights"]) == {"eva", "nfnet", "labels"}
    votes = [read_values(workspace / "csv" / f"output_{name}.csv") for name in ("eva", "nfnet")]
    votes.append(np.eye(3)[[n % 2 for n in range(6)]])
    counts = sum(np.eye(3)[probs.argmax(axis=1)] for probs in votes)
    expected = (counts + np.mean(votes, axis=0)) / 4
    np.testing.assert_allclose(read_values(workspace / "vote" / "output" / "submission.csv"), expected, atol=1e-6)


@pytest.mark.parametrize("with_probabilities", [False, True])
def test_label_files_share_the_classes_of_all_files(workspace, with_probabilities):
    (workspace / "eval" / "sample_submission.csv").unlink()
    for name, row in (("a", [0, 1, 0, 1, 0, 1]), ("b", [0, 1, 2, 1, 0, 1])):
        write_csv(
            workspace / "votes" / f"output_{name}.csv",
            [["ID", "target"], *([i, CARS[c]] for i, c in zip(IDS, row, strict=True))],
        )
    if with_probabilities:
        write_submission(workspace / "votes" / "output_c.csv", np.full((6, 3), 1 / 3))
    assert run_without_train(workspace, "ensemble", "vote", "ensemble.blend=vote", SUBMISSIONS=workspace / "votes") == 0
    rows = read_cells(workspace / "vote" / "output" / "submission.csv")
    assert rows[0] == ["ID", *sorted(CARS)]
    assert read_values(workspace / "vote" / "output" / "submission.csv")[2].argmax() in (0, 2)


def test_ensemble_rejects_sample_with_other_ids_and_ignores_index_column(workspace):
    rows = read_cells(workspace / "csv" / "output_eva.csv")
    write_csv(workspace / "csv" / "output_eva.csv", [["", *rows[0]], *([n, *row] for n, row in enumerate(rows[1:]))])
    channels = {"SUBMISSIONS": workspace / "csv"}
    (workspace / "eval" / "sample_submission.csv").rename(workspace / "eval" / "sampleSubmission.csv")
    assert run_without_train(workspace, "ensemble", "mean", **channels) == 0
    assert read_cells(workspace / "mean" / "output" / "submission.csv")[0] == ["ID", *CARS]
    write_csv(workspace / "eval" / "sampleSubmission.csv", [["ID", *CARS], *([name.lower(), 0, 0, 0] for name in IDS)])
    assert run_without_train(workspace, "ensemble", "bad", **channels) == 65
    assert "6 of the 6 ids of the sample submission" in failure(workspace / "bad")


def test_ensemble_reruns_after_a_file_changes(workspace, caplog):
    setting = f"ensemble.submissions={workspace / 'csv' / 'output_eva.csv'},{workspace / 'csv' / 'output_nfnet.csv'}"
    assert run_without_train(workspace, "ensemble", "again", setting) == 0
    first = (workspace / "again" / "output" / "submission.csv").read_bytes()
    write_submission(workspace / "csv" / "output_eva.csv", np.full((6, 3), 1 / 3))
    with caplog.at_level("INFO", "fivefold"):
        assert run_without_train(workspace, "ensemble", "again", setting) == 0
    assert (workspace / "again" / "output" / "submission.csv").read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ensemble.submissions=absent.csv"], 66, "no file absent.csv"),
        (["ensemble.blend=geometric", "ensemble.submissions=labels.csv"], 64, "labels "),
        (["ensemble.blend=weighted"], 64, "weights"),
        (["ensemble.submissions=other/output_eva.csv"], 65, "'eva'"),
        (["ensemble.submissions=gt.csv", PAIR, "data.alias_policy=sum", "ensemble.blend=rank"], 64, "gt "),
        (['data.class_aliases=[["K5", "K6"]]', "data.alias_policy=sum"], 65, "'K6'"),
        (["data.alias_policy=merge"], 64, "needs class_aliases"),
        (['data.class_aliases=[["K5", "K5"]]'], 64, "'K5'"),
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
    """Write the prediction tables of two runs and return their probabilities."""
    names = ("eva", "nfnet")
    return [save_table(workspace / "runs" / n / "predictions.parquet", n, seed) for seed, n in enumerate(names)]


def blend_tables(root: Path, step: str, *arguments: str, **channels: object) -> int:
    """Run the ensemble on the prediction tables of runs, by default without an eval channel."""
    return run_without_train(
        root, "ensemble", step, *arguments, **{"EVAL": None, "SUBMISSIONS": root / "runs", **channels}
    )


@pytest.mark.parametrize(
    ("blend", "combine"),
    [("mean", lambda a, b: (a + b) / 2), ("geometric", lambda a, b: np.sqrt(a * b) / np.sqrt(a * b).sum(1)[:, None])],
)
def test_prediction_tables_are_blended_without_images(workspace, tables, blend, combine):
    assert blend_tables(workspace, "out", f"ensemble.blend={blend}") == 0
    expected, output = combine(*tables), workspace / "out" / "output"
    blended = predictions.read(output / "predictions.parquet")
    assert (blended.system, blended.classes, blended.labels) == ("eva + nfnet", CARS, None)
    np.testing.assert_allclose(np.exp(blended.log_probs), expected, rtol=1e-5)
    assert [row[0] for row in read_cells(output / "submission.csv")] == ["ID", *IDS]
    np.testing.assert_allclose(read_values(output / "submission.csv"), expected, rtol=1e-5)
    models = json.loads((output / "ensemble.json").read_text())["members"]
    assert [model["model"] for model in models] == ["file predictions.parquet"] * 2


def test_blended_tables_use_weights_label_columns_and_the_row_order_of_the_sample(workspace, tables):
    extra = save_table(workspace / "output_extra.parquet", "x", 9)
    weights = 'ensemble.weights={"eva": 3, "nfnet": 0, "extra": 1}'
    arguments = ("ensemble.blend=weighted", weights, f"ensemble.submissions={workspace / 'output_extra.parquet'}")
    label_settings = ("ensemble.label_column=target", "ensemble.row_number_column=no")
    assert blend_tables(workspace, "out", *arguments, *label_settings) == 0
    best = [CARS[code] for code in (0.75 * tables[0] + 0.25 * extra).argmax(axis=1)]
    expected = [["no", "ID", "target"], *([str(n), *row] for n, row in enumerate(zip(IDS, best, strict=True)))]
    assert read_cells(workspace / "out" / "output" / "submission.csv") == expected
    write_csv(
        workspace / "eval" / "sample_submission.csv", [["key", *CARS[::-1]], *([name, 0, 0, 0] for name in IDS[::-1])]
    )
    assert blend_tables(workspace, "sampled", EVAL=workspace / "eval") == 0
    rows = read_cells(workspace / "sampled" / "output" / "submission.csv")
    assert (rows[0], [row[0] for row in rows[1:]]) == (["key", *CARS[::-1]], IDS[::-1])
    actual = read_values(workspace / "sampled" / "output" / "submission.csv")
    np.testing.assert_allclose(actual, np.mean(tables, axis=0)[::-1, ::-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda runs: save_table(runs / "x" / "predictions.parquet", "eva", 5), "are both called 'eva'"),
        (lambda runs: (runs / "eva" / "predictions.parquet").write_bytes(b"PAR1"), "is not a Parquet table"),
        (lambda runs: save_table(runs / "nfnet" / "predictions.parquet", "nfnet", 0, 5), "('TEST_5')"),
        (lambda runs: save_table(runs / "nfnet" / "predictions.parquet", "nfnet", 0, 6, CARS[:2]), "classes differ: 'K5'"),
    ],
)  # fmt: skip
def test_incompatible_tables_fail_with_an_error_and_no_output(workspace, tables, damage, message):
    damage(workspace / "runs")
    assert blend_tables(workspace, "out") == 65
    assert message in failure(workspace / "out")
    assert not list((workspace / "out" / "output").rglob("*.*"))


def test_full_disk_leaves_no_partial_files(workspace, tiny_disk):
    for seed, system in enumerate(("eva", "nfnet")):
        save_table(workspace / "runs" / system / "predictions.parquet", system, seed, 4000)
    assert blend_tables(workspace, "out", SM_OUTPUT_DATA_DIR=tiny_disk / "output") == 75
    assert "no space left to write" in failure(workspace / "out")
    assert not [path for path in (tiny_disk / "output").iterdir() if path.name != "predictions.parquet"]


def test_five_tables_of_20_000_rows_and_100_classes_take_less_than_12_s_and_600_mb_and_no_torch(tmp_path):
    for seed in range(5):
        classes = tuple(f"class {number:03d}" for number in range(100))
        save_table(tmp_path / "runs" / f"output_{seed}.parquet", "s", seed, 20_000, classes)
    code = "import sys; from jobs.__main__ import main; code = main(['ensemble']); print('torch' in sys.modules); sys.exit(code)"
    environ = environment(SM_CHANNEL_SUBMISSIONS=tmp_path / "runs", SM_OUTPUT_DATA_DIR=tmp_path / "output")
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
    record = json.loads((tmp_path / "output" / "stage.json").read_text())
    assert record["peak_memory_mib"] < 600
    assert record["cpu_seconds"] < 12


def test_split_merges_aliased_classes(workspace):
    noise_in(workspace / "train", CARS, 2)
    merge = (PAIR, "data.alias_policy=merge")
    assert run_without_train(workspace, "split", "split", *merge, "split.folds=2", TRAIN=workspace / "train") == 0
    split = read_folds(workspace / "split" / "output" / "folds.parquet")
    assert split.classes == ("718_박스터", "K5")
    assert np.bincount(split.codes).tolist() == [4, 2]
    # The sample has both columns, so merging needs a model trained on the merged class.
    channels = {"SUBMISSIONS": workspace / "csv" / "output_eva.csv"}
    assert run_without_train(workspace, "ensemble", "merge", *merge, **channels) == 65
    assert "split and train with merge" in failure(workspace / "merge")


def test_truth_with_either_alias_matches_the_merged_class(workspace):
    probs = np.array([[0.45, 0.45, 0.1], [0.45, 0.45, 0.1], [0.05, 0.05, 0.9]] * 2)
    channels = {"PREDICTIONS": write_submission(workspace / "s.csv", probs), "GROUND_TRUTH": workspace / "gt.csv"}
    assert run_without_train(workspace, "evaluate", "score", PAIR, "data.alias_policy=merge", **channels) == 0
    metrics = json.loads((workspace / "score" / "output" / "metrics.json").read_text())["test"]
    assert metrics["accuracy"] == 1.0
    assert metrics["logloss"] == pytest.approx(-np.log(0.9), abs=1e-5)


def test_summed_aliases_change_the_submission_but_not_the_prediction_table(workspace):
    channels = {"SUBMISSIONS": str(workspace / "csv" / "output_eva.csv")}
    assert run_without_train(workspace, "ensemble", "sum", PAIR, "data.alias_policy=sum", **channels) == 0
    eva = read_values(workspace / "csv" / "output_eva.csv")
    both = eva[:, 0] + eva[:, 1]
    expected = np.stack([both, both, eva[:, 2]], axis=1) / (1 + both)[:, None]
    np.testing.assert_allclose(read_values(workspace / "sum" / "output" / "submission.csv"), expected, atol=1e-6)
    table = predictions.read(workspace / "sum" / "output" / "predictions.parquet").with_classes(CARS)
    np.testing.assert_allclose(np.exp(table.log_probs), eva, atol=1e-6)


def write_two_class_files(root: Path, column: str, value: object) -> np.ndarray:
    """Write two-class files to `root`/pets, a one-column sample and a truth; return the mean probability of dog."""
    dog = np.array([0.9, 0.2, 0.7, 0.4, 0.1, 0.6])
    for name, shift in (("a", 0.05), ("b", -0.05)):
        probs = np.stack([1 - dog - shift, dog + shift], axis=1)
        write_submission(root / "pets" / f"output_{name}.csv", probs, ("cat", "dog"))
    write_csv(root / "eval" / "sample_submission.csv", [["ID", column], *([name, value] for name in IDS)])
    write_csv(root / "gt.csv", [["ID", "label"], *([name, ["cat", "dog"][n % 2]] for n, name in enumerate(IDS))])
    return dog


def test_single_probability_submission_can_be_evaluated_and_compared(workspace):
    dog, setting = write_two_class_files(workspace, "label", 0.5), ["ensemble.positive_class=dog"]
    assert run_without_train(workspace, "ensemble", "mean", *setting, SUBMISSIONS=workspace / "pets") == 0
    path = workspace / "mean" / "output" / "submission.csv"
    assert read_cells(path)[0] == ["ID", "label"]
    np.testing.assert_allclose(read_values(path)[:, 0], dog, atol=1e-6)
    truth = np.arange(6) % 2
    channels = {"PREDICTIONS": path, "GROUND_TRUTH": workspace / "gt.csv", "EVAL": None, "SUBMISSIONS": None}
    assert run_without_train(workspace, "evaluate", "scored", *setting, **channels) == 0
    metrics = json.loads((workspace / "scored" / "output" / "metrics.json").read_text())["test"]
    assert metrics["accuracy"] == pytest.approx(np.mean((dog > 0.5) == truth))
    assert metrics["logloss"] == pytest.approx(-np.log(np.where(truth, dog, 1 - dog)).mean(), abs=1e-6)
    files = f"compare.submissions={path},{workspace / 'pets' / 'output_a.csv'}"
    assert run_without_train(workspace, "compare", "compared", files, *setting, **channels | {"PREDICTIONS": None}) == 0
    facts = json.loads((workspace / "compared" / "output" / "comparison.json").read_text())["experiments"]
    assert facts[0]["test"]["logloss"] == pytest.approx(metrics["logloss"], abs=1e-5)


def test_unknown_class_of_a_probability_column_fails_before_prediction(workspace):
    write_two_class_files(workspace, "label", 0.5)
    assert run_without_train(workspace, "ensemble", "asked", SUBMISSIONS=workspace / "pets") == 65
    assert "ensemble.positive_class" in failure(workspace / "asked")
    assert not (workspace / "asked" / "output" / "submission.csv").exists()
    setting, channels = "ensemble.positive_class=bird", {"SUBMISSIONS": workspace / "pets"}
    assert run_without_train(workspace, "ensemble", "wrong", setting, **channels) == 64
