"""A run's folders: what a stage that is told its run fills in, and what it leaves as it is."""

from pathlib import Path

import pytest

from fivefold.contract.run_layout import CHANNELS, env_for_run, find_ground_truth, pick_ground_truth, run_path
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, make_plan


def filled(stage: str, run: Path, fold: int | None = None, **given: str) -> dict[str, str]:
    return dict(env_for_run(STAGES[stage], given, str(run), fold))


def test_a_stage_that_is_told_its_run_has_the_variables_that_a_plan_gives_it(tmp_path: Path):
    run, data = tmp_path / "runs" / "first", tmp_path / "eval"
    data.mkdir()
    (data / "test.csv").write_text("ID,img_path\n")
    (data / "gt.csv").write_text("ID,label\n")
    inputs = Inputs(train="/data", eval=str(data), ground_truth=str(data / "gt.csv"))
    plan = make_plan(inputs, (), "first", str(run.parent), "demo")
    for name in ("split", "ensemble"):
        (run / name / "output").mkdir(parents=True)
    given = {"SM_CHANNEL_TRAIN": "/data", "SM_CHANNEL_EVAL": str(data)}
    for step in plan.steps:
        if step.name.endswith("-student"):
            continue
        fold = int(step.name.removeprefix("fold-")) if step.stage == "train-fold" else None
        read = {f"SM_CHANNEL_{name.upper()}" for name in (*STAGES[step.stage].channels, *STAGES[step.stage].optional)}
        own = {name: value for name, value in given.items() if name in read}
        assert filled(step.stage, run, fold, **own) == dict(step.environment), step.name
    assert set(CHANNELS) - {"prepare"} == {step.stage for step in plan.steps}


def test_what_is_said_is_left_as_it_is(tmp_path: Path):
    own = {"SM_MODEL_DIR": "/m", "SM_CHANNEL_FOLDS": "/f", "SM_OUTPUT_DATA_DIR": ""}
    found = filled("train-fold", tmp_path / "first", 2, **own)
    assert (found["SM_MODEL_DIR"], found["SM_CHANNEL_FOLDS"]) == ("/m", "/f")
    assert found["SM_OUTPUT_DATA_DIR"] == str(tmp_path / "first" / "fold-2" / "output"), "an empty one is not set"
    own = {"SAGEMAKER_BASE_DIR": str(tmp_path / "ml")}
    assert filled("train-fold", tmp_path / "first", 0, **own) == own, "nor are the platform's folders covered"
    with pytest.raises(SettingsError, match="FOLD=0"):
        filled("train-fold", tmp_path)


def test_what_a_stage_can_do_without_is_taken_where_it_is(tmp_path: Path):
    run = tmp_path / "first"
    assert not [name for name in filled("evaluate", run) if name.startswith("SM_CHANNEL_")]
    (run / "split" / "output").mkdir(parents=True)
    assert set(filled("evaluate", run)) >= {"SM_CHANNEL_FOLDS", "SM_CHANNEL_MODEL"}
    assert "SM_CHANNEL_PREDICTIONS" not in filled("evaluate", run)
    assert filled("train-fold", tmp_path / "no", 0)["SM_CHANNEL_FOLDS"] == f"{tmp_path}/no/split/output"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../other", "/tmp/x"])
def test_a_run_whose_name_leads_elsewhere_is_refused(name: str):
    with pytest.raises(SettingsError, match=f"run='{name}' .*RUNS="):
        run_path("runs", name)
    assert run_path("s3://bucket/runs/", "first") == "s3://bucket/runs/first"


def test_runs_may_be_in_a_bucket(bucket):
    bucket.write("runs/first/split/output/folds.parquet", b"x")
    found = dict(env_for_run(STAGES["ensemble"], {}, f"s3://{bucket.name}/runs/first", None))
    assert found["SM_CHANNEL_FOLDS"] == f"s3://{bucket.name}/runs/first/split/output"
    assert found["SM_OUTPUT_DATA_DIR"] == f"s3://{bucket.name}/runs/first/ensemble/output"
    assert "SM_OUTPUT_DIR" not in found, "the failure file stays on the machine"
    empty = dict(env_for_run(STAGES["evaluate"], {}, f"s3://{bucket.name}/runs/none", None))
    assert not [name for name in empty if name.startswith("SM_CHANNEL_")]


@pytest.mark.parametrize("name", ["ground_truth.csv", "GT.csv", "Ground-Truth.CSV"])
def test_the_truth_is_found_however_it_is_spelt(tmp_path: Path, name: str):
    (tmp_path / "Test.csv").write_text("ID,img_path\n")
    (tmp_path / name).write_text("ID,label\n")
    assert find_ground_truth(str(tmp_path)) == str(tmp_path / name)
    assert pick_ground_truth([f"deep/er/{name}", f"set/{name}", "set/test.csv", "deep/er/test.csv"]) == f"set/{name}"
    (tmp_path / "gt.csv").write_text("ID,label\n")
    assert find_ground_truth(str(tmp_path)) == str(tmp_path / "gt.csv")
