"""The evaluate stage, as its container runs it, over the toy run: its figures, tables, pictures and report."""

import json
import re
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference

from fivefold import predictions
from fivefold.contract.files import read_json, write_json
from fivefold.predictions import Predictions
from jobs.__main__ import run
from toy_data import (
    CLASSES,
    LEARNS,
    call_jobs,
    copy_run,
    failure,
    read_cells,
    read_rows,
    run_stage,
    variables,
    write_csv,
)


def channels(toy_run: Path) -> dict[str, Path]:
    return {"MODEL": toy_run, "PREDICTIONS": toy_run / "ensemble" / "output", "GROUND_TRUTH": toy_run / "gt.csv"}


@pytest.fixture(scope="module")
def whole(toy_run, tmp_path_factory) -> tuple[Path, dict]:
    """The output of a process with every channel, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = call_jobs("evaluate", "evaluate.num_error_images=2", **variables(toy_run, folder, **channels(toy_run)))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return folder / "output", json.loads(line)


def refuse(toy_run: Path, folder: Path, code: int, **more: object) -> str:
    """Asserts the exit code of a run that must fail and leaves no record; returns its failure."""
    assert run_stage(toy_run, "evaluate", folder, **{**channels(toy_run), **more}) == code
    assert not [path for path in folder.rglob("*.json") if path.name in ("stage.json", "metrics.json")]
    return failure(folder)


def test_figures_are_scikit_learns_and_say_what_they_speak_of(toy_run, whole):
    output, printed = whole
    found = read_json(output / "metrics.json")
    assert list(found) == ["test", "holdout", "oof"]
    test = predictions.read(toy_run / "ensemble" / "output" / "predictions.parquet")
    truth = dict(read_cells(toy_run / "gt.csv"))
    true, guess = [truth[name] for name in test.ids], [test.classes[code] for code in test.log_probs.argmax(axis=1)]
    assert found["test"]["accuracy"] == pytest.approx(reference.accuracy_score(true, guess))
    assert found["test"]["f1_macro"] == pytest.approx(reference.f1_score(true, guess, average="macro"))
    assert found["test"]["what"] == "ensemble of 3 models of default"
    assert found["oof"]["what"].startswith("3 fold models of default, ")
    folds = found["oof"]["folds"]
    assert (found["test"]["n"], found["holdout"]["n"], found["oof"]["n"]) == (18, 9, sum(fold["n"] for fold in folds))
    assert found["oof"]["logloss"] == pytest.approx(sum(fold["n"] * fold["logloss"] for fold in folds) / 81)
    assert 0.7 < found["test"]["accuracy"] < 1
    assert {name: scores["accuracy"] for name, scores in printed.items()} == {
        name: scores["accuracy"] for name, scores in found.items()
    }


def test_tables_hold_each_class_and_every_mistake_the_most_confident_first(whole):
    output, _ = whole
    per_class = read_rows(output / "per_class.csv")
    assert {row["class"] for row in per_class} == set(CLASSES)
    assert sum(int(row["support"]) for row in per_class) == 18
    counts = np.array([row[1:] for row in read_cells(output / "confusion_matrix.csv")[1:]], int)
    found = read_json(output / "metrics.json")
    assert np.trace(counts) / counts.sum() == pytest.approx(found["test"]["accuracy"])
    valid, test = read_rows(output / "wrong_valid.csv"), read_rows(output / "wrong_test.csv")
    assert len(valid) == round(81 * (1 - found["oof"]["accuracy"]))
    assert len(test) == round(18 * (1 - found["test"]["accuracy"]) + 9 * (1 - found["holdout"]["accuracy"]))
    for rows in (valid, test):
        assert list(rows[0]) == ["id", "path", "true_class", "predicted_class", "confidence"]
        confidence = [float(row["confidence"]) for row in rows]
        assert confidence == sorted(confidence, reverse=True)
        assert all(row["true_class"] != row["predicted_class"] for row in rows)
    assert {row["path"] for row in valid} == {row["id"] for row in valid}
    assert all(row["path"] in (row["id"], f"test/{row['id']}.png") for row in test)


def test_the_report_is_one_file_with_its_images_and_no_class_is_markup(toy_run, whole):
    output, _ = whole
    page = (output / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|srcset)="(?!data:|#)', page)
    assert ("<b>빨강" in page, "&lt;b&gt;빨강 차" in page, "no image" in page) == (False, True, False)
    scores = read_json(output / "metrics.json").values()
    mistakes = [round(score["n"] * (1 - score["accuracy"])) for score in scores]
    assert max(mistakes) > 2
    assert page.count('<img class="small"') == sum(min(2, count) for count in mistakes)


def test_the_report_names_the_records_of_what_made_its_inputs(toy_run, whole):
    page = (whole[0] / "report.html").read_text(encoding="utf-8")
    keys = [read_json(toy_run / f"fold-{fold}" / "model" / "stage.json")["key"] for fold in range(3)]
    assert all(f"<code>{key[:16]}</code>" in page for key in keys)


def test_pictures_are_png_the_record_names_every_file_and_again_there_is_nothing_to_do(toy_run, whole, capsys):
    output, _ = whole
    names = {"confusion_matrix", "reliability", "confidence", "per_class_f1", "training_curves"}
    assert {path.stem for path in output.glob("*.png")} == names
    for name in names:
        with Image.open(BytesIO((output / f"{name}.png").read_bytes())) as picture:
            assert (picture.format, min(picture.size) > 200) == ("PNG", True)
    files = {path.name for path in output.iterdir()} - {"stage.json"}
    assert {name.removeprefix("output/") for name in read_json(output / "stage.json")["outputs"]} == files
    before = (output / "report.html").stat().st_mtime_ns
    assert run_stage(toy_run, "evaluate", output.parent, "evaluate.num_error_images=2", **channels(toy_run)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (output / "report.html").stat().st_mtime_ns == before


def test_without_ground_truth_it_reports_on_models_alone_from_tarballs(toy_run, tmp_path):
    for fold in range(3):
        (tmp_path / "models" / str(fold)).mkdir(parents=True)
        with tarfile.open(tmp_path / "models" / str(fold) / "model.tar.gz", "w:gz") as archive:
            archive.add(toy_run / f"fold-{fold}" / "model", arcname=".")
    given = {"SM_CHANNEL_MODEL": str(tmp_path / "models"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    assert run("evaluate", [], given) == 0
    found = read_json(tmp_path / "output" / "metrics.json")
    assert list(found) == ["holdout", "oof"]
    assert found["holdout"]["what"] == "equal mean of 3 fold models of default"
    assert not (tmp_path / "output" / "wrong_train.csv").exists()
    assert "no image" in (tmp_path / "output" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["submission", "other columns", "output folder"])
def test_other_forms_of_the_same_predictions_and_truth_score_the_same(toy_run, whole, tmp_path, form):
    output, ensemble = tmp_path / "output", toy_run / "ensemble" / "output"
    given = {"SM_CHANNEL_PREDICTIONS": str(ensemble), "SM_GROUND_TRUTH_DIR": str(toy_run)}
    if form == "submission":
        given["SM_CHANNEL_PREDICTIONS"] = str(ensemble / "submission.csv")
    elif form == "other columns":
        rows = read_cells(toy_run / "gt.csv")
        write_csv(
            tmp_path / "gt.csv", [["", "fold", "ID", "class"], *([n, 0, *row] for n, row in enumerate(rows[:0:-1]))]
        )
        given["SM_GROUND_TRUTH_DIR"] = str(tmp_path)
    else:  # where no channel names any
        output.mkdir()
        shutil.copy(ensemble / "predictions.parquet", given.pop("SM_CHANNEL_PREDICTIONS") and output)
    assert run("evaluate", [], given | {"SM_OUTPUT_DATA_DIR": str(output)}) == 0
    found, expected = (read_json(folder / "metrics.json")["test"] for folder in (output, whole[0]))
    for name in ("what", "rows"):
        found.pop(name), expected.pop(name)
    assert found == pytest.approx(expected, abs=1e-6)


def test_what_a_failed_ensemble_left_is_scored_with_a_warning(toy_run, tmp_path, capsys):
    folder = tmp_path / "ensemble"
    shutil.copytree(toy_run / "ensemble" / "output", folder)
    (folder / "stage.json").unlink()
    given = {"SM_CHANNEL_PREDICTIONS": str(folder), "SM_GROUND_TRUTH_DIR": str(toy_run)}
    for number, record in enumerate((None, {"stage": "evaluate"}, {"stage": "ensemble"})):
        if record:
            write_json(folder / "stage.json", record)
        assert run("evaluate", [], given | {"SM_OUTPUT_DATA_DIR": str(tmp_path / str(number))}) == 0
        warned = capsys.readouterr().err.count("may be older than ")
        assert warned == (record != {"stage": "ensemble"})


def test_what_is_missing_is_66(toy_run, tmp_path):
    nothing = dict.fromkeys(("MODEL", "PREDICTIONS", "GROUND_TRUTH", "FOLDS", "EVAL", "TRAIN"))
    assert "SM_CHANNEL_GROUND_TRUTH" in refuse(toy_run, tmp_path / "a", 66, **nothing)
    assert "predictions" in refuse(toy_run, tmp_path / "b", 66, **{**nothing, "GROUND_TRUTH": toy_run / "gt.csv"})
    assert run_stage(toy_run, "evaluate", tmp_path / "d", "evaluate.allow_empty=true", **nothing) == 0
    assert read_json(tmp_path / "d" / "output" / "metrics.json") == {}
    (tmp_path / "truth").mkdir()
    assert "gt.csv" in refuse(toy_run, tmp_path / "c", 66, GROUND_TRUTH=tmp_path / "truth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [[f"OTHER_{name}", label] for name, label in rows], ["18 of the 18 ids", "'OTHER_T00'", "'T00'"]),
        (lambda rows: [*rows[:-1], ["T25", "ten"]], ["'ten'"]),
    ],
)
def test_a_broken_ground_truth_is_65_and_says_where(toy_run, tmp_path, change, words):
    rows = read_cells(toy_run / "gt.csv")
    truth = write_csv(tmp_path / "gt.csv", [rows[0], *change(rows[1:])])
    message = refuse(toy_run, tmp_path / "out", 65, GROUND_TRUTH=truth)
    assert [word for word in [*words, str(truth)] if word not in message] == []


@pytest.mark.parametrize(("fault", "word"), [("nan", "NaN"), ("no classes", "p/<class>")])
def test_broken_predictions_are_65(toy_run, tmp_path, fault, word):
    good = predictions.read(toy_run / "ensemble" / "output" / "predictions.parquet")
    log_probs, classes = good.log_probs.copy(), good.classes
    if fault == "nan":
        log_probs[4, 1] = np.nan
    else:
        log_probs, classes = log_probs[:, :0], ()
    predictions.write(tmp_path / "predictions.parquet", Predictions(good.ids, good.fold, "s", classes, log_probs))
    message = refuse(toy_run, tmp_path / "out", 65, PREDICTIONS=tmp_path)
    assert word in message
    assert str(tmp_path / "predictions.parquet") in message


def test_a_row_counts_once_however_many_models_predicted_it(toy_run, tmp_path):
    """A second seed, whose models say the same."""
    for fold in range(3):
        for seed in (42, 43):
            folder = copy_run(toy_run / f"fold-{fold}" / "model", tmp_path / f"{fold}-{seed}")
            write_json(folder / "model.json", read_json(folder / "model.json") | {"seed": seed})
            write_json(folder / "stage.json", {})
    given = {"SM_CHANNEL_MODEL": str(tmp_path), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    assert run("evaluate", [], given) == 0
    single = {"SM_CHANNEL_MODEL": str(toy_run), "SM_OUTPUT_DATA_DIR": str(tmp_path / "single")}
    assert run("evaluate", [], single) == 0
    found, one = (read_json(tmp_path / name / "metrics.json")["oof"] for name in ("output", "single"))
    assert (found["n"], one["n"], len(found["folds"])) == (81, 81, 6)
    assert found["logloss"] == pytest.approx(one["logloss"], rel=1e-5)
    assert found["rows"] == one["rows"]
    mistakes = [read_rows(tmp_path / name / "wrong_valid.csv") for name in ("output", "single")]
    assert len(mistakes[0]) == len(mistakes[1]) == round(81 * (1 - one["accuracy"]))


def test_rows_that_chose_a_students_epoch_are_never_called_unseen(toy_run, tmp_path):
    arguments = [*LEARNS, "train.epochs=2", "distill.patience=1"]
    assert run_stage(toy_run, "distill", tmp_path / "distill", *arguments, MODEL=toy_run) == 0
    model = tmp_path / "distill" / "model"
    assert read_json(model / "stage.json")["metrics"]["selected_on"] == "holdout"
    assert run_stage(toy_run, "ensemble", tmp_path / "ensemble", MODEL=model) == 0
    ensemble = tmp_path / "ensemble" / "output"
    assert [score["rows"] for score in read_json(ensemble / "ensemble.json")["scores"]] == [
        "holdout, which chose the epoch"
    ]
    for given in ({"MODEL": model, "PREDICTIONS": ensemble}, {"MODEL": None, "PREDICTIONS": ensemble}, {"MODEL": model, "PREDICTIONS": None, "GROUND_TRUTH": None}):  # fmt: skip
        output = tmp_path / f"evaluate-{len(list(tmp_path.iterdir()))}"
        assert (
            run_stage(toy_run, "evaluate", output, **{**channels(toy_run), **given, "SM_OUTPUT_DATA_DIR": output}) == 0
        )
        found = read_json(output / "metrics.json")
        assert "the student's epoch" in found["holdout"]["rows"]
        assert found["holdout"]["selected_on"] == "holdout"
        assert len(read_rows(output / "wrong_valid.csv")) == round(9 * (1 - found["holdout"]["accuracy"]))
        assert (output / "wrong_test.csv").exists() == ("test" in found)
    asked = {"IMAGES": toy_run / "train", "MODEL": model, "SM_OUTPUT_DATA_DIR": tmp_path / "predicted"}
    assert run_stage(toy_run, "predict", tmp_path / "predicted", **asked) == 0
    assert {name.name for name in (tmp_path / "predicted").glob("wrong_*")} == {"wrong_train.csv", "wrong_valid.csv"}
