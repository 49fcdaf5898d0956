"""The compare stage on runs and submission files, through its entrypoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from fivefold import predictions
from fivefold.contract.files import read_json, write_json
from fivefold.predictions import Predictions
from jobs.__main__ import run
from toy_data import failure, read_rows, write_csv

CLASSES = ("K5", "모닝", "레이")
IDS = [f"TEST_{n}" for n in range(40)]
CODES = np.arange(40) % 3


def make_probabilities(seed: int, skill: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(40, 3))
    logits[np.arange(40), CODES] += skill
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def write_submission(path: Path, probs: np.ndarray) -> Path:
    return write_csv(path, [["ID", *CLASSES], *([name, *row] for name, row in zip(IDS, probs.tolist(), strict=True))])


def make_run(folder: Path, seed: int, skill: float) -> Path:
    """Write an ensemble and two fold models as the stages of a run write them."""
    write_submission(folder / "ensemble" / "output" / "mine.csv", make_probabilities(seed, skill))
    write_json(folder / "ensemble" / "output" / "ensemble.json", {"submission": "mine.csv", "members": []})
    for fold in range(2):
        model = folder / f"fold-{fold}" / "model"
        model.mkdir(parents=True)
        rows = np.arange(40) % 2 == fold
        labels = np.array(CLASSES, object)[CODES[rows]]
        ids, folds = np.array([f"train {n}" for n in np.flatnonzero(rows)], object), np.full(rows.sum(), fold, np.int16)
        log_probs = np.log(make_probabilities(seed + 9, skill)[rows]).astype(np.float32)
        predictions.write(model / "oof.parquet", Predictions(ids, folds, "s", CLASSES, log_probs, labels))
        write_json(model / "model.json", {"role": "fold", "system": "s", "seed": 1, "fold": fold})
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    make_run(tmp_path / "A", 1, 3.0)
    make_run(tmp_path / "B", 2, 1.0)
    write_submission(tmp_path / "csv" / "output_eva.csv", make_probabilities(3, 2.0))
    labels = [[name, CLASSES[code]] for name, code in zip(IDS, CODES, strict=True)]
    write_csv(tmp_path / "csv" / "output_표.csv", [["ID", "target"], *labels])
    write_csv(tmp_path / "gt.csv", [["ID", "label"], *labels[::-1]])
    return tmp_path


def compare(root: Path, *arguments: str, **channels: str) -> int:
    environment = {"SM_OUTPUT_DATA_DIR": str(root / "out"), "SM_OUTPUT_DIR": str(root / "failed")}
    return run("compare", arguments, environment | {f"SM_CHANNEL_{name}": path for name, path in channels.items()})


def test_compare_reports_runs_and_submission_files_in_one_table(workspace, capsys):
    runs = f"compare.runs={workspace / 'A'},{workspace / 'B'}"
    assert compare(workspace, runs, SUBMISSIONS=str(workspace / "csv"), GROUND_TRUTH=str(workspace / "gt.csv")) == 0
    out, names = workspace / "out", ["A", "B", "eva", "표"]
    probs = [make_probabilities(1, 3.0), make_probabilities(2, 1.0), make_probabilities(3, 2.0)]
    accuracies = [accuracy_score(CODES, each.argmax(axis=1)) for each in probs]
    results = read_rows(out / "comparison.csv")
    assert [row["experiment"] for row in results] == names
    assert [float(row["test_accuracy"]) for row in results] == pytest.approx([*accuracies, 1])
    losses = [log_loss(CODES, each) for each in probs]
    assert [float(row["test_logloss"]) for row in results[:3]] == pytest.approx(losses, abs=1e-5)
    assert (results[0]["test_n"], results[2]["oof_n"], results[3]["test_logloss"]) == ("40", "", "")
    assert float(results[0]["oof_logloss"]) == pytest.approx(log_loss(CODES, make_probabilities(10, 3.0)), abs=1e-5)
    stacked = read_rows(out / "all_experiments_submission_compare.csv")
    assert list(stacked[0]) == ["experiment", "ID", *sorted(CLASSES)]
    assert [row["experiment"] for row in stacked[::40]] == names
    assert float(stacked[45]["모닝"]) == pytest.approx(probs[1][5, 1], abs=1e-6)
    facts = read_json(out / "comparison.json")
    assert facts["likeness"]["names"] == names
    share = (probs[0].argmax(axis=1) == probs[1].argmax(axis=1)).mean()
    assert facts["likeness"]["agreement"][0][1] == pytest.approx(share)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("model_acc.png", "correlation.png"))
    assert "2 fold models of s" in (out / "compare.html").read_text(encoding="utf-8")
    assert list(json.loads(capsys.readouterr().out)) == names
    paired = read_rows(out / "paired.csv")
    assert [(row["first"], row["second"]) for row in paired[:2]] == [("A", "B"), ("A", "eva")]
    assert len(paired) == len(facts["paired"]) == 6
    assert float(paired[0]["accuracy"]) == pytest.approx(accuracies[0] - accuracies[1])
    assert (paired[2]["second"], paired[2]["logloss"]) == ("표", "")
    assert len(read_json(out / "stage.json")["outputs"]) == 7


def test_run_with_label_submission_is_scored_by_its_prediction_table(workspace, capsys):
    """The submission has row numbers, paths and classes, as in the sketch recipe. The truth is keyed by path."""
    paths = [f"{name}.JPEG" for name in IDS]
    for name, seed, skill in (("A", 1, 3.0), ("B", 2, 1.0)):
        folder, probs = workspace / name / "ensemble" / "output", make_probabilities(seed, skill)
        answers = [[n, path, CLASSES[code]] for n, (path, code) in enumerate(zip(paths, probs.argmax(1), strict=True))]
        write_csv(folder / "mine.csv", [["ID", "image_path", "target"], *answers])
        ids, unknown = np.array(paths, object), np.full(40, -1, np.int16)
        predictions.write(
            folder / "predictions.parquet", Predictions(ids, unknown, "", CLASSES, np.log(probs).astype(np.float32))
        )
    labels = [[path, CLASSES[code]] for path, code in zip(paths, CODES, strict=True)]
    write_csv(workspace / "gt.csv", [["image_path", "label"], *labels[::-1]])
    numbered = [[n, *row] for n, row in enumerate(labels)]
    other = write_csv(workspace / "other.csv", [["ID", "image_path", "target"], *numbered])
    runs = f"compare.runs={workspace / 'A'},{workspace / 'B'}"
    assert compare(workspace, runs, f"compare.submissions={other}", GROUND_TRUTH=str(workspace)) == 0
    figures = json.loads(capsys.readouterr().out)
    for name, seed, skill in (("A", 1, 3.0), ("B", 2, 1.0)):
        probs = make_probabilities(seed, skill)
        assert figures[name]["accuracy"] == pytest.approx(accuracy_score(CODES, probs.argmax(1)))
        assert figures[name]["logloss"] == pytest.approx(log_loss(CODES, probs), rel=1e-5)
    assert (figures["other"]["accuracy"], figures["other"]["logloss"]) == (1, None)


def test_label_files_are_paired_by_accuracy_only(workspace):
    wrong = [[name, CLASSES[(code + (n < 8)) % 3]] for n, (name, code) in enumerate(zip(IDS, CODES, strict=True))]
    write_csv(workspace / "wrong.csv", [["ID", "target"], *wrong])
    files = f"compare.submissions={workspace / 'csv' / 'output_표.csv'},{workspace / 'wrong.csv'}"
    assert compare(workspace, files, GROUND_TRUTH=str(workspace / "gt.csv")) == 0
    (row,) = read_rows(workspace / "out" / "paired.csv")
    assert (float(row["accuracy"]), row["logloss"], float(row["p"])) == (0.2, "", pytest.approx(2 / 2**8, abs=1e-6))


def test_compare_uses_out_of_fold_rows_without_ground_truth(workspace, capsys):
    (workspace / "runs").mkdir()
    for name in "AB":
        (workspace / name / "ensemble" / "output" / "ensemble.json").unlink()
        shutil.move(workspace / name, workspace / "runs" / name)
    assert compare(workspace, RUNS=str(workspace / "runs")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["B"]["logloss"] == pytest.approx(log_loss(CODES, make_probabilities(11, 1.0)), abs=1e-5)
    names = {path.name for path in (workspace / "out").iterdir()}
    assert ("model_acc.png" in names, "all_experiments_submission_compare.csv" in names) == (True, False)
    facts = read_json(workspace / "out" / "comparison.json")
    assert facts["likeness"]["rows"] == "40 out-of-fold rows"
    assert [(row["first"], row["second"], row["n"]) for row in facts["paired"]] == [("A", "B", 40)]


def test_files_without_truth_are_compared_by_agreement_and_recompared_after_a_change(workspace):
    paths = [workspace / name / "submission.csv" for name in "xy"]
    for seed, path in enumerate(paths):
        write_submission(path, make_probabilities(seed, 1.0))
    setting = f"compare.submissions={paths[0]},{paths[1]}"
    assert compare(workspace, setting) == 0
    first = read_json(workspace / "out" / "comparison.json")
    assert first["likeness"]["names"] == ["x/submission", "y/submission"]
    assert (len(first["notes"]), first["paired"]) == (1, [])
    assert not {path.name for path in (workspace / "out").iterdir()} & {"paired.csv", "model_acc.png"}
    write_submission(paths[0], make_probabilities(1, 1.0))
    assert compare(workspace, setting) == 0
    again = read_json(workspace / "out" / "comparison.json")
    assert again["likeness"]["agreement"][0][1] == 1 > first["likeness"]["agreement"][0][1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compare.runs={root}/A"], 66, "1 experiments are too few"),
        (["compare.runs={root}/A,{root}/absent"], 66, "no run {root}/absent"),
        (["compare.submissions={root}/absent.csv"], 66, "no submission file {root}/absent.csv"),
        (["compare.runs={root}/A,{root}/csv"], 66, "holds neither ensemble.json nor fold models"),
        (["compare.runs={root}/A,{root}/A"], 65, "two experiments are called"),
        (["compare.runs={root}/A,{root}"], 65, "several ensembles in the run"),
        (["compare.submissions={root}/csv/output_eva.csv,{root}/odd.csv"], 65, "different classes: 'K9'"),
        (["compare.submissions={root}/csv/output_eva.csv,{root}/short.csv"], 65, "31 of the 40 ids"),
    ],
)
def test_invalid_input_fails_with_one_error_and_no_output(workspace, arguments, code, message):
    write_csv(workspace / "odd.csv", [["ID", "K5", "K9", "레이", "모닝"], *([name, 1, 0, 0, 0] for name in IDS)])
    write_csv(workspace / "short.csv", [["ID", *CLASSES], *([name, 0.5, 0.5, 0] for name in IDS[:9])])
    assert compare(workspace, *(text.format(root=workspace) for text in arguments)) == code
    assert message.format(root=workspace) in failure(workspace / "failed")
    assert not list((workspace / "out").rglob("*.*"))
