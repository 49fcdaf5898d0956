"""Where a step stands, told from its files and from real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.contract.files import write_json, write_text
from fivefold.errors import DataError, MissingInputError
from fivefold.launchers.plan import PLAN, Inputs, Plan, make_plan
from fivefold.launchers.status import (
    STATE,
    epochs_done,
    newest_run,
    read_plan,
    running_pid,
    status_of,
    write_ended,
    write_plan,
    write_started,
)

RECORD = {"stage": "split", "wall_seconds": 12.3, "finished": "2026-01-02T03:04:05Z", "metrics": {}}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan = make_plan(Inputs(train="t"), ["split.folds=2", "train.epochs=4"], run="r", runs=str(tmp_path))
    write_plan(plan)
    return plan


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_plan_is_read_as_it_was_written(plan: Plan) -> None:
    assert read_plan(plan.folder) == plan


def test_a_run_that_was_moved_is_read_where_it_is(plan: Plan) -> None:
    moved = plan.folder.with_name("moved")
    plan.folder.rename(moved)
    assert read_plan(moved).step("fold-1").folder == moved / "fold-1"


def test_what_is_no_plan(plan: Plan) -> None:
    write_json(plan.folder / PLAN, {"run": "r"})
    with pytest.raises(DataError, match="not a plan"):
        read_plan(plan.folder)
    with pytest.raises(MissingInputError, match="holds no run"):
        read_plan(plan.folder.parent)


def test_waiting_running_done(plan: Plan) -> None:
    step = plan.step("split")
    assert status_of(step).word == "waiting"
    write_started(step, os.getppid())  # a process older than its step
    assert status_of(step).word == "running"
    assert running_pid(step) == os.getppid()
    write_json(step.folder / "output" / "stage.json", RECORD)
    write_ended(step, 0)
    assert status_of(step).word == "done"
    assert status_of(step).detail.startswith("12 s, finished 2026-01-0")
    assert running_pid(step) is None


def test_a_stage_that_was_run_by_hand_is_done(plan: Plan) -> None:
    write_json(plan.step("fold-0").folder / "model" / "stage.json", {**RECORD, "stage": "train-fold"})
    assert status_of(plan.step("fold-0")).word == "done"


def test_a_failure_says_its_first_line_before_the_old_record(plan: Plan) -> None:
    step = plan.step("split")
    write_json(step.folder / "output" / "stage.json", RECORD)
    write_started(step, os.getpid())
    write_text(step.folder / "failure", "no images in t\n\nTraceback")
    write_ended(step, 66)
    status = status_of(step)
    assert (status.word, status.detail, status.exit_code) == ("failed", "no images in t", 66)


def test_a_failure_without_a_file_says_the_last_line_of_the_log(plan: Plan) -> None:
    step = plan.step("split")
    write_started(step, os.getpid())
    write_text(step.folder / "log.txt", "one\ntwo\n\n")
    write_ended(step, 137)
    assert (status_of(step).word, status_of(step).detail) == ("stopped", "two")


def test_a_process_that_is_gone_without_a_word_is_stopped(plan: Plan) -> None:
    step = plan.step("split")
    write_started(step, gone())
    assert status_of(step).word == "stopped"
    assert running_pid(step) is None


def test_a_later_process_with_the_same_number_is_another(plan: Plan) -> None:
    step = plan.step("split")
    write_started(step, os.getpid())
    state = json.loads((step.folder / STATE).read_text())
    write_json(step.folder / STATE, {**state, "started": "2001-01-01T00:00:00+00:00"})
    assert status_of(step).word == "stopped"


def test_epochs_of_this_run_alone_are_counted(plan: Plan) -> None:
    step = plan.step("fold-0")
    log = step.folder / "model" / "train_log.csv"
    write_text(log, "epoch,train_loss\n1,.5\n2,.4\n")
    write_started(step, os.getppid())
    assert status_of(step).detail == "epoch 2 of 4"
    assert epochs_done(step) == 2
    os.utime(log, (1e9, 1e9))
    assert epochs_done(step, since=2e9) == 0


def test_the_newest_run_is_the_one_planned_last(plan: Plan) -> None:
    runs = plan.folder.parent
    later = make_plan(Inputs(train="t"), run="a", runs=str(runs))
    write_plan(later)
    os.utime(plan.folder / PLAN, (1e9, 1e9))
    assert newest_run(runs) == later.folder
    with pytest.raises(MissingInputError, match="no run below"):
        newest_run(runs / "nowhere")
