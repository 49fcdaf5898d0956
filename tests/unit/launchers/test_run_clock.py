"""The time of a run: what is left for folds and the steps after them, and what a second start still has."""

import math
import time
from pathlib import Path

import pytest

from fivefold.contract.files import read_json, write_json
from fivefold.errors import SettingsError
from fivefold.launchers.local import check_no_foreign_models
from fivefold.launchers.plan import Inputs, Plan, make_plan
from fivefold.launchers.run_clock import MARGIN, RunClock

SETTINGS = ("train.method=lp_ft", "train.linear_first=true", "time=1000s")


def plan_of(folder: Path, *settings: str, eval_: str | None = "TEST") -> Plan:
    return make_plan(Inputs("DATA", eval_), settings or SETTINGS, "r", str(folder), local=True)


def clock_of(plan: Plan) -> RunClock:
    plan.folder.mkdir(exist_ok=True)
    return RunClock(plan)


def finish(plan: Plan, seconds: float, *names: str) -> None:
    """Write the records of these steps, which took `seconds` each."""
    for name in names:
        step = plan.step(name)
        part = "model" if step.stage == "train-fold" else "output"
        (step.folder / part).mkdir(parents=True)
        write_json(step.folder / part / "stage.json", {"wall_seconds": seconds, "metrics": {}})


LINEAR_STEPS = (*(f"linear-fold-{fold}" for fold in range(5)), "linear-ensemble", "linear-evaluate")


def test_linear_probes_come_first_and_their_ensemble_lies_in_the_final_folder(tmp_path):
    plan = plan_of(tmp_path)
    names = [step.name for step in plan.steps]
    assert names[1:8] == list(LINEAR_STEPS)
    probe, early, last = plan.step("linear-fold-1"), plan.step("linear-ensemble"), plan.step("ensemble")
    assert probe.folder == tmp_path / "r" / "linear" / "fold-1"
    assert {"train.method=linear_probe", "system=default_linear"} < set(probe.arguments)
    assert early.folder == last.folder == tmp_path / "r" / "ensemble"
    assert early.environment["SM_CHANNEL_MODEL"] == str(tmp_path / "r" / "linear")
    assert last.environment["SM_CHANNEL_MODEL"] == str(tmp_path / "r")
    assert all("linear-evaluate" in plan.step(f"fold-{fold}").needs for fold in range(5))


def test_a_finished_ensemble_is_not_replaced_by_that_of_the_linear_probes(tmp_path):
    finish(plan_of(tmp_path), 1.0, "ensemble")
    names = [step.name for step in plan_of(tmp_path).steps]
    assert "linear-ensemble" not in names
    assert "linear-fold-0" in names


def test_a_finished_report_without_test_images_is_not_replaced(tmp_path):
    plan = plan_of(tmp_path, eval_=None)
    names = [step.name for step in plan.steps]
    assert ("linear-evaluate" in names, "linear-ensemble" in names) == (True, False)
    assert plan.step("evaluate").needs == ("ensemble",), "the weights of both systems are fitted without test images"
    assert "SM_CHANNEL_EVAL" not in plan.step("ensemble").environment
    finish(plan_of(tmp_path, eval_=None), 1.0, "evaluate")
    assert "linear-evaluate" not in [step.name for step in plan_of(tmp_path, eval_=None).steps]


def test_linear_probes_of_another_plan_are_not_blended(tmp_path):
    plan = plan_of(tmp_path)
    for step in (plan.step("fold-4"), plan.step("linear-fold-4")):
        (step.folder / "model").mkdir(parents=True)
        write_json(step.folder / "model" / "model.json", {})
        check_no_foreign_models(plan)
        with pytest.raises(SettingsError, match=step.folder.name):
            check_no_foreign_models(plan_of(tmp_path, *SETTINGS, "split.folds=4"))
    with pytest.raises(SettingsError, match="linear/fold-4"):
        check_no_foreign_models(plan_of(tmp_path, "train.method=lp_ft"))


def test_folds_share_the_time_that_the_following_steps_leave(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan, 10.0, *LINEAR_STEPS)
    clock = clock_of(plan)
    # ensemble: 5 folds and one pass of the probes; evaluate, distill, ensemble-student
    reserve = MARGIN * 10 * (6 + 1 + 1 + 1)
    assert clock.reserve() == pytest.approx(reserve)
    left = 1000 - reserve

    def shares(parallel: int, workers: int) -> list[float]:
        """Return each fold's share of what is left when it starts."""
        return [(clock.deadline(plan.step(f"fold-{n}"), parallel, workers) - time.time()) / left for n in range(5)]

    assert shares(3, 2) == pytest.approx([3 / 5] * 3 + [1] * 2, abs=0.01)
    assert shares(2, 2) == pytest.approx([1 / 3] * 2 + [1 / 2] * 2 + [1], abs=0.01)
    assert shares(5, 2) == pytest.approx([1] * 5, abs=0.01)
    assert shares(1, 8) == pytest.approx([1 / 5, 1 / 4, 1 / 3, 1 / 2, 1], abs=0.01)


def test_a_second_start_keeps_the_same_reserve(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan, 10.0, *LINEAR_STEPS)
    again = plan_of(tmp_path)  # without the early ensemble, which is done
    assert "linear-ensemble" not in [step.name for step in again.steps]
    assert clock_of(again).reserve() == clock_of(plan).reserve() == pytest.approx(MARGIN * 90)


def test_without_linear_probes_a_fifth_of_the_time_is_kept(tmp_path):
    plan = plan_of(tmp_path, "time=1000s")
    clock = clock_of(plan)
    assert clock.reserve() == 200
    assert clock.fits(plan.step("fold-0"))
    assert clock.fits(plan.step("ensemble"))
    clock._started -= 801
    assert not clock.fits(plan.step("fold-0"))
    assert clock.fits(plan.step("ensemble"))
    clock.forecast = {"ensemble": 300.0, "distill": 300.0}
    assert not clock.fits(plan.step("distill"))
    assert clock.fits(plan.step("ensemble")), "a run without a report makes one, even if it ends a little late"
    finish(plan, 1.0, "evaluate")
    assert not clock.fits(plan.step("ensemble"))


def test_steps_that_do_not_fit_are_left_out_but_never_the_first_ones(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan, 400.0, *LINEAR_STEPS)
    clock = clock_of(plan)
    assert not clock.fits(plan.step("fold-0"))
    assert not clock.fits(plan.step("ensemble"))
    assert clock.fits(plan.step("split"))
    assert clock.fits(plan.step("linear-fold-0"))


def test_a_second_start_has_what_the_first_left(tmp_path):
    plan = plan_of(tmp_path)
    clock = clock_of(plan)
    clock._started -= 300
    clock.save(at_once=True)
    assert read_json(plan.folder / "time.json") == {"limit_seconds": 1000, "used_seconds": pytest.approx(300, abs=2)}
    assert clock_of(plan).left == pytest.approx(700, abs=2)
    longer = plan_of(tmp_path, *SETTINGS, "time=2000s")
    assert clock_of(longer).left == pytest.approx(1700, abs=2)
    (plan.folder / "time.json").write_text("half a fi")
    assert clock_of(plan).left == pytest.approx(1000, abs=2)


def test_without_a_limit_the_clock_changes_nothing(tmp_path):
    plan = plan_of(tmp_path, *SETTINGS[:2])
    clock = clock_of(plan)
    assert clock.deadline(plan.step("fold-0"), 2, 2) == clock.left == math.inf
    assert all(map(clock.fits, plan.steps))
    clock.save(at_once=True)
    assert not (plan.folder / "time.json").exists()


@pytest.mark.parametrize("text", ["30", "m", "-5m", "1d", "30 m", "1e3s", "nan"])
def test_an_invalid_time_is_rejected(tmp_path, text):
    with pytest.raises(SettingsError, match="time="):
        plan_of(tmp_path, f"time={text}")


def test_other_platforms_take_no_time_and_omit_the_probes(tmp_path):
    with pytest.raises(SettingsError, match="time="):
        make_plan(Inputs("DATA"), ["time=5m"], "r", str(tmp_path))
    plan = make_plan(Inputs("DATA"), SETTINGS[:2], "r", str(tmp_path))
    assert not any(step.name.startswith("linear") for step in plan.steps)
    assert any("linear_first" in note for note in plan.notes)
