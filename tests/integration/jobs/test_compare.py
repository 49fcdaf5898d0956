"""The compare stage over runs and submission files, by its entrypoint."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from fivefold import predictions
from fivefold.contract.files import write_json
from fivefold.predictions import Predictions
from jobs.__main__ import run
from toy_data import failure, read_rows, write_csv

CLASSES = ("K5", "모닝", "레이")
IDS = [f"TEST_{n}" for n in range(40)]
CODES = np.arange(40) % 3


def guesses(seed: int, skill: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(40, 3))
    logits[np.arange(40), CODES] += skill
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def submission(path: Path, probs: np.ndarray) -> Path:
    return write_csv(path, [["ID", *CLASSES], *([name, *row] for name, row in zip(IDS, probs.tolist(), strict=True))])


def make_run(folder: Path, seed: int, skill: float) -> Path:
    """A run's ensemble and two fold models, as their stages leave them."""
    submission(folder / "ensemble" / "output" / "mine.csv", guesses(seed, skill))
    write_json(folder / "ensemble" / "output" / "ensemble.json", {"submission": "mine.csv", "members": []})
    for fold in range(2):
        model = folder / f"fold-{fold}" / "model"
        model.mkdir(parents=True)
        rows = np.arange(40) % 2 == fold
        labels = np.array(CLASSES, object)[CODES[rows]]
        found = Predictions(
            np.array([f"train {n}" for n in np.flatnonzero(rows)], object),
            np.full(rows.sum(), fold, np.int16), "s", CLASSES,
            np.log(guesses(seed + 9, skill)[rows]).astype(np.float32), labels,
        )  # fmt: skip
        predictions.write(model / "oof.parquet", found)
        write_json(model / "model.json", {"role": "fold", "system": "s", "seed": 1, "fold": fold})
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_run(tmp_path / "A", 1, 3.0)
    make_run(tmp_path / "B", 2, 1.0)
    submission(tmp_path / "csv" / "output_eva.csv", guesses(3, 2.0))
    labels = [[name, CLASSES[code]] for name, code in zip(IDS, CODES, strict=True)]
    write_csv(tmp_path / "csv" / "output_표.csv", [["ID", "target"], *labels])
    write_csv(tmp_path / "gt.csv", [["ID", "label"], *labels[::-1]])
    return tmp_path


def compare(root: Path, *arguments: str, **channels: str) -> int:
    environment = {"SM_OUTPUT_DATA_DIR": str(root / "out"), "SM_OUTPUT_DIR": str(root / "failed")}
    return run("compare", arguments, environment | {f"SM_CHANNEL_{name}": path for name, path in channels.items()})


def test_runs_and_files_side_by_side(world, capsys):
    runs = f"compare.runs={world / 'A'},{world / 'B'}"
    assert compare(world, runs, SUBMISSIONS=str(world / "csv"), GROUND_TRUTH=str(world / "gt.csv")) == 0
    out = world / "out"
    found = read_rows(out / "comparison.csv")
    assert [row["experiment"] for row in found] == ["A", "B", "eva", "표"]
    for row, probs in zip(found, (guesses(1, 3.0), guesses(2, 1.0), guesses(3, 2.0)), strict=False):
        assert float(row["test_accuracy"]) == pytest.approx(accuracy_score(CODES, probs.argmax(axis=1)))
        assert float(row["test_logloss"]) == pytest.approx(log_loss(CODES, probs), abs=1e-5)
        assert row["test_n"] == "40"
    assert (found[3]["test_accuracy"], found[3]["test_logloss"]) == ("1.000000", "")
    assert float(found[0]["oof_logloss"]) == pytest.approx(log_loss(CODES, guesses(10, 3.0)), abs=1e-5)
    assert found[2]["oof_n"] == ""
    stacked = read_rows(out / "all_experiments_submission_compare.csv")
    assert list(stacked[0]) == ["experiment", "ID", *sorted(CLASSES)]
    assert [row["experiment"] for row in stacked[::40]] == ["A", "B", "eva", "표"]
    assert float(stacked[45]["모닝"]) == pytest.approx(guesses(2, 1.0)[5, 1], abs=1e-6)
    facts = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert facts["likeness"]["names"] == ["A", "B", "eva", "표"]
    share = (guesses(1, 3.0).argmax(axis=1) == guesses(2, 1.0).argmax(axis=1)).mean()
    assert facts["likeness"]["agreement"][0][1] == pytest.approx(share)
    for name in ("model_acc.png", "correlation.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "2 fold models of s" in page
    assert set(json.loads(capsys.readouterr().out)) == {"A", "B", "eva", "표"}
    paired = read_rows(out / "paired.csv")
    assert [(row["first"], row["second"]) for row in paired[:2]] == [("A", "B"), ("A", "eva")]
    assert len(paired) == len(facts["paired"]) == 6
    difference = accuracy_score(CODES, guesses(1, 3.0).argmax(1)) - accuracy_score(CODES, guesses(2, 1.0).argmax(1))
    assert float(paired[0]["accuracy"]) == pytest.approx(difference)
    assert (paired[2]["second"], paired[2]["logloss"]) == ("표", "")
    assert "McNemar" in page
    record = json.loads((out / "stage.json").read_text())
    assert len(record["outputs"]) == 7


def test_a_run_whose_submission_lost_the_probabilities_is_scored_by_its_predictions(world, capsys):
    """A submission of numbers, paths and classes, as the sketches have it; the truth goes by the paths."""
    paths = [f"{name}.JPEG" for name in IDS]
    for name, seed, skill in (("A", 1, 3.0), ("B", 2, 1.0)):
        folder, probs = world / name / "ensemble" / "output", guesses(seed, skill)
        answers = [[n, path, CLASSES[code]] for n, (path, code) in enumerate(zip(paths, probs.argmax(1), strict=True))]
        write_csv(folder / "mine.csv", [["ID", "image_path", "target"], *answers])
        ids, unknown = np.array(paths, object), np.full(40, -1, np.int16)
        predictions.write(
            folder / "predictions.parquet", Predictions(ids, unknown, "", CLASSES, np.log(probs).astype(np.float32))
        )
    labels = [[path, CLASSES[code]] for path, code in zip(paths, CODES, strict=True)]
    write_csv(world / "gt.csv", [["image_path", "label"], *labels[::-1]])
    numbered = [[n, *row] for n, row in enumerate(labels)]
    other = write_csv(world / "other.csv", [["ID", "image_path", "target"], *numbered])
    runs = f"compare.runs={world / 'A'},{world / 'B'}"
    assert compare(world, runs, f"compare.submissions={other}", GROUND_TRUTH=str(world)) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for name, seed, skill in (("A", 1, 3.0), ("B", 2, 1.0)):
        probs = guesses(seed, skill)
        assert figures[name]["accuracy"] == pytest.approx(accuracy_score(CODES, probs.argmax(1)))
        assert figures[name]["logloss"] == pytest.approx(log_loss(CODES, probs), rel=1e-5)
    assert (figures["other"]["accuracy"], figures["other"]["logloss"]) == (1, None)


def test_files_of_classes_alone_are_tested_by_their_accuracy(world):
    wrong = [[name, CLASSES[(code + (n < 8)) % 3]] for n, (name, code) in enumerate(zip(IDS, CODES, strict=True))]
    write_csv(world / "wrong.csv", [["ID", "target"], *wrong])
    files = f"compare.submissions={world / 'csv' / 'output_표.csv'},{world / 'wrong.csv'}"
    assert compare(world, files, GROUND_TRUTH=str(world / "gt.csv")) == 0
    (row,) = read_rows(world / "out" / "paired.csv")
    assert (float(row["accuracy"]), row["logloss"], float(row["p"])) == (0.2, "", pytest.approx(2 / 2**8, abs=1e-6))


def test_without_ground_truth_out_of_fold_rows_are_shown(world, capsys):
    for name in "AB":
        (world / name / "ensemble" / "output" / "ensemble.json").unlink()
    (world / "runs").mkdir()
    for name in "AB":
        (world / name).rename(world / "runs" / name)
    assert compare(world, RUNS=str(world / "runs")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["B"]["logloss"] == pytest.approx(log_loss(CODES, guesses(11, 1.0)), abs=1e-5)
    assert (world / "out" / "model_acc.png").is_file()
    assert not (world / "out" / "all_experiments_submission_compare.csv").exists()
    facts = json.loads((world / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert facts["likeness"]["rows"] == "40 out-of-fold rows"
    assert [(row["first"], row["second"], row["n"]) for row in facts["paired"]] == [("A", "B", 40)]


def test_files_alone_without_truth_are_compared_by_likeness_and_a_changed_file_is_seen(world, caplog):
    files = [submission(world / name / "submission.csv", guesses(seed, 1.0)) for seed, name in enumerate("xy")]
    given = f"compare.submissions={files[0]},{files[1]}"
    assert compare(world, given) == 0
    first = json.loads((world / "out" / "comparison.json").read_text())
    assert first["likeness"]["names"] == ["x/submission", "y/submission"]
    assert len(first["notes"]) == 1
    assert first["paired"] == []
    assert not (world / "out" / "paired.csv").exists()
    assert not (world / "out" / "model_acc.png").exists()
    submission(files[0], guesses(1, 1.0))
    assert compare(world, given) == 0
    again = json.loads((world / "out" / "comparison.json").read_text())
    assert again["likeness"]["agreement"][0][1] == 1 > first["likeness"]["agreement"][0][1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 66, "0 experiments are too few"),
        (["compare.runs={root}/A"], 66, "1 experiments are too few"),
        (["compare.runs={root}/A,{root}/absent"], 66, "no run {root}/absent"),
        (["compare.submissions={root}/absent.csv"], 66, "no submission file {root}/absent.csv"),
        (["compare.runs={root}/A,{root}/csv"], 66, "holds neither ensemble.json nor fold models"),
        (["compare.runs={root}/A,{root}/A"], 65, "two experiments are called"),
        (["compare.runs={root}/A,{root}"], 65, "several ensembles in the run"),
        (["compare.submissions={root}/csv/output_eva.csv,{root}/odd.csv"], 65, "different classes: 'K9'"),
        (["compare.submissions={root}/csv/output_eva.csv,{root}/short.csv"], 65, "31 of the 40 ids"),
        (["compare.run={root}/A"], 64, "did you mean 'compare.runs'"),
    ],
)
def test_bad_input_gets_one_clear_error_and_leaves_nothing(world, arguments, code, message):
    write_csv(world / "odd.csv", [["ID", "K5", "K9", "레이", "모닝"], *([name, 1, 0, 0, 0] for name in IDS)])
    write_csv(world / "short.csv", [["ID", *CLASSES], *([name, 0.5, 0.5, 0] for name in IDS[:9])])
    assert compare(world, *(text.format(root=world) for text in arguments)) == code
    assert message.format(root=world) in failure(world / "failed")
    assert not list((world / "out").rglob("*.*"))
