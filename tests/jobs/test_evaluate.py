"""The evaluate stage, as its container runs it, on real digits and a real (if simple) classifier."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.numpy import save_file
from sklearn import metrics as reference
from sklearn.datasets import load_digits

from fivefold import predictions
from fivefold.contract.files import write_json
from fivefold.data.folds import FoldTable, write_folds
from fivefold.predictions import Predictions
from jobs.__main__ import run

NAMES = ("id", "fold", "label", "p/three", "넷", "<b>five</b>", "=six", "seven", "eight", "nine")
"""Names of the ten digits that a careless table, page or spreadsheet would trip over."""
CLASSES = tuple(sorted(NAMES))
FOLDS = 3


@dataclass(frozen=True)
class Run:
    """The folders of a run: what split, train-fold and ensemble would have left behind."""

    folder: Path

    @property
    def channels(self) -> dict[str, str]:
        names = {
            "MODEL": "models",
            "PREDICTIONS": "ensemble",
            "EVAL": "test",
            "TRAIN": "train",
            "GROUND_TRUTH": "test/gt.csv",
        }
        return {f"SM_CHANNEL_{name}": str(self.folder / where) for name, where in names.items()}


def classify(train: np.ndarray, codes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Log-probabilities [N, 10] of a Gaussian around the mean image of each class."""
    means = np.stack([train[codes == code].mean(axis=0) for code in range(10)])
    logits = -((images[:, None] - means) ** 2).sum(axis=2) / 0.8
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def table(ids: list[str], fold: np.ndarray, log_probs: np.ndarray, codes: np.ndarray | None) -> Predictions:
    """Predictions with labels where `codes` are given; their classes in the order of the digits, not of names."""
    labels = None if codes is None else np.array([NAMES[code] for code in codes], object)
    return Predictions(np.array(ids, object), fold, "digits", NAMES, log_probs, labels)


def save(path: Path, found: Predictions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    predictions.write(path, found)


def write_images(folder: Path, names: list[str], images: np.ndarray) -> None:
    for name, pixels in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(255 * (1 - pixels.reshape(8, 8))).astype(np.uint8)).save(folder / name)


def write_csv(path: Path, rows: list[list[object]], encoding: str = "utf-8-sig") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_cells(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def make_run(folder: Path) -> Run:
    """Digits as images, three fold models' outputs with a holdout, and the ensemble's, made by really classifying."""
    digits = load_digits()
    images, codes = digits.data[:600] / 16, digits.target[:600].astype(np.int64)
    part = np.arange(600) % 6
    test, aside, train = part == 0, part == 1, part > 1
    fold = np.where(train, np.arange(600) // 6 % FOLDS, -1)
    paths = [f"img/{row:04d}.png" for row in range(600)]
    ids = [f"row-{row}" for row in range(600)]
    write_images(folder / "train", [paths[row] for row in np.flatnonzero(~test)], images[~test])
    write_models(folder / "models", images, codes, fold, aside, ids)
    write_split(folder / "models" / "split", [ids, paths], codes, fold, test, aside)
    write_ensemble(folder, images, codes, train, aside, test)
    save(
        folder / "ensemble" / "holdout.parquet",
        table(
            [ids[row] for row in np.flatnonzero(aside)],
            np.full(aside.sum(), -1),
            classify(images[train], codes[train], images[aside]),
            codes[aside],
        ),
    )
    return Run(folder)


def write_models(
    folder: Path, images: np.ndarray, codes: np.ndarray, fold: np.ndarray, aside: np.ndarray, ids: list[str]
) -> None:
    for number in range(FOLDS):
        own, others = fold == number, (fold >= 0) & (fold != number)
        found = classify(images[others], codes[others], images)
        model = folder / f"fold-{number}" / "model"
        for name, rows, of in (("oof", own, number), ("holdout", aside, -1)):
            kept = [ids[row] for row in np.flatnonzero(rows)]
            save(model / f"{name}.parquet", table(kept, np.full(len(kept), of), found[rows], codes[rows]))
        info = {"format": 1, "role": "fold", "system": "digits", "fold": number, "seed": 42, "classes": CLASSES}
        info |= {"folds": 3, "split": "x", "best": {}, "training": {}, "settings": {}, "precision": "fp32"}
        save_file(
            {"means": np.stack([images[others][codes[others] == c].mean(axis=0) for c in range(10)])},
            model / "model.safetensors",
        )
        write_json(model / "model.json", info)
        write_json(model / "stage.json", {"stage": "train-fold"})
        write_json(model / "stage.json", record(number))
        (model / "train_log.csv").write_text(
            "epoch,train_loss,train_acc,val_loss,val_acc,val_logloss,val_f1_macro,lr\n"
            + "".join(f"{e},{1 / e},{1 - 1 / (e + 1)},{1.2 / e},0.8,{1.2 / e},0.8,0.001\n" for e in (1, 2, 3))
        )


def record(fold: int) -> dict[str, object]:
    settings = {"fold": fold, "seed": 42}
    times = {"wall_seconds": 1.5, "finished": "2026-01-01T00:00:00Z"}
    made_of = {"inputs": {"folds": "00"}, "packages": {"numpy": "2"}, "fivefold": "0.1.0", "settings": settings}
    return {"stage": "train-fold", "key": f"{fold}" * 64, **made_of, **times, "outputs": {}, "metrics": {}}


def write_split(
    folder: Path, names: list[list[str]], codes: np.ndarray, fold: np.ndarray, test: np.ndarray, aside: np.ndarray
) -> None:
    order = np.array([CLASSES.index(name) for name in NAMES], np.int32)
    kept = np.flatnonzero(~test)
    ids, paths = (pa.array([column[row] for row in kept], pa.string()) for column in names)
    nothing = pa.nulls(len(kept), pa.string())
    part = np.where(aside[kept], "holdout", "train")
    folder.mkdir(parents=True)
    write_folds(
        folder / "folds.parquet",
        FoldTable(ids, paths, order[codes[kept]], CLASSES, nothing, fold[kept].astype(np.int16), part, nothing),
    )


def write_ensemble(
    folder: Path, images: np.ndarray, codes: np.ndarray, train: np.ndarray, aside: np.ndarray, test: np.ndarray
) -> None:
    ids = [f"TEST_{number:03d}" for number in range(test.sum())]
    found = classify(images[train], codes[train], images[test])
    save(folder / "ensemble" / "predictions.parquet", table(ids, np.full(len(ids), -1), found, None))
    members = [{"system": "digits", "model": f"fold {number} of digits", "weight": 1 / 3} for number in range(FOLDS)]
    write_json(folder / "ensemble" / "ensemble.json", {"members": members, "temperature": 1.25})
    write_images(folder / "test", [f"{name}.png" for name in ids], images[test])
    write_csv(folder / "test" / "test.csv", [["ID", "img_path"], *([name, f"./{name}.png"] for name in ids)])
    write_csv(
        folder / "test" / "gt.csv", [["ID", "label"], *zip(ids, [NAMES[code] for code in codes[test]], strict=True)]
    )
    probs = np.exp(found[:, [NAMES.index(name) for name in CLASSES]].astype(np.float64))
    write_csv(
        folder / "submission" / "submission.csv",
        [["ID", *CLASSES], *([name, *row] for name, row in zip(ids, probs.tolist(), strict=True))],
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("digits"))


def process(environ: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    command = [sys.executable, "-W", "error", "-m", "jobs", "evaluate", *arguments]
    return subprocess.run(command, env=kept | dict(environ), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def whole(digits: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The output of a run with every channel, and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    done = process(digits.channels | {"SM_OUTPUT_DATA_DIR": str(output)}, "evaluate.gallery=7")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return output, json.loads(line)


def refused(channels: Mapping[str, str], output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the message of a run that must fail, which must leave no record."""
    code = run("evaluate", [], channels | {"SM_OUTPUT_DATA_DIR": str(output)})
    assert not (output / "stage.json").exists()
    assert not (output / "metrics.json").exists()
    return code, capsys.readouterr().err


def test_figures_are_scikit_learns_and_say_what_they_speak_of(digits, whole):
    output, printed = whole
    found = json.loads((output / "metrics.json").read_text())
    assert list(found) == ["test", "holdout", "oof"]
    test = predictions.read(digits.folder / "ensemble" / "predictions.parquet")
    truth = dict(read_cells(digits.folder / "test" / "gt.csv"))
    true = [truth[name] for name in test.ids]
    guess = [NAMES[code] for code in test.log_probs.argmax(axis=1)]
    assert found["test"]["accuracy"] == pytest.approx(reference.accuracy_score(true, guess))
    assert found["test"]["f1_macro"] == pytest.approx(reference.f1_score(true, guess, average="macro"))
    assert found["test"]["n"] == 100
    assert found["test"]["what"] == "ensemble of 3 models of digits"
    assert found["oof"]["what"] == "3 fold models of digits, each alone"
    assert found["oof"]["n"] == sum(fold["n"] for fold in found["oof"]["folds"]) == 400
    mean = sum(fold["n"] * fold["logloss"] for fold in found["oof"]["folds"]) / 400
    assert found["oof"]["logloss"] == pytest.approx(mean)
    assert found["holdout"]["n"] == 100
    assert 0.8 < found["test"]["accuracy"] < 1
    assert {name: scores["accuracy"] for name, scores in printed.items()} == {
        name: scores["accuracy"] for name, scores in found.items()
    }


def test_tables_hold_each_class_and_every_mistake_the_most_confident_first(digits, whole):
    output, _ = whole
    per_class = read_csv(output / "per_class.csv")
    assert {row["class"] for row in per_class} == {*CLASSES} - {"=six"} | {"'=six"}
    assert sum(int(row["support"]) for row in per_class) == 100
    confusion = read_cells(output / "confusion_matrix.csv")
    counts = np.array([row[1:] for row in confusion[1:]], int)
    found = json.loads((output / "metrics.json").read_text())
    assert np.trace(counts) / counts.sum() == pytest.approx(found["test"]["accuracy"])
    valid, test = read_csv(output / "wrong_valid.csv"), read_csv(output / "wrong_test.csv")
    assert len(valid) == round(400 * (1 - found["oof"]["accuracy"]))
    assert len(test) == round(100 * (2 - found["test"]["accuracy"] - found["holdout"]["accuracy"]))
    for rows in (valid, test):
        assert list(rows[0]) == ["id", "path", "true_class", "predicted_class", "confidence"]
        confidence = [float(row["confidence"]) for row in rows]
        assert confidence == sorted(confidence, reverse=True)
        assert all(row["true_class"] != row["predicted_class"] for row in rows)
        assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    assert all(row["path"] == f"img/{int(row['id'][4:]):04d}.png" for row in valid)
    assert {row["path"] for row in test if row["id"].startswith("TEST")} == {
        f"{row['id']}.png" for row in test if row["id"].startswith("TEST")
    }


def test_report_is_one_file_with_its_images_and_nothing_of_the_classes_is_markup(whole):
    output, _ = whole
    page = (output / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|srcset)="(?!data:|#)', page)
    assert "<b>five</b>" not in page
    assert "&lt;b&gt;five&lt;/b&gt;" in page
    scores = json.loads((output / "metrics.json").read_text()).values()
    mistakes = [round(each["n"] * (1 - each["accuracy"])) for each in scores]
    assert max(mistakes) > 7
    assert page.count('<img class="small"') == sum(min(7, count) for count in mistakes)
    assert "no image" not in page
    assert [f"<code>{fold * 16}</code>" in page for fold in "012"] == [True] * FOLDS
    assert "The ensemble&#39;s temperature, 1.25, was fitted on these very rows." in page


def test_pictures_are_png_and_the_record_names_every_file(whole):
    output, _ = whole
    names = {"confusion_matrix", "reliability", "confidence", "per_class_f1", "training_curves"}
    assert {path.stem for path in output.glob("*.png")} == names
    for name in names:
        with Image.open(BytesIO((output / f"{name}.png").read_bytes())) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
    record = json.loads((output / "stage.json").read_text())
    assert {name.removeprefix("output/") for name in record["outputs"]} == {
        path.name for path in output.iterdir() if path.name != "stage.json"
    }


def test_again_there_is_nothing_to_do_until_an_input_changes(digits, whole, capsys):
    output, _ = whole
    environ = digits.channels | {"SM_OUTPUT_DATA_DIR": str(output)}
    before = (output / "report.html").stat().st_mtime_ns
    assert run("evaluate", ["evaluate.gallery=7"], environ) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (output / "report.html").stat().st_mtime_ns == before


def test_without_ground_truth_it_reports_on_models_alone_from_tarballs(digits, tmp_path):
    for number in range(FOLDS):
        (tmp_path / "models" / str(number)).mkdir(parents=True)
        with tarfile.open(tmp_path / "models" / str(number) / "model.tar.gz", "w:gz") as archive:
            archive.add(digits.folder / "models" / f"fold-{number}" / "model", arcname=".")
    output = tmp_path / "output"
    channels = {"SM_CHANNEL_MODEL": str(tmp_path / "models"), "SM_OUTPUT_DATA_DIR": str(output)}
    assert run("evaluate", [], channels) == 0
    found = json.loads((output / "metrics.json").read_text())
    assert list(found) == ["holdout", "oof"]
    assert found["holdout"]["what"] == "equal mean of 3 fold models of digits"
    assert not (output / "wrong_train.csv").exists()
    assert "no image" in (output / "report.html").read_text(encoding="utf-8")


def test_a_submission_scores_as_the_predictions_that_it_was_made_of(digits, whole, tmp_path):
    channels = {
        "SM_CHANNEL_PREDICTIONS": str(digits.folder / "submission"),
        "SM_GROUND_TRUTH_DIR": str(digits.folder / "test"),
        "SM_OUTPUT_DATA_DIR": str(tmp_path),
    }
    assert run("evaluate", [], channels) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["test"]
    expected = json.loads((whole[0] / "metrics.json").read_text())["test"]
    assert found["what"] == "predictions submission.csv"
    assert {k: v for k, v in found.items() if k not in ("what", "rows")} == pytest.approx(
        {k: v for k, v in expected.items() if k not in ("what", "rows")}, abs=1e-6
    )


def test_a_truth_with_an_index_or_other_columns_scores_the_same(digits, whole, tmp_path):
    rows = read_cells(digits.folder / "test" / "gt.csv")
    truth = [["", "fold", "ID", "class"], *([n, 0, *row] for n, row in enumerate(rows[:0:-1]))]
    write_csv(tmp_path / "gt.csv", truth)
    channels = {"SM_CHANNEL_PREDICTIONS": str(digits.folder / "ensemble"), "SM_GROUND_TRUTH_DIR": str(tmp_path)}
    assert run("evaluate", [], channels | {"SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]
    assert found == json.loads((whole[0] / "metrics.json").read_text())["test"]


def test_what_a_failed_ensemble_left_is_scored_with_a_warning(digits, tmp_path, capsys):
    folder = tmp_path / "ensemble"
    shutil.copytree(digits.folder / "ensemble", folder)
    channels = {"SM_CHANNEL_PREDICTIONS": str(folder), "SM_GROUND_TRUTH_DIR": str(digits.folder / "test")}
    for number, record in enumerate((None, {"stage": "evaluate"}, {"stage": "ensemble"})):
        if record:
            write_json(folder / "stage.json", record)
        assert run("evaluate", [], channels | {"SM_OUTPUT_DATA_DIR": str(tmp_path / str(number))}) == 0
        told = capsys.readouterr().err.count("what is scored may be older than its models")
        assert told == (record != {"stage": "ensemble"})


def test_predictions_in_the_output_folder_serve_where_no_channel_names_any(digits, tmp_path):
    done = (digits.folder / "ensemble" / "predictions.parquet").read_bytes()
    (tmp_path / "predictions.parquet").write_bytes(done)
    channels = {"SM_GROUND_TRUTH_DIR": str(digits.folder / "test"), "SM_OUTPUT_DATA_DIR": str(tmp_path)}
    assert run("evaluate", [], channels) == 0
    assert "predictions" in json.loads((tmp_path / "stage.json").read_text())["inputs"]


def test_nothing_to_report_on_is_66(digits, tmp_path, capsys):
    code, message = refused({}, tmp_path, capsys)
    assert code == 66
    assert "SM_CHANNEL_GROUND_TRUTH" in message
    code, message = refused({"SM_CHANNEL_GROUND_TRUTH": str(digits.folder / "test")}, tmp_path, capsys)
    assert code == 66
    assert "predictions" in message


def broken_truth(kind: str) -> list[list[str]]:
    """A ground truth of the run's 100 test rows with one fault."""
    rows = [[f"TEST_{number:03d}", NAMES[number % 10]] for number in range(100)]
    faults = {
        "other ids": [[f"OTHER_{number:03d}", label] for number, (_, label) in enumerate(rows)],
        "too few": rows[:60],
        "too many": [*rows, ["TEST_100", "seven"], ["TEST_101", "seven"]],
        "twice": [*rows, ["TEST_007", "seven"]],
        "unknown class": [*rows[:-1], ["TEST_099", "ten"]],
        "no class": [*rows[:-1], ["TEST_099", ""]],
        "empty": [],
        "ragged": [*rows[:-1], ["TEST_099"]],
    }
    return [["ID", "label"], *faults[kind]]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("other ids", ["100 of the 100 ids", "'OTHER_000'", "'TEST_000'"]),
        ("too few", ["40 of the 100 ids", "'TEST_060'"]),
        ("too many", ["2 of the 102 ids", "'TEST_100', 'TEST_101'"]),
        ("twice", ["ids stand twice", "'TEST_007'"]),
        ("unknown class", ["'ten'", "does not know"]),
        ("no class", ["1 rows with an empty class", "row 100"]),
        ("empty", ["no rows"]),
        ("ragged", ["line 101", "1 cells"]),
    ],
)
def test_a_broken_ground_truth_is_65_and_says_where(digits, tmp_path, capsys, kind, words):
    truth = write_csv(tmp_path / "truth" / "gt.csv", broken_truth(kind))
    code, message = refused(digits.channels | {"SM_CHANNEL_GROUND_TRUTH": str(truth)}, tmp_path / "output", capsys)
    assert code == 65
    assert [word for word in words if word not in message] == []
    assert str(truth) in message


def test_a_folder_without_ground_truth_is_66(digits, tmp_path, capsys):
    (tmp_path / "truth").mkdir()
    channels = digits.channels | {"SM_CHANNEL_GROUND_TRUTH": str(tmp_path / "truth")}
    code, message = refused(channels, tmp_path / "output", capsys)
    assert (code, "gt.csv" in message) == (66, True)


@pytest.mark.parametrize("fault", ["nan", "no classes", "not log", "not parquet"])
def test_broken_predictions_are_65(digits, tmp_path, capsys, fault):
    good = predictions.read(digits.folder / "ensemble" / "predictions.parquet")
    path = tmp_path / "predictions" / "predictions.parquet"
    log_probs = good.log_probs.copy()
    if fault == "nan":
        log_probs[4, 3] = np.nan
    save(
        path, Predictions(good.ids, good.fold, "digits", NAMES, np.exp(log_probs) if fault == "not log" else log_probs)
    )
    if fault == "no classes":
        save(path, Predictions(good.ids, good.fold, "digits", (), log_probs[:, :0]))
    if fault == "not parquet":
        path.write_bytes(b"PAR1 or so")
    channels = digits.channels | {"SM_CHANNEL_PREDICTIONS": str(path.parent)}
    code, message = refused(channels, tmp_path / "output", capsys)
    assert code == 65
    expected = {"nan": "NaN", "no classes": "p/<class>", "not log": "above 0", "not parquet": "not a Parquet table"}
    assert expected[fault] in message
    assert str(path) in message


@pytest.mark.parametrize("cell", ["nan", "-0.5", "inf", "high"])
def test_a_submission_without_probabilities_is_65(digits, tmp_path, capsys, cell):
    rows = [["ID", *CLASSES], *([f"TEST_{n:03d}", *["0.1"] * 10] for n in range(100))]
    rows[8][3] = cell
    path = write_csv(tmp_path / "submission.csv", rows)
    code, message = refused(digits.channels | {"SM_CHANNEL_PREDICTIONS": str(path)}, tmp_path / "output", capsys)
    assert (code, "row 8 below the header" in message) == (65, True)
