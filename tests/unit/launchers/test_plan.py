"""The plan of a run: its steps, what each is given, and what a request may leave out."""

import re
from pathlib import Path

import pytest

from fivefold.contract.stage_specs import STAGES
from fivefold.errors import MissingInputError, SettingsError
from fivefold.launchers.plan import Inputs, Plan, make_plan, new_run_name, select

ALL = Inputs(train="in/train", eval="in/test", ground_truth="in/test/gt.csv")
FOLD_NAMES = ["fold-0", "fold-1", "fold-2"]
EVERY_NAME = ["split", *FOLD_NAMES, "ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student"]


def plan_of(*overrides: str, inputs: Inputs = ALL, **more: object) -> Plan:
    return make_plan(inputs, ["split.folds=3", *overrides], run="r", recipe="demo", **more)


def names(plan: Plan) -> list[str]:
    return [step.name for step in plan.steps]


def test_every_step_comes_after_what_it_needs_and_has_its_channels() -> None:
    plan = plan_of()
    assert names(plan) == EVERY_NAME
    seen: set[str] = set()
    for step in plan.steps:
        assert set(step.needs) <= seen, step.name
        seen.add(step.name)
        given = {n.removeprefix("SM_CHANNEL_").lower() for n in step.environment if n.startswith("SM_CHANNEL_")}
        stage = STAGES[step.stage]
        assert {*stage.channels} <= given <= {*stage.channels, *stage.optional}, step.name
    assert plan.step("ensemble").needs == plan.step("distill").needs == tuple(FOLD_NAMES)


def test_a_fold_has_the_layout_of_the_run() -> None:
    step = plan_of().step("fold-2")
    assert dict(step.environment) == {
        "SM_CHANNEL_TRAIN": "in/train",
        "SM_CHANNEL_FOLDS": "runs/r/split/output",
        "SM_MODEL_DIR": "runs/r/fold-2/model",
        "SM_CHECKPOINT_DIR": "runs/r/fold-2/checkpoints",
        "SM_OUTPUT_DATA_DIR": "runs/r/fold-2/output",
        "SM_OUTPUT_DIR": "runs/r/fold-2",
    }
    assert (step.fold, step.seed) == (2, 42)
    assert step.command == ("train-fold", "recipe=demo", "FOLD=2")
    assert step.folder == Path("runs/r/fold-2")


def test_the_ensemble_reads_the_run_and_the_student_only_its_own_model() -> None:
    plan = plan_of()
    for name, folder in (("ensemble", "runs/r"), ("distill", "runs/r"), ("ensemble-student", "runs/r/distill/model")):
        assert plan.step(name).environment["SM_CHANNEL_MODEL"] == folder
    given = plan.step("evaluate").environment
    assert given["SM_CHANNEL_PREDICTIONS"] == "runs/r/ensemble/output"
    assert given["SM_CHANNEL_GROUND_TRUTH"] == "in/test/gt.csv"


def test_overrides_reach_the_stages_that_use_them_and_no_others() -> None:
    plan = plan_of("TRAIN__EPOCHS=3", "predict.tta=[plain,flip]", "seed=7")
    having = {text: [s.name for s in plan.steps if text in s.arguments] for text in ("TRAIN__EPOCHS=3", "seed=7")}
    assert having == {text: [*FOLD_NAMES, "distill"] for text in having}
    assert [s.name for s in plan.steps if "split.folds=3" in s.arguments] == ["split"]
    assert "predict.tta=[plain,flip]" in plan.step("ensemble-student").arguments
    assert "predict.tta=[plain,flip]" not in plan.step("evaluate").arguments
    assert plan.step("fold-0").epochs == 3


def test_weights_and_unlabelled_images_are_channels() -> None:
    plan = plan_of(inputs=Inputs(train="t", eval="e", unlabeled="u", weights="w"))
    assert [s.name for s in plan.steps if "SM_CHANNEL_WEIGHTS" in s.environment] == [*FOLD_NAMES, "distill"]
    assert [s.name for s in plan.steps if "SM_CHANNEL_UNLABELED" in s.environment] == ["distill"]


def test_without_test_images_nothing_predicts_them_and_a_holdout_scores_the_student() -> None:
    plan = plan_of(inputs=Inputs(train="t"))
    assert names(plan) == ["split", *FOLD_NAMES, "evaluate", "distill"]
    assert "SM_CHANNEL_PREDICTIONS" not in plan.step("evaluate").environment
    assert plan.step("evaluate").needs == tuple(FOLD_NAMES)
    assert any("no eval=" in note for note in plan.notes)
    held_out = plan_of("split.holdout=.1", inputs=Inputs(train="t")).steps[-1]
    assert (held_out.name, held_out.needs) == ("evaluate-student", ("distill",))
    assert held_out.environment["SM_CHANNEL_MODEL"] == "runs/r/distill/model"


@pytest.mark.parametrize(
    ("inputs", "overrides", "student"),
    [
        (Inputs(train="t", eval="e"), [], ["ensemble-student"]),
        (Inputs(train="t", eval="e"), ["split.holdout=.1"], ["ensemble-student", "evaluate-student"]),
        (Inputs(train="t", eval="e", ground_truth="g"), [], ["ensemble-student", "evaluate-student"]),
        (Inputs(train="t", eval="e", truth_unknown=True), [], ["ensemble-student", "evaluate-student"]),
    ],
)
def test_a_student_is_evaluated_where_a_row_may_have_a_truth(
    inputs: Inputs, overrides: list[str], student: list[str]
) -> None:
    plan = plan_of(*overrides, inputs=inputs)
    assert names(plan) == ["split", *FOLD_NAMES, "ensemble", "evaluate", "distill", *student]
    assert any("evaluate-student" in note for note in plan.notes) == ("evaluate-student" not in student)
    empty = [step.name for step in plan.steps if "evaluate.allow_empty=true" in step.arguments]
    assert empty == (["evaluate-student"] if inputs.truth_unknown else [])


def test_parts_by_share_are_one_fold_without_teachers_unless_another_is_named() -> None:
    plan = plan_of("split.ratios=[.8,.1,.1]")
    assert names(plan) == ["split", "fold-0", "ensemble", "evaluate"]
    assert any("distill.teacher=best_fold" in note for note in plan.notes)
    assert "distill" in names(plan_of("split.ratios=[.8,.1,.1]", "distill.teacher=best_fold"))


def test_the_first_seed_has_no_suffix_and_teaches() -> None:
    plan = plan_of(seeds=[42, 43])
    assert [n for n in names(plan) if n.startswith("fold")] == [*FOLD_NAMES, *(f"{n}-seed-43" for n in FOLD_NAMES)]
    assert plan.step("fold-1-seed-43").command[-2:] == ("seed=43", "FOLD=1")
    assert "seed=42" in plan.step("distill").arguments
    assert set(plan.step("ensemble").needs) == {n for n in names(plan) if n.startswith("fold")}


@pytest.mark.parametrize(
    ("stages", "folds", "left"),
    [
        (["split", "train-fold"], [], ["split", *FOLD_NAMES]),
        (["ensemble", "evaluate"], [], ["ensemble", "evaluate"]),
        (["distill", "ensemble"], [], ["ensemble", "distill", "ensemble-student"]),
        (["evaluate-student"], [], ["evaluate-student"]),
        ([], [0, 2], ["split", "fold-0", "fold-2"]),
        (["train-fold", "distill"], [1], ["fold-1", "distill"]),
        ([], [], EVERY_NAME),
    ],
)
def test_only_what_is_asked_for(stages: list[str], folds: list[int], left: list[str]) -> None:
    plan = select(plan_of(), stages, folds)
    assert names(plan) == left
    for step in plan.steps:
        assert set(step.needs) <= set(left)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plan_of("train.epohcs=3"), r"train\.epochs"),
        (lambda: plan_of("fold=1"), "folds="),
        (lambda: plan_of("stage=split"), "stages="),
        (lambda: plan_of("seed=1", seeds=[2]), "give one of them"),
        (lambda: plan_of(seeds=[2, 2]), "seeds=2,2"),
        (lambda: make_plan(ALL, run="../r"), "run='../r'"),
        (lambda: make_plan(ALL, run="r", recipe="dmeo"), "demo"),
        (lambda: make_plan(ALL, run="r", recipe="nowhere.toml"), "nowhere"),
        (lambda: select(plan_of(), ["trian-fold"]), "train-fold"),
        (lambda: select(plan_of(), [], [3]), "folds 0 to 2"),
        (lambda: select(plan_of(inputs=Inputs(train="t")), ["ensemble"]), "no eval="),
    ],
)
def test_a_bad_request_fails_in_the_plan(make: object, says: str) -> None:
    with pytest.raises((SettingsError, MissingInputError), match=says):
        make()


def test_names() -> None:
    first, second = new_run_name(), new_run_name()
    assert first != second
    assert re.fullmatch(r"run_\d{8}_\d{6}_[0-9a-f]{8}", first)
