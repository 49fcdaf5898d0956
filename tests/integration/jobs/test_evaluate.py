"""Metrics, tables, plots and report of the evaluate stage, which runs on the toy run as in its container."""

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as reference

from fivefold import predictions
from fivefold.contract.files import read_json, write_json
from jobs.__main__ import run
from toy_data import CLASSES, LEARNS, copy_run, failure, read_cells, read_rows, run_stage


def make_channels(toy_run: Path) -> dict[str, Path]:
    return {"MODEL": toy_run, "PREDICTIONS": toy_run / "ensemble" / "output", "GROUND_TRUTH": toy_run / "gt.csv"}


@pytest.fixture(scope="module")
def full_evaluation(toy_run, tmp_path_factory) -> tuple[Path, dict]:
    """The output folder of a stage with every channel, and the metrics that it printed."""
    folder, printed = tmp_path_factory.mktemp("whole"), StringIO()
    with redirect_stdout(printed), redirect_stderr(StringIO()) as log:
        assert run_stage(toy_run, "evaluate", folder, "evaluate.num_error_images=2", **make_channels(toy_run)) == 0
    assert "may be older than " not in log.getvalue()
    (line,) = printed.getvalue().splitlines()
    return folder / "output", json.loads(line)


def expect_failure(toy_run: Path, folder: Path, code: int, **overrides: object) -> str:
    """Run the stage; assert this exit code and that no record was written. Return the failure message."""
    assert run_stage(toy_run, "evaluate", folder, **{**make_channels(toy_run), **overrides}) == code
    assert not [path for path in folder.rglob("*.json") if path.name in ("stage.json", "metrics.json")]
    return failure(folder)


def test_metrics_match_scikit_learn_and_name_the_models_they_cover(toy_run, full_evaluation):
    output, printed = full_evaluation
    metrics = read_json(output / "metrics.json")
    assert list(metrics) == ["test", "holdout", "oof"]
    test = predictions.read(toy_run / "ensemble" / "output" / "predictions.parquet")
    truth = dict(read_cells(toy_run / "gt.csv"))
    true, predicted = [truth[name] for name in test.ids], [test.classes[code] for code in test.log_probs.argmax(axis=1)]
    assert metrics["test"]["accuracy"] == pytest.approx(reference.accuracy_score(true, predicted))
    assert metrics["test"]["f1_macro"] == pytest.approx(reference.f1_score(true, predicted, average="macro"))
    assert metrics["test"]["what"] == "ensemble of 3 models of default"
    assert metrics["oof"]["what"].startswith("3 fold models of default, ")
    folds = metrics["oof"]["folds"]
    assert [scores["n"] for scores in metrics.values()] == [18, 9, sum(fold["n"] for fold in folds)]
    assert metrics["oof"]["logloss"] == pytest.approx(sum(fold["n"] * fold["logloss"] for fold in folds) / 81)
    assert 0.7 < metrics["test"]["accuracy"] < 1
    assert {name: scores["accuracy"] for name, scores in printed.items()} == {
        name: scores["accuracy"] for name, scores in metrics.items()
    }


def test_tables_list_each_class_and_every_mistake_by_descending_confidence(full_evaluation):
    output, _ = full_evaluation
    per_class = read_rows(output / "per_class.csv")
    assert {row["class"] for row in per_class} == set(CLASSES)
    assert sum(int(row["support"]) for row in per_class) == 18
    counts = np.array([row[1:] for row in read_cells(output / "confusion_matrix.csv")[1:]], int)
    metrics = read_json(output / "metrics.json")
    assert np.trace(counts) / counts.sum() == pytest.approx(metrics["test"]["accuracy"])
    valid, test = read_rows(output / "wrong_valid.csv"), read_rows(output / "wrong_test.csv")
    assert len(valid) == round(81 * (1 - metrics["oof"]["accuracy"]))
    assert len(test) == round(18 * (1 - metrics["test"]["accuracy"]) + 9 * (1 - metrics["holdout"]["accuracy"]))
    for rows in (valid, test):
        assert list(rows[0]) == ["id", "path", "true_class", "predicted_class", "confidence"]
        confidence = [float(row["confidence"]) for row in rows]
        assert confidence == sorted(confidence, reverse=True)
        assert all(row["true_class"] != row["predicted_class"] for row in rows)
    assert {row["path"] for row in valid} == {row["id"] for row in valid}
    assert all(row["path"] in (row["id"], f"test/{row['id']}.png") for row in test)


def test_report_is_one_file_with_images_escaped_class_names_and_record_keys(toy_run, full_evaluation):
    page = (full_evaluation[0] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|srcset)="(?!data:|#)', page)
    assert ("<b>빨강" in page, "&lt;b&gt;빨강 차" in page, "no image" in page) == (False, True, False)
    scores = read_json(full_evaluation[0] / "metrics.json").values()
    mistakes = [round(score["n"] * (1 - score["accuracy"])) for score in scores]
    assert max(mistakes) > 2
    assert page.count('<img class="small"') == sum(min(2, count) for count in mistakes)
    keys = [read_json(toy_run / f"fold-{fold}" / "model" / "stage.json")["key"] for fold in range(3)]
    assert all(f"<code>{key[:16]}</code>" in page for key in keys)


def test_plots_are_png_the_record_lists_every_file_and_a_second_run_is_skipped(toy_run, full_evaluation, capsys):
    output, _ = full_evaluation
    assert {path.stem for path in output.glob("*.png")} == {"confusion_matrix", "reliability", "training_curves"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.glob("*.png"))
    files = {path.name for path in output.iterdir()} - {"stage.json"}
    assert {name.removeprefix("output/") for name in read_json(output / "stage.json")["outputs"]} == files
    modified = (output / "report.html").stat().st_mtime_ns
    assert run_stage(toy_run, "evaluate", output.parent, "evaluate.num_error_images=2", **make_channels(toy_run)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (output / "report.html").stat().st_mtime_ns == modified


def test_predictions_of_a_failed_ensemble_are_scored_with_a_warning(toy_run, tmp_path, capsys):
    folder = tmp_path / "ensemble"
    shutil.copytree(toy_run / "ensemble" / "output", folder)
    write_json(folder / "stage.json", {"stage": "evaluate"})
    environ = {"SM_CHANNEL_PREDICTIONS": str(folder), "SM_GROUND_TRUTH_DIR": str(toy_run)}
    assert run("evaluate", [], environ | {"SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}) == 0
    assert capsys.readouterr().err.count("may be older than ") == 1


def test_missing_inputs_exit_with_66(toy_run, tmp_path):
    no_channels = dict.fromkeys(("MODEL", "PREDICTIONS", "GROUND_TRUTH", "FOLDS", "EVAL", "TRAIN"))
    assert "SM_CHANNEL_GROUND_TRUTH" in expect_failure(toy_run, tmp_path / "a", 66, **no_channels)
    only_truth = no_channels | {"GROUND_TRUTH": toy_run / "gt.csv"}
    assert "predictions" in expect_failure(toy_run, tmp_path / "b", 66, **only_truth)
    assert run_stage(toy_run, "evaluate", tmp_path / "d", "evaluate.allow_empty=true", **no_channels) == 0
    assert read_json(tmp_path / "d" / "output" / "metrics.json") == {}
    (tmp_path / "truth").mkdir()
    assert "gt.csv" in expect_failure(toy_run, tmp_path / "c", 66, GROUND_TRUTH=tmp_path / "truth")


def test_row_predicted_by_several_models_counts_once(toy_run, full_evaluation, tmp_path):
    """The models of the second seed are copies with equal predictions, in tarballs; there is no ground truth."""
    for fold in range(3):
        for seed in (42, 43):
            folder = copy_run(toy_run / f"fold-{fold}" / "model", tmp_path / "models" / f"{fold}-{seed}")
            write_json(folder / "model.json", read_json(folder / "model.json") | {"seed": seed})
            write_json(folder / "stage.json", {})
        shutil.make_archive(str(tmp_path / "models" / str(fold) / "model"), "gztar", folder)
        shutil.rmtree(folder)
    environ = {"SM_CHANNEL_MODEL": str(tmp_path / "models"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    assert run("evaluate", [], environ) == 0
    metrics = read_json(tmp_path / "output" / "metrics.json")
    assert list(metrics) == ["holdout", "oof"]
    assert metrics["holdout"]["what"] == "equal mean of 6 fold models of default"
    assert "no image" in (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    outputs = tmp_path / "output", full_evaluation[0]
    two_seeds, one_seed = metrics["oof"], read_json(full_evaluation[0] / "metrics.json")["oof"]
    assert (two_seeds["n"], one_seed["n"], len(two_seeds["folds"])) == (81, 81, 6)
    assert two_seeds["logloss"] == pytest.approx(one_seed["logloss"], rel=1e-5)
    mistakes = [read_rows(output / "wrong_valid.csv") for output in outputs]
    assert len(mistakes[0]) == len(mistakes[1]) == round(81 * (1 - one_seed["accuracy"]))


def test_out_of_fold_rows_of_several_systems_are_blended_as_in_the_ensemble(toy_run, tmp_path):
    """The second system knows nothing, so an equal mean would be worse than the fitted blend."""
    for fold in range(3):
        for system in ("default", "blank"):
            folder = copy_run(toy_run / f"fold-{fold}" / "model", tmp_path / "models" / f"{system}-{fold}")
            write_json(folder / "model.json", read_json(folder / "model.json") | {"system": system})
            if system == "blank":
                table = predictions.read(folder / "oof.parquet")
                blank = np.full_like(table.log_probs, -np.log(3))
                predictions.write(folder / "oof.parquet", replace(table, log_probs=blank))
            write_json(folder / "stage.json", {})
    blend = tmp_path / "ensemble"
    assert run_stage(toy_run, "ensemble", blend, MODEL=tmp_path / "models") == 0
    assert read_json(blend / "output" / "ensemble.json")["weights"]["blank"] < 0.3
    arguments = {"MODEL": tmp_path / "models", "PREDICTIONS": blend / "output"}
    assert run_stage(toy_run, "evaluate", tmp_path / "blended", **arguments) == 0
    assert run_stage(toy_run, "evaluate", tmp_path / "mean", MODEL=tmp_path / "models") == 0
    blended, mean = (
        read_json(tmp_path / name / "output" / "metrics.json")["oof"]["logloss"] for name in ("blended", "mean")
    )
    alone = read_json(blend / "output" / "ensemble.json")["scores"]
    single = next(score["logloss"] for score in alone if score["what"].endswith("of default"))
    assert blended <= single + 1e-6
    assert blended < mean
    fitted = tmp_path / "fitted"
    assert run_stage(toy_run, "ensemble", fitted, MODEL=tmp_path / "models", EVAL=None) == 0
    assert not list((fitted / "output").rglob("*.csv"))
    assert not (fitted / "output" / "predictions.parquet").exists()
    for key in ("weights", "temperature", "members", "scores"):
        assert read_json(fitted / "output" / "ensemble.json")[key] == read_json(blend / "output" / "ensemble.json")[key]
    arguments = {"MODEL": tmp_path / "models", "PREDICTIONS": fitted / "output"}
    assert run_stage(toy_run, "evaluate", tmp_path / "unseen", **arguments) == 0
    figures = read_json(tmp_path / "unseen" / "output" / "metrics.json")
    assert ("test" in figures, figures["oof"]["logloss"]) == (False, pytest.approx(blended))


@pytest.mark.slow
def test_rows_that_selected_the_epoch_of_a_student_are_not_reported_as_unseen(toy_run, tmp_path):
    arguments = [*LEARNS, "train.epochs=2", "distill.patience=1"]
    assert run_stage(toy_run, "distill", tmp_path / "distill", *arguments, MODEL=toy_run) == 0
    model = tmp_path / "distill" / "model"
    assert read_json(model / "stage.json")["metrics"]["selected_on"] == "holdout"
    assert run_stage(toy_run, "ensemble", tmp_path / "ensemble", MODEL=model) == 0
    ensemble = tmp_path / "ensemble" / "output"
    assert [score["rows"] for score in read_json(ensemble / "ensemble.json")["scores"]] == [
        "holdout, which chose the epoch"
    ]
    channels = {"MODEL": model, "PREDICTIONS": ensemble}
    for number, without in enumerate(((), ("MODEL",), ("PREDICTIONS", "GROUND_TRUTH"))):
        folder, overrides = tmp_path / f"evaluate-{number}", channels | dict.fromkeys(without)
        assert run_stage(toy_run, "evaluate", folder, **{**make_channels(toy_run), **overrides}) == 0
        output = folder / "output"
        metrics = read_json(output / "metrics.json")
        assert "the student's epoch" in metrics["holdout"]["rows"]
        assert metrics["holdout"]["selected_on"] == "holdout"
        assert len(read_rows(output / "wrong_valid.csv")) == round(9 * (1 - metrics["holdout"]["accuracy"]))
        assert (output / "wrong_test.csv").exists() == ("test" in metrics)
    predict_channels = {"IMAGES": toy_run / "train", "MODEL": model, "SM_OUTPUT_DATA_DIR": tmp_path / "predicted"}
    assert run_stage(toy_run, "predict", tmp_path / "predicted", **predict_channels) == 0
    assert {name.name for name in (tmp_path / "predicted").glob("wrong_*")} == {"wrong_train.csv", "wrong_valid.csv"}
