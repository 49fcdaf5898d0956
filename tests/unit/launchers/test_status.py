import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fivefold.contract.files import write_json, write_text
from fivefold.errors import DataError, MissingInputError
from fivefold.launchers.plan import PLAN, Inputs, Plan, make_plan
from fivefold.launchers.status import (
    STATE,
    epochs_done,
    newest_run,
    read_plan,
    read_results,
    read_scores,
    read_status,
    record_end,
    record_start,
    running_pid,
    write_plan,
)

RECORD = {"stage": "split", "wall_seconds": 12.3, "finished": "2026-01-02T03:04:05Z", "metrics": {}}
TEST_METRICS = {"n": 360, "accuracy": 0.99, "logloss": 0.03}
HOLDOUT_METRICS = {"n": 50, "accuracy": 0.5, "logloss": 1.5}
TRAINING_METRICS = {"holdout_accuracy": 1.0, "holdout_logloss": 0.0}
SELECTED_ON_HOLDOUT = {"selected_on": "holdout"}
OOF_METRICS = {"n": 1437, "accuracy": 0.97, "logloss": 0.09}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan = make_plan(
        Inputs("t", "e", truth_unknown=True), ["split.folds=2", "train.epochs=4"], run="r", runs=str(tmp_path)
    )
    write_plan(plan)
    return plan


def test_read_plan_restores_a_plan_also_after_its_folder_moved(plan: Plan) -> None:
    assert read_plan(plan.folder) == plan
    moved = plan.folder.with_name("moved")
    plan.folder.rename(moved)
    assert read_plan(moved).step("fold-1").folder == moved / "fold-1"
    write_json(moved / PLAN, {"run": "r"})
    with pytest.raises(DataError, match="not a plan"):
        read_plan(moved)
    with pytest.raises(MissingInputError, match=r"plan\.json"):
        read_plan(moved.parent)


def test_status_changes_from_waiting_to_running_to_done(plan: Plan) -> None:
    step = plan.step("split")
    assert read_status(step).state == "waiting"
    record_start(step, os.getppid())  # a process that started before its step
    assert read_status(step).state == "running"
    assert running_pid(step) == os.getppid()
    write_json(step.folder / "output" / "stage.json", RECORD)
    record_end(step, 0)
    assert read_status(step).state == "done"
    assert read_status(step).detail.startswith("12 s, finished 2026-01-0")
    assert running_pid(step) is None
    write_json(plan.step("fold-0").folder / "model" / "stage.json", {**RECORD, "stage": "train-fold"})
    assert read_status(plan.step("fold-0")).state == "done", "the step was run by hand"


@pytest.mark.parametrize(
    ("files", "code", "expected"),
    [
        ({"output/stage.json": json.dumps(RECORD), "failure": "no images\n\nTrace"}, 66, ("failed", "no images", 66)),
        ({"log.txt": "one\ntwo\n\n"}, 137, ("stopped", "two", 137)),
    ],
)
def test_failure_shows_its_first_line_or_the_last_line_of_the_log(plan, files, code, expected):
    step = plan.step("split")
    record_start(step, os.getpid())
    for name, text in files.items():
        write_text(step.folder / name, text)
    record_end(step, code)
    actual = read_status(step)
    assert (actual.state, actual.detail, actual.exit_code) == expected


def test_step_is_stopped_if_its_process_ended_or_its_id_was_reused(plan: Plan) -> None:
    step = plan.step("split")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    record_start(step, process.pid)
    assert read_status(step).state == "stopped"
    assert running_pid(step) is None
    record_start(step, os.getpid())
    state = json.loads((step.folder / STATE).read_text())
    write_json(step.folder / STATE, {**state, "started": "2001-01-01T00:00:00+00:00"})
    assert read_status(step).state == "stopped", "a later process has the same id"


def test_epochs_done_ignores_epochs_of_earlier_runs(plan: Plan) -> None:
    step = plan.step("fold-0")
    log = step.folder / "model" / "train_log.csv"
    write_text(log, "epoch,train_loss\n1,.5\n2,.4\n")
    record_start(step, os.getppid())
    assert read_status(step).detail == "epoch 2 of 4"
    assert epochs_done(step) == 2
    os.utime(log, (1e9, 1e9))
    assert epochs_done(step, since=2e9) == 0


def test_newest_run_is_the_one_planned_last(plan: Plan) -> None:
    runs = plan.folder.parent
    later = make_plan(Inputs(train="t"), run="a", runs=str(runs))
    write_plan(later)
    os.utime(plan.folder / PLAN, (1e9, 1e9))
    assert newest_run(runs) == later.folder
    with pytest.raises(MissingInputError, match="no run below"):
        newest_run(runs / "nowhere")


def write_results(plan: Plan, name: str, metrics: dict[str, Any] | None = None) -> None:
    """Write the files of the step's stage: its record, and metrics.json for an evaluation."""
    step = plan.step(name)
    folder = step.folder / ("model" if step.stage in ("train-fold", "distill") else "output")
    write_json(folder / "stage.json", {**RECORD, "stage": step.stage, "metrics": metrics or {}})
    if step.stage == "evaluate":
        write_json(folder / "metrics.json", metrics)


@pytest.mark.parametrize(
    ("finished", "step", "accuracy", "rows"),
    [
        ({"fold-0": {"oof_accuracy": 0.9, "oof_logloss": 0.3, **TRAINING_METRICS}}, "fold-0", 0.9, "out-of-fold"),
        (
            {"ensemble": {}, "evaluate": {"test": TEST_METRICS, "holdout": HOLDOUT_METRICS, "oof": OOF_METRICS}},
            "ensemble",
            0.99,
            "test, 360",
        ),
        (
            {"evaluate-student": {"holdout": HOLDOUT_METRICS | SELECTED_ON_HOLDOUT}, "distill": TRAINING_METRICS},
            "distill",
            0.5,
            "holdout, 50, which chose the epoch",
        ),
        ({"ensemble": {}, "evaluate": {"oof": OOF_METRICS}}, "ensemble", None, None),
        ({"evaluate": {"oof": OOF_METRICS}}, "evaluate", 0.97, "out-of-fold, 1437"),
        ({"evaluate": {"test": TEST_METRICS}, "distill": TRAINING_METRICS}, "distill", 1.0, "holdout"),
    ],
)
def test_scores_prefer_test_rows_to_holdout_and_an_ensemble_has_none_for_out_of_fold_rows(
    plan: Plan, finished: dict[str, Any], step: str, accuracy: float | None, rows: str | None
) -> None:
    for name, metrics in finished.items():
        write_results(plan, name, metrics)
    scores = read_scores(plan, plan.step(step))
    assert (scores and scores.accuracy, scores and scores.rows) == (accuracy, rows)


def test_results_table_has_a_line_for_each_trained_model(plan: Plan) -> None:
    assert read_results(plan) == "no model is trained yet"
    write_results(plan, "split", {"rows": 9})
    write_results(plan, "fold-1", {"oof_accuracy": 0.9, "oof_logloss": 0.3})
    write_results(plan, "ensemble")
    write_results(plan, "evaluate", {"test": TEST_METRICS})
    write_results(plan, "distill")
    report = plan.folder / "evaluate" / "output" / "report.html"
    write_text(report, "<html></html>")
    assert read_results(plan).splitlines() == [
        "          accuracy  logloss  rows         seconds",
        "fold-1      0.9000   0.3000  out-of-fold     12.3",
        "ensemble    0.9900   0.0300  test, 360       12.3",
        "student          -        -  not scored      12.3",
        "",
        f"report: {report}",
    ]
