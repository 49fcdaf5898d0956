from pathlib import Path

import pytest

from fivefold.contract.run_layout import CHANNELS, env_for_run, find_ground_truth, pick_ground_truth, run_path
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, make_plan, make_planning


def fill(stage: str, run: Path, fold: int | None = None, **variables: str) -> dict[str, str]:
    return dict(env_for_run(STAGES[stage], variables, str(run), fold))


def test_env_for_run_gives_the_variables_of_the_plan(tmp_path: Path):
    run, data = tmp_path / "runs" / "first", tmp_path / "eval"
    data.mkdir()
    (data / "test.csv").write_text("ID,img_path\n")
    (data / "gt.csv").write_text("ID,label\n")
    inputs = Inputs(train="/data", eval=str(data), ground_truth=str(data / "gt.csv"))
    plan = make_plan(inputs, (), "first", str(run.parent), "demo")
    for name in ("split", "ensemble"):
        (run / name / "output").mkdir(parents=True)
    input_channels = {"SM_CHANNEL_TRAIN": "/data", "SM_CHANNEL_EVAL": str(data)}
    for step in plan.steps:
        if step.name.endswith("-student"):
            continue
        fold = int(step.name.removeprefix("fold-")) if step.stage == "train-fold" else None
        used = {f"SM_CHANNEL_{name.upper()}" for name in (*STAGES[step.stage].channels, *STAGES[step.stage].optional)}
        variables = {name: value for name, value in input_channels.items() if name in used}
        assert fill(step.stage, run, fold, **variables) == dict(step.environment), step.name
    planning = make_planning(inputs, (), "first", str(run.parent))
    assert fill("plan", run, None, SM_CHANNEL_TRAIN="/data") == dict(planning.step("plan").environment)
    assert set(CHANNELS) - {"prepare", "plan", "audit"} == {step.stage for step in plan.steps}


def test_env_for_run_keeps_set_variables_and_platform_folders(tmp_path: Path):
    variables = {"SM_MODEL_DIR": "/m", "SM_CHANNEL_FOLDS": "/f", "SM_OUTPUT_DATA_DIR": ""}
    environ = fill("train-fold", tmp_path / "first", 2, **variables)
    assert (environ["SM_MODEL_DIR"], environ["SM_CHANNEL_FOLDS"]) == ("/m", "/f")
    assert environ["SM_OUTPUT_DATA_DIR"] == str(tmp_path / "first" / "fold-2" / "output"), "an empty value is unset"
    variables = {"SAGEMAKER_BASE_DIR": str(tmp_path / "ml")}
    assert fill("train-fold", tmp_path / "first", 0, **variables) == variables, "the platform folders stay unchanged"
    with pytest.raises(SettingsError, match="FOLD=0"):
        fill("train-fold", tmp_path)


def test_env_for_run_fills_optional_channels_only_if_they_exist(tmp_path: Path):
    run = tmp_path / "first"
    assert not [name for name in fill("evaluate", run) if name.startswith("SM_CHANNEL_")]
    (run / "split" / "output").mkdir(parents=True)
    assert set(fill("evaluate", run)) >= {"SM_CHANNEL_FOLDS", "SM_CHANNEL_MODEL"}
    assert "SM_CHANNEL_PREDICTIONS" not in fill("evaluate", run)
    assert fill("train-fold", tmp_path / "no", 0)["SM_CHANNEL_FOLDS"] == f"{tmp_path}/no/split/output"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../other", "/tmp/x"])
def test_run_path_refuses_names_that_lead_outside(name: str):
    with pytest.raises(SettingsError, match=f"run='{name}' .*RUNS="):
        run_path("runs", name)
    assert run_path("s3://bucket/runs/", "first") == "s3://bucket/runs/first"


@pytest.mark.parametrize("name", ["ground_truth.csv", "GT.csv", "Ground-Truth.CSV"])
def test_ground_truth_file_is_found_in_any_spelling(tmp_path: Path, name: str):
    (tmp_path / "Test.csv").write_text("ID,img_path\n")
    (tmp_path / name).write_text("ID,label\n")
    assert find_ground_truth(str(tmp_path)) == str(tmp_path / name)
    assert pick_ground_truth([f"deep/er/{name}", f"set/{name}", "set/test.csv", "deep/er/test.csv"]) == f"set/{name}"
    (tmp_path / "gt.csv").write_text("ID,label\n")
    assert find_ground_truth(str(tmp_path)) == str(tmp_path / "gt.csv")
