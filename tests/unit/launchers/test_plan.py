import re
from pathlib import Path

import pytest

from fivefold.contract.stage_specs import STAGES
from fivefold.errors import MissingInputError, SettingsError
from fivefold.launchers.plan import Inputs, Plan, make_plan, new_run_name, select

ALL_INPUTS = Inputs(train="in/train", eval="in/test", ground_truth="in/test/gt.csv")
FOLD_NAMES = ["fold-0", "fold-1", "fold-2"]
ALL_STEP_NAMES = ["split", *FOLD_NAMES, "ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student"]


def make_demo_plan(*overrides: str, inputs: Inputs = ALL_INPUTS, **options: object) -> Plan:
    return make_plan(inputs, ["split.folds=3", *overrides], run="r", recipe="demo", **options)


def step_names(plan: Plan) -> list[str]:
    return [step.name for step in plan.steps]


def test_every_step_follows_its_dependencies_and_has_its_channels() -> None:
    plan = make_demo_plan()
    assert step_names(plan) == ALL_STEP_NAMES
    earlier: set[str] = set()
    for step in plan.steps:
        assert set(step.needs) <= earlier, step.name
        earlier.add(step.name)
        channels = {
            name.removeprefix("SM_CHANNEL_").lower() for name in step.environment if name.startswith("SM_CHANNEL_")
        }
        stage = STAGES[step.stage]
        assert {*stage.channels} <= channels <= {*stage.channels, *stage.optional}, step.name
    assert plan.step("ensemble").needs == plan.step("distill").needs == tuple(FOLD_NAMES)


def test_fold_step_uses_the_run_layout() -> None:
    step = make_demo_plan().step("fold-2")
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


def test_channels_are_inputs_or_outputs_of_earlier_steps() -> None:
    plan = make_demo_plan(inputs=Inputs("in/train", "in/test", "in/test/gt.csv", unlabeled="u", weights="w"))
    for name, folder in (("ensemble", "runs/r"), ("distill", "runs/r"), ("ensemble-student", "runs/r/distill/model")):
        assert plan.step(name).environment["SM_CHANNEL_MODEL"] == folder
    environment = plan.step("evaluate").environment
    assert environment["SM_CHANNEL_PREDICTIONS"] == "runs/r/ensemble/output"
    assert environment["SM_CHANNEL_GROUND_TRUTH"] == "in/test/gt.csv"
    assert [step.name for step in plan.steps if "SM_CHANNEL_WEIGHTS" in step.environment] == [*FOLD_NAMES, "distill"]
    assert [step.name for step in plan.steps if "SM_CHANNEL_UNLABELED" in step.environment] == ["distill"]


def test_overrides_are_passed_only_to_stages_that_use_them() -> None:
    plan = make_demo_plan("TRAIN__EPOCHS=3", "predict.tta=[plain,flip]", "seed=7")
    steps_by_override = {
        override: [step.name for step in plan.steps if override in step.arguments]
        for override in ("TRAIN__EPOCHS=3", "seed=7")
    }
    assert steps_by_override == {override: [*FOLD_NAMES, "distill"] for override in steps_by_override}
    assert [step.name for step in plan.steps if "split.folds=3" in step.arguments] == ["split"]
    assert "predict.tta=[plain,flip]" in plan.step("ensemble-student").arguments
    assert "predict.tta=[plain,flip]" not in plan.step("evaluate").arguments
    assert plan.step("fold-0").epochs == 3


def test_plan_without_test_images_has_no_ensemble_and_a_holdout_scores_the_student() -> None:
    plan = make_demo_plan(inputs=Inputs(train="t"))
    assert step_names(plan) == ["split", *FOLD_NAMES, "evaluate", "distill"]
    assert "SM_CHANNEL_PREDICTIONS" not in plan.step("evaluate").environment
    assert plan.step("evaluate").needs == tuple(FOLD_NAMES)
    assert any("no eval=" in note for note in plan.notes)
    held_out = make_demo_plan("split.holdout=.1", inputs=Inputs(train="t")).steps[-1]
    assert (held_out.name, held_out.needs) == ("evaluate-student", ("distill",))
    assert held_out.environment["SM_CHANNEL_MODEL"] == "runs/r/distill/model"


@pytest.mark.parametrize(
    ("inputs", "overrides", "student_steps"),
    [
        (Inputs(train="t", eval="e"), [], ["ensemble-student"]),
        (Inputs(train="t", eval="e"), ["split.holdout=.1"], ["ensemble-student", "evaluate-student"]),
        (Inputs(train="t", eval="e", ground_truth="g"), [], ["ensemble-student", "evaluate-student"]),
        (Inputs(train="t", eval="e", truth_unknown=True), [], ["ensemble-student", "evaluate-student"]),
    ],
)
def test_student_is_evaluated_if_rows_may_have_labels(inputs, overrides, student_steps):
    plan = make_demo_plan(*overrides, inputs=inputs)
    assert step_names(plan) == ["split", *FOLD_NAMES, "ensemble", "evaluate", "distill", *student_steps]
    assert any("evaluate-student" in note for note in plan.notes) == ("evaluate-student" not in student_steps)
    allow_empty = [step.name for step in plan.steps if "evaluate.allow_empty=true" in step.arguments]
    assert allow_empty == (["evaluate-student"] if inputs.truth_unknown else [])


def test_split_by_ratios_has_one_fold_and_distils_only_with_a_named_teacher() -> None:
    plan = make_demo_plan("split.ratios=[.8,.1,.1]")
    assert step_names(plan) == ["split", "fold-0", "ensemble", "evaluate"]
    assert any("distill.teacher=best_fold" in note for note in plan.notes)
    assert "distill" in step_names(make_demo_plan("split.ratios=[.8,.1,.1]", "distill.teacher=best_fold"))


def test_first_seed_has_no_suffix_and_is_the_teacher() -> None:
    plan = make_demo_plan(seeds=[42, 43])
    assert [name for name in step_names(plan) if name.startswith("fold")] == [
        *FOLD_NAMES,
        *(f"{name}-seed-43" for name in FOLD_NAMES),
    ]
    assert plan.step("fold-1-seed-43").command[-2:] == ("seed=43", "FOLD=1")
    assert "seed=42" in plan.step("distill").arguments
    assert set(plan.step("ensemble").needs) == {name for name in step_names(plan) if name.startswith("fold")}


@pytest.mark.parametrize(
    ("stages", "folds", "expected"),
    [
        (["split", "train-fold"], [], ["split", *FOLD_NAMES]),
        (["ensemble", "evaluate"], [], ["ensemble", "evaluate"]),
        (["distill", "ensemble"], [], ["ensemble", "distill", "ensemble-student"]),
        ([], [0, 2], ["split", "fold-0", "fold-2"]),
        (["train-fold", "distill"], [1], ["fold-1", "distill"]),
    ],
)
def test_select_keeps_only_the_requested_stages_and_folds(stages, folds, expected):
    plan = select(make_demo_plan(), stages, folds)
    assert step_names(plan) == expected
    for step in plan.steps:
        assert set(step.needs) <= set(expected)


@pytest.mark.parametrize(
    ("invalid_request", "message"),
    [
        (lambda: make_demo_plan("train.epohcs=3"), r"train\.epochs"),
        (lambda: make_demo_plan("fold=1"), "folds="),
        (lambda: make_demo_plan("seed=1", seeds=[2]), "give one of them"),
        (lambda: make_demo_plan(seeds=[2, 2]), "seeds=2,2"),
        (lambda: make_plan(ALL_INPUTS, run="../r"), "run='../r'"),
        (lambda: make_plan(ALL_INPUTS, run="r", recipe="dmeo"), "demo"),
        (lambda: select(make_demo_plan(), ["trian-fold"]), "train-fold"),
        (lambda: select(make_demo_plan(), [], [3]), "folds 0 to 2"),
        (lambda: select(make_demo_plan(inputs=Inputs(train="t")), ["ensemble"]), "no eval="),
    ],
)
def test_invalid_requests_raise_errors_while_planning(invalid_request: object, message: str) -> None:
    with pytest.raises((SettingsError, MissingInputError), match=message):
        invalid_request()


def test_new_run_names_are_unique_and_dated() -> None:
    first, second = new_run_name(), new_run_name()
    assert first != second
    assert re.fullmatch(r"run_\d{8}_\d{6}_[0-9a-f]{8}", first)
