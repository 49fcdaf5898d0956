"""`python -m jobs status`: a line for each step, of the run that is meant."""

from pathlib import Path

import pytest

from fivefold.contract.files import write_json
from fivefold.errors import MissingInputError, SettingsError
from fivefold.launchers.plan import Inputs, Plan, make_plan
from fivefold.launchers.status import write_ended, write_plan, write_started
from jobs import status


def planned(runs: Path, name: str) -> Plan:
    plan = make_plan(Inputs(train="t", eval="e"), ["split.folds=2"], run=name, runs=str(runs))
    write_plan(plan)
    return plan


def test_a_line_for_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, "first")
    record = {"stage": "train-fold", "wall_seconds": 61.0, "finished": "2026-01-02T03:04:05Z"}
    metrics = {"oof_accuracy": 0.9, "oof_logloss": 0.3}
    write_json(plan.step("fold-0").folder / "model" / "stage.json", {**record, "metrics": metrics})
    write_started(plan.step("fold-1"), 1)
    write_ended(plan.step("fold-1"), 65)

    assert status.main(["run=first", f"runs={tmp_path}"]) == 0
    heading, _, _, *lines = capsys.readouterr().out.splitlines()
    words = {line.split()[0]: line for line in lines}
    assert heading == f"run first in {tmp_path / 'first'}"
    assert list(words) == [step.name for step in plan.steps]
    assert "accuracy 0.9000, logloss 0.3000 (out-of-fold)" in words["fold-0"]
    assert "61 s, finished 2026-01-0" in words["fold-0"]
    assert "failed (65)" in words["fold-1"]
    assert words["ensemble"].endswith("for fold-1"), "fold-0 is done: only fold-1 is waited for"


def test_a_run_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    planned(tmp_path, "digits")
    with pytest.raises(MissingInputError, match="did you mean 'digits'"):
        status.main(["run=digit", f"runs={tmp_path}"])
    with pytest.raises(MissingInputError, match="no run below"):
        status.main([f"runs={tmp_path / 'nowhere'}"])


def test_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean 'run'"):
        status.main(["rum=digits"])
