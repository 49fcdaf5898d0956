"""The figures of a run: whose rows they speak of, and what is said where nothing is known."""

from pathlib import Path
from typing import Any

import pytest

from fivefold.contract.files import write_json, write_text
from fivefold.launchers.plan import Inputs, Plan, make_plan
from fivefold.launchers.results import figures_of, in_columns, report_path, results_table
from fivefold.launchers.status import write_plan

TEST = {"n": 360, "accuracy": 0.99, "logloss": 0.03}
HOLDOUT = {"n": 50, "accuracy": 0.5, "logloss": 1.5}
OOF = {"n": 1437, "accuracy": 0.97, "logloss": 0.09}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan = make_plan(Inputs(train="t", eval="e"), ["split.folds=2"], run="r", runs=str(tmp_path))
    write_plan(plan)
    return plan


def finish(plan: Plan, name: str, metrics: dict[str, Any] | None = None) -> None:
    """Leaves what the step's stage would leave: its record, and metrics.json of an evaluation."""
    step = plan.step(name)
    folder = step.folder / ("model" if step.stage in ("train-fold", "distill") else "output")
    record = {"stage": step.stage, "wall_seconds": 12.34, "finished": "2026-01-02T03:04:05Z", "metrics": metrics or {}}
    write_json(folder / "stage.json", record)
    if step.stage == "evaluate":
        write_json(folder / "metrics.json", metrics)


def test_a_fold_speaks_of_its_out_of_fold_rows(plan: Plan) -> None:
    finish(plan, "fold-0", {"oof_accuracy": 0.9, "oof_logloss": 0.3, "holdout_accuracy": 1.0, "holdout_logloss": 0.0})
    assert str(figures_of(plan, plan.step("fold-0"))) == "accuracy 0.9000, logloss 0.3000 (out-of-fold)"
    assert figures_of(plan, plan.step("fold-1")) is None


def test_the_ensemble_speaks_of_test_rows_before_holdout_and_never_of_out_of_fold_rows(plan: Plan) -> None:
    finish(plan, "ensemble", {"models": 2})
    for scored, rows in [
        ({"test": TEST, "holdout": HOLDOUT, "oof": OOF}, "test, 360"),
        ({"holdout": HOLDOUT}, "holdout, 50"),
    ]:
        finish(plan, "evaluate", scored)
        assert figures_of(plan, plan.step("ensemble")).rows == rows
    finish(plan, "evaluate", {"oof": OOF})
    assert figures_of(plan, plan.step("ensemble")) is None
    assert figures_of(plan, plan.step("evaluate")).rows == "out-of-fold, 1437"


def test_the_student_is_scored_by_its_own_evaluation(plan: Plan) -> None:
    finish(plan, "evaluate", {"test": TEST})
    finish(plan, "distill", {"holdout_accuracy": 0.8, "holdout_logloss": 0.7})
    assert figures_of(plan, plan.step("distill")).rows == "holdout"
    finish(plan, "evaluate-student", {"test": {**TEST, "accuracy": 0.985}})
    assert figures_of(plan, plan.step("distill")).accuracy == 0.985


def test_the_table_has_a_line_for_each_model_that_is_there(plan: Plan) -> None:
    assert results_table(plan) == "no model is trained yet"
    finish(plan, "split", {"rows": 9})
    finish(plan, "fold-1", {"oof_accuracy": 0.9, "oof_logloss": 0.3})
    finish(plan, "ensemble")
    finish(plan, "evaluate", {"test": TEST})
    finish(plan, "distill")
    assert results_table(plan).splitlines() == [
        "          accuracy  logloss  rows         seconds",
        "fold-1      0.9000   0.3000  out-of-fold     12.3",
        "ensemble    0.9900   0.0300  test, 360       12.3",
        "student          -        -  not scored      12.3",
    ]


def test_the_report_is_named_once_it_is_there(plan: Plan) -> None:
    assert report_path(plan) is None
    path = plan.folder / "evaluate" / "output" / "report.html"
    write_text(path, "<html></html>")
    assert report_path(plan) == path


def test_columns_are_as_wide_as_their_widest() -> None:
    assert in_columns([("a", "1"), ("bbb", "22")], numbers=[1]) == "a     1\nbbb  22"
