"""Systems, submission files and tables blended by the ensemble's entrypoint; names that mean the same car from split to score."""

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


def submission(path: Path, probs: np.ndarray, columns: tuple[str, ...] = CARS) -> Path:
    return write_csv(path, [["ID", *columns], *([name, *row] for name, row in zip(IDS, probs.tolist(), strict=True))])


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A test table with its images, a sample submission, a truth, and files of three models."""
    write_data(tmp_path / "eval", *(f"test/{name}.png" for name in IDS))
    write_csv(tmp_path / "eval" / "test.csv", [["ID", "img_path"], *([name, f"test/{name}.png"] for name in IDS)])
    write_csv(tmp_path / "eval" / "sample_submission.csv", [["ID", *CARS], *([name, 0, 0, 0] for name in IDS)])
    write_csv(tmp_path / "gt.csv", [["ID", "label"], *([name, CARS[n % 3]] for n, name in enumerate(IDS))])
    random = np.random.default_rng(0)
    submission(tmp_path / "csv" / "output_eva.csv", random.dirichlet(np.ones(3), 6))
    submission(tmp_path / "csv" / "output_nfnet.csv", random.dirichlet(np.ones(3), 6)[:, ::-1])
    labels = [[name, f"./test/{name}.png", CARS[n % 2]] for n, name in reversed(list(enumerate(IDS)))]
    write_csv(tmp_path / "labels.csv", [["ID", "image_path", "target"], *labels])
    return tmp_path


def stage(root: Path, name: str, step: str, *arguments: str, **channels: object) -> int:
    return run_stage(root, name, step, *arguments, **{"TRAIN": None, "FOLDS": None, **channels})


def values(path: Path) -> np.ndarray:
    return np.array([row[1:] for row in read_cells(path)[1:]], dtype=float)


def test_files_of_two_models_are_blended_without_any_model_of_ours(world):
    given = {"SUBMISSIONS": world / "csv"}
    assert stage(world, "ensemble", "mean", **given) == 0
    found = values(world / "mean" / "output" / "submission.csv")
    files = [values(world / "csv" / f"output_{name}.csv") for name in ("eva", "nfnet")]
    np.testing.assert_allclose(found, np.mean(files, axis=0), atol=1e-6)
    facts = json.loads((world / "mean" / "output" / "ensemble.json").read_text())
    assert facts["weights"] == {"eva": 0.5, "nfnet": 0.5}
    weights = 'ensemble.weights={"eva": 3, "nfnet": 1}'
    assert stage(world, "ensemble", "weighted", "ensemble.blend=weighted", weights, **given) == 0
    found = values(world / "weighted" / "output" / "submission.csv")
    np.testing.assert_allclose(found, 0.75 * files[0] + 0.25 * files[1], atol=1e-6)


def test_a_file_of_labels_votes_and_one_named_by_the_settings_counts_too(world):
    named = f"ensemble.submissions={json.dumps([str(world / 'labels.csv')])}"
    given = {"SUBMISSIONS": world / "csv"}
    assert stage(world, "ensemble", "vote", "ensemble.blend=vote", named, **given) == 0
    facts = json.loads((world / "vote" / "output" / "ensemble.json").read_text())
    assert set(facts["weights"]) == {"eva", "nfnet", "labels"}
    votes = [values(world / "csv" / f"output_{name}.csv") for name in ("eva", "nfnet")]
    votes.append(np.eye(3)[[n % 2 for n in range(6)]])
    counts = sum(np.eye(3)[each.argmax(axis=1)] for each in votes)
    expected = (counts + np.mean(votes, axis=0)) / 4
    np.testing.assert_allclose(values(world / "vote" / "output" / "submission.csv"), expected, atol=1e-6)


@pytest.mark.parametrize("with_probabilities", [False, True])
def test_files_of_labels_know_the_classes_of_one_another(world, with_probabilities):
    (world / "eval" / "sample_submission.csv").unlink()
    for name, row in (("a", [0, 1, 0, 1, 0, 1]), ("b", [0, 1, 2, 1, 0, 1])):
        write_csv(
            world / "votes" / f"output_{name}.csv",
            [["ID", "target"], *([i, CARS[c]] for i, c in zip(IDS, row, strict=True))],
        )
    if with_probabilities:
        submission(world / "votes" / "output_c.csv", np.full((6, 3), 1 / 3))
    assert stage(world, "ensemble", "vote", "ensemble.blend=vote", SUBMISSIONS=world / "votes") == 0
    rows = read_cells(world / "vote" / "output" / "submission.csv")
    assert rows[0] == ["ID", *sorted(CARS)]
    assert values(world / "vote" / "output" / "submission.csv")[2].argmax() in (0, 2)


def test_a_sample_of_other_rows_is_refused_and_an_index_is_no_class(world):
    rows = read_cells(world / "csv" / "output_eva.csv")
    write_csv(world / "csv" / "output_eva.csv", [["", *rows[0]], *([n, *row] for n, row in enumerate(rows[1:]))])
    given = {"SUBMISSIONS": world / "csv"}
    (world / "eval" / "sample_submission.csv").rename(world / "eval" / "sampleSubmission.csv")
    assert stage(world, "ensemble", "mean", **given) == 0
    assert read_cells(world / "mean" / "output" / "submission.csv")[0] == ["ID", *CARS]
    write_csv(world / "eval" / "sampleSubmission.csv", [["ID", *CARS], *([name.lower(), 0, 0, 0] for name in IDS)])
    assert stage(world, "ensemble", "bad", **given) == 65
    assert "6 of the 6 ids of the sample submission" in failure(world / "bad")


def test_a_changed_file_is_another_key(world, caplog):
    named = f"ensemble.submissions={world / 'csv' / 'output_eva.csv'},{world / 'csv' / 'output_nfnet.csv'}"
    assert stage(world, "ensemble", "again", named) == 0
    first = (world / "again" / "output" / "submission.csv").read_bytes()
    submission(world / "csv" / "output_eva.csv", np.full((6, 3), 1 / 3))
    with caplog.at_level("INFO", "fivefold"):
        assert stage(world, "ensemble", "again", named) == 0
    assert (world / "again" / "output" / "submission.csv").read_bytes() != first


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
def test_bad_input_gets_one_clear_error_and_leaves_nothing(world, monkeypatch, arguments, code, message):
    submission(world / "other" / "output_eva.csv", np.full((6, 3), 1 / 3))
    monkeypatch.chdir(world)
    assert stage(world, "ensemble", "bad", *arguments, SUBMISSIONS=world / "csv") == code
    assert message in failure(world / "bad")
    assert not list((world / "bad" / "output").rglob("*.*"))


def save_table(path: Path, system: str, seed: int, rows: int = len(IDS), classes: tuple[str, ...] = CARS) -> np.ndarray:
    """Writes a table of predictions; its probabilities."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logits = np.random.default_rng(seed).standard_normal((rows, len(classes)), np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.array([f"TEST_{number}" for number in range(rows)], object)
    predictions.write(path, Predictions(ids, np.full(rows, -1, np.int16), system, classes, log_probs))
    return np.exp(log_probs)


@pytest.fixture
def tables(world: Path) -> list[np.ndarray]:
    """The probabilities of the tables of two runs, as they lie in their folders."""
    names = ("eva", "nfnet")
    return [save_table(world / "runs" / n / "predictions.parquet", n, seed) for seed, n in enumerate(names)]


def blend_tables(root: Path, step: str, *arguments: str, **channels: object) -> int:
    """Runs the ensemble on the tables of runs, without an eval channel unless it is given."""
    return stage(root, "ensemble", step, *arguments, **{"EVAL": None, "SUBMISSIONS": root / "runs", **channels})


@pytest.mark.parametrize(
    ("blend", "combine"),
    [("mean", lambda a, b: (a + b) / 2), ("geometric", lambda a, b: np.sqrt(a * b) / np.sqrt(a * b).sum(1)[:, None])],
)
def test_tables_become_one_without_an_image(world, tables, blend, combine):
    assert blend_tables(world, "out", f"ensemble.blend={blend}") == 0
    expected, output = combine(*tables), world / "out" / "output"
    found = predictions.read(output / "predictions.parquet")
    assert (found.system, found.classes, found.labels) == ("eva + nfnet", CARS, None)
    np.testing.assert_allclose(np.exp(found.log_probs), expected, rtol=1e-5)
    assert [row[0] for row in read_cells(output / "submission.csv")] == ["ID", *IDS]
    np.testing.assert_allclose(values(output / "submission.csv"), expected, rtol=1e-5)
    members = json.loads((output / "ensemble.json").read_text())["members"]
    assert [member["model"] for member in members] == ["file predictions.parquet"] * 2


def test_tables_have_weights_and_answers_and_a_test_table_orders_their_rows(world, tables):
    extra = save_table(world / "output_extra.parquet", "x", 9)
    weights = 'ensemble.weights={"eva": 3, "nfnet": 0, "extra": 1}'
    arguments = ("ensemble.blend=weighted", weights, f"ensemble.submissions={world / 'output_extra.parquet'}")
    answers = ("ensemble.label_column=target", "ensemble.row_number_column=no")
    assert blend_tables(world, "out", *arguments, *answers) == 0
    best = [CARS[code] for code in (0.75 * tables[0] + 0.25 * extra).argmax(axis=1)]
    expected = [["no", "ID", "target"], *([str(n), *row] for n, row in enumerate(zip(IDS, best, strict=True)))]
    assert read_cells(world / "out" / "output" / "submission.csv") == expected
    write_csv(
        world / "eval" / "sample_submission.csv", [["key", *CARS[::-1]], *([name, 0, 0, 0] for name in IDS[::-1])]
    )
    assert blend_tables(world, "sampled", EVAL=world / "eval") == 0
    rows = read_cells(world / "sampled" / "output" / "submission.csv")
    assert (rows[0], [row[0] for row in rows[1:]]) == (["key", *CARS[::-1]], IDS[::-1])
    found = values(world / "sampled" / "output" / "submission.csv")
    np.testing.assert_allclose(found, np.mean(tables, axis=0)[::-1, ::-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda runs: save_table(runs / "x" / "predictions.parquet", "eva", 5), "are both called 'eva'"),
        (lambda runs: (runs / "eva" / "predictions.parquet").write_bytes(b"PAR1"), "is not a Parquet table"),
        (lambda runs: save_table(runs / "nfnet" / "predictions.parquet", "nfnet", 0, 5), "('TEST_5')"),
        (lambda runs: save_table(runs / "nfnet" / "predictions.parquet", "nfnet", 0, 6, CARS[:2]), "classes differ: 'K5'"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_blended_are_named_and_leave_nothing(world, tables, damage, message):
    damage(world / "runs")
    assert blend_tables(world, "out") == 65
    assert message in failure(world / "out")
    assert not list((world / "out" / "output").rglob("*.*"))


def test_a_disk_that_fills_up_leaves_nothing_half_written(world, tiny_disk):
    for seed, system in enumerate(("eva", "nfnet")):
        save_table(world / "runs" / system / "predictions.parquet", system, seed, 4000)
    assert blend_tables(world, "out", SM_OUTPUT_DATA_DIR=tiny_disk / "output") == 75
    assert "no space left to write" in failure(world / "out")
    assert not [path for path in (tiny_disk / "output").iterdir() if path.name != "predictions.parquet"]


@pytest.mark.slow
def test_five_tables_of_100_000_rows_and_100_classes_take_less_than_a_minute_and_2_gb(tmp_path):
    for seed in range(5):
        classes = tuple(f"class {number:03d}" for number in range(100))
        save_table(tmp_path / "runs" / f"output_{seed}.parquet", "s", seed, 100_000, classes)
    code = "import sys; from jobs.__main__ import main; code = main(['ensemble']); print('torch' in sys.modules); sys.exit(code)"
    environ = environment(SM_CHANNEL_SUBMISSIONS=tmp_path / "runs", SM_OUTPUT_DATA_DIR=tmp_path / "output")
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
    record = json.loads((tmp_path / "output" / "stage.json").read_text())
    assert record["peak_memory_mib"] < 2000
    assert record["cpu_seconds"] < 60


def test_merged_cars_are_one_class_from_the_split_on(world):
    noise_in(world / "train", CARS, 2)
    merge = (PAIR, "data.alias_policy=merge")
    assert stage(world, "split", "split", *merge, "split.folds=2", TRAIN=world / "train") == 0
    split = read_folds(world / "split" / "output" / "folds.parquet")
    assert split.classes == ("718_박스터", "K5")
    assert np.bincount(split.codes).tolist() == [4, 2]
    # The sample has both columns, so without a model of the one class there is nothing to part.
    assert stage(world, "ensemble", "merge", *merge, SUBMISSIONS=world / "csv" / "output_eva.csv") == 65
    assert "split and train with merge" in failure(world / "merge")


def test_truth_under_either_name_is_a_hit_of_the_merged_class(world):
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]] * 2)
    table = submission(world / "merged" / "s.csv", probs, ("718_박스터", "K5"))
    both = submission(world / "both" / "s.csv", probs[:, [0, 0, 1]] * [0.5, 0.5, 1])
    for path in (table, both):
        given = {"PREDICTIONS": path, "GROUND_TRUTH": world / "gt.csv"}
        assert stage(world, "evaluate", "score", PAIR, "data.alias_policy=merge", **given) == 0
        found = json.loads((world / "score" / "output" / "metrics.json").read_text())["test"]
        assert found["accuracy"] == 1.0
        assert found["logloss"] == pytest.approx(-np.log(0.9), abs=1e-5)


def test_the_sum_reaches_the_submission_and_not_the_table_of_predictions(world):
    given = {"SUBMISSIONS": str(world / "csv" / "output_eva.csv")}
    assert stage(world, "ensemble", "sum", PAIR, "data.alias_policy=sum", **given) == 0
    eva = values(world / "csv" / "output_eva.csv")
    both = eva[:, 0] + eva[:, 1]
    expected = np.stack([both, both, eva[:, 2]], axis=1) / (1 + both)[:, None]
    np.testing.assert_allclose(values(world / "sum" / "output" / "submission.csv"), expected, atol=1e-6)
    kept = predictions.read(world / "sum" / "output" / "predictions.parquet").with_classes(CARS)
    np.testing.assert_allclose(np.exp(kept.log_probs), eva, atol=1e-6)


def two_classes(root: Path, column: str, value: object) -> np.ndarray:
    """Files of two classes in `root`/pets, a sample of one column, and a truth; the mean probability of dog."""
    dog = np.array([0.9, 0.2, 0.7, 0.4, 0.1, 0.6])
    for name, shift in (("a", 0.05), ("b", -0.05)):
        probs = np.stack([1 - dog - shift, dog + shift], axis=1)
        submission(root / "pets" / f"output_{name}.csv", probs, ("cat", "dog"))
    write_csv(root / "eval" / "sample_submission.csv", [["ID", column], *([name, value] for name in IDS)])
    write_csv(root / "gt.csv", [["ID", "label"], *([name, ["cat", "dog"][n % 2]] for n, name in enumerate(IDS))])
    return dog


@pytest.mark.parametrize(("column", "setting"), [("dog", ()), ("label", ("ensemble.positive_class=dog",))])
def test_a_sample_of_one_probability_gets_it_and_it_is_scored_and_compared_again(world, capsys, column, setting):
    dog = two_classes(world, column, 0.5)
    assert stage(world, "ensemble", "mean", *setting, SUBMISSIONS=world / "pets") == 0
    assert f"column {column!r}: the probability of 'dog'" in capsys.readouterr().err
    path = world / "mean" / "output" / "submission.csv"
    assert read_cells(path)[0] == ["ID", column]
    np.testing.assert_allclose(values(path)[:, 0], dog, atol=1e-6)
    truth = np.arange(6) % 2
    given = {"PREDICTIONS": path, "GROUND_TRUTH": world / "gt.csv", "EVAL": None, "SUBMISSIONS": None}
    assert stage(world, "evaluate", "scored", *setting, **given) == 0
    found = json.loads((world / "scored" / "output" / "metrics.json").read_text())["test"]
    assert found["accuracy"] == pytest.approx(np.mean((dog > 0.5) == truth))
    assert found["logloss"] == pytest.approx(-np.log(np.where(truth, dog, 1 - dog)).mean(), abs=1e-6)
    files = f"compare.submissions={path},{world / 'pets' / 'output_a.csv'}"
    assert stage(world, "compare", "compared", files, *setting, **given | {"PREDICTIONS": None}) == 0
    facts = json.loads((world / "compared" / "output" / "comparison.json").read_text())["experiments"]
    assert facts[0]["test"]["logloss"] == pytest.approx(found["logloss"], abs=1e-5)


def test_a_column_whose_class_is_not_known_is_asked_for_before_anything_is_predicted(world):
    two_classes(world, "label", 0.5)
    assert stage(world, "ensemble", "asked", SUBMISSIONS=world / "pets") == 65
    assert "ensemble.positive_class" in failure(world / "asked")
    assert stage(world, "ensemble", "wrong", "ensemble.positive_class=bird", SUBMISSIONS=world / "pets") == 64
    assert not (world / "asked" / "output" / "submission.csv").exists()
