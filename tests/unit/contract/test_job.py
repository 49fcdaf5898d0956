import json
from pathlib import Path

import pytest

from fivefold.contract.files import write_text
from fivefold.contract.job import StageContext, context_from_env, hyperparameters_from_env, output_dir
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import MissingInputError, SettingsError


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    """The folders that SageMaker creates for a custom image."""
    root = tmp_path / "ml"
    for folder in ("input/config", "input/data/train", "input/data/folds", "model", "output/data"):
        (root / folder).mkdir(parents=True)
    return root


def load(stage: str, environ: dict[str, str], tmp_path: Path) -> StageContext:
    return context_from_env(STAGES[stage], environ, tmp_path / "scratch")


def write_hyperparameters(base_dir: Path, value: object) -> dict[str, str]:
    write_text(base_dir / "input" / "config" / "hyperparameters.json", json.dumps(value))
    return {"SAGEMAKER_BASE_DIR": str(base_dir)}


def test_context_without_variables_uses_the_sagemaker_folders(base_dir: Path, tmp_path: Path):
    job = load("train-fold", {"SAGEMAKER_BASE_DIR": str(base_dir)}, tmp_path)
    assert job.channels == {"train": base_dir / "input/data/train", "folds": base_dir / "input/data/folds"}
    assert (job.model_dir, job.output_dir) == (base_dir / "model", base_dir / "output")
    assert (job.output_data_dir, job.checkpoint_dir) == (base_dir / "output/data", base_dir / "checkpoints")


def test_set_variables_override_the_folders_and_empty_ones_count_as_unset(base_dir: Path, tmp_path: Path):
    names = ("SM_MODEL_DIR", "SM_OUTPUT_DIR", "SM_OUTPUT_DATA_DIR", "SM_CHECKPOINT_DIR", "SM_CHANNEL_TRAIN")
    environ = {"SAGEMAKER_BASE_DIR": str(base_dir), **{name: str(tmp_path / name) for name in names}}
    job = load("train-fold", environ, tmp_path)
    folders = [job.model_dir, job.output_dir, job.output_data_dir, job.checkpoint_dir, job.channels["train"]]
    assert folders == [tmp_path / name for name in names]
    empty = dict.fromkeys([*names, "SM_GROUND_TRUTH_DIR", "SM_CHANNEL_FOLDS"], "")
    job = load("train-fold", empty | {"SAGEMAKER_BASE_DIR": str(base_dir)}, tmp_path)
    assert (job.model_dir, set(job.channels)) == (base_dir / "model", {"train", "folds"})
    job = load("train-fold", empty | {"SAGEMAKER_BASE_DIR": ""}, tmp_path)
    assert (job.model_dir, job.channels) == (None, {})


def test_channel_names_are_normalized_and_manifests_ignored(base_dir: Path, tmp_path: Path):
    (base_dir / "input/data/ground-truth").mkdir()
    (base_dir / "input/data/train-manifest").write_text("")
    environ = {"SAGEMAKER_BASE_DIR": str(base_dir), "SM_CHANNEL_UN-LABELED": "/a", "SM_CHANNEL_Eval": "/b"}
    assert set(load("evaluate", environ, tmp_path).channels) == {"train", "folds", "ground_truth", "un_labeled", "eval"}


def test_ground_truth_variable_ranks_between_channel_and_folder(base_dir: Path, tmp_path: Path):
    (base_dir / "input/data/ground_truth").mkdir()
    environ = {"SAGEMAKER_BASE_DIR": str(base_dir)}
    assert load("evaluate", environ, tmp_path).channels["ground_truth"] == base_dir / "input/data/ground_truth"
    environ["SM_GROUND_TRUTH_DIR"] = "/own"
    assert load("evaluate", environ, tmp_path).channels["ground_truth"] == Path("/own")
    environ["SM_CHANNEL_GROUND_TRUTH"] = "/channel"
    assert load("evaluate", environ, tmp_path).channels["ground_truth"] == Path("/channel")


def test_missing_channel_error_names_its_variable(tmp_path: Path):
    job = load("train-fold", {"SM_CHANNEL_TRIAN": str(tmp_path), "SM_CHANNEL_FOLDS": str(tmp_path / "no")}, tmp_path)
    with pytest.raises(MissingInputError, match=r"'train': set SM_CHANNEL_TRAIN .*: folds, trian\)"):
        job.channel("train")
    with pytest.raises(MissingInputError, match=r"channel 'folds': .*/no does not exist; check SM_CHANNEL_FOLDS"):
        job.optional_channel("folds")
    assert job.optional_channel("weights") is None
    environ = {"SM_CHANNEL_EVAL": str(tmp_path / "no"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}
    with pytest.raises(MissingInputError, match="channel 'eval'"):
        load("evaluate", environ, tmp_path).check_channels()  # a set optional channel must exist before any work


def test_missing_output_variables_are_settings_errors(tmp_path: Path):
    environ = {"SM_CHANNEL_TRAIN": str(tmp_path), "SM_CHANNEL_FOLDS": str(tmp_path)}
    with_model = environ | {"SM_MODEL_DIR": str(tmp_path / "fold-0" / "model")}
    for stage, variables, name in (
        ("train-fold", environ, "SM_MODEL_DIR"),
        ("train-fold", with_model, "SM_OUTPUT_DATA_DIR"),
        ("split", environ, "SM_OUTPUT_DATA_DIR"),
    ):
        with pytest.raises(SettingsError, match=f"{name}, which is not set"):
            load(stage, variables, tmp_path).check_channels()
    with pytest.raises(SettingsError, match="SM_OUTPUT_DATA_DIR, which is not set"):
        load("train-fold", with_model, tmp_path).output()
    assert load("train", with_model, tmp_path).output() == tmp_path / "fold-0/model/output"
    assert load("train", with_model | {"SM_OUTPUT_DATA_DIR": "/o"}, tmp_path).output() == Path("/o")
    assert load("train-fold", with_model, tmp_path).checkpoint_dir == tmp_path / "fold-0" / "checkpoints"
    assert load("split", {}, tmp_path).checkpoint_dir is None


def test_record_dir_is_the_model_folder_or_else_the_output_data_folder(tmp_path: Path):
    environ = {"SM_MODEL_DIR": "/m", "SM_OUTPUT_DATA_DIR": "/o"}
    folders = {name: load(name, environ, tmp_path).record_dir() for name in STAGES}
    with_model = {"train-fold", "distill", "train"}
    assert folders == {name: Path("/m" if name in with_model else "/o") for name in STAGES}


@pytest.mark.parametrize("name", ["SM_CHANNEL_TRAIN", "SM_OUTPUT_DATA_DIR"])
@pytest.mark.parametrize("url", ["gs://bucket/x", "https://bucket/x", "s3://", "s3:///x", "s3://a/../b"])
def test_invalid_urls_are_refused_and_never_used_as_folders(name: str, url: str, tmp_path: Path):
    with pytest.raises(SettingsError, match=name):
        load("split", {name: url}, tmp_path)
    job = load("split", {"SM_CHANNEL_MODEL": url, "SM_MODEL_DIR": url}, tmp_path)  # the split does not use them
    assert ("model" in job.channels, job.model_dir) == (False, None)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'"a"', b"", b"\xff\xfe"])
def test_hyperparameters_that_are_not_a_map_are_named_in_the_error(content: bytes, base_dir: Path):
    (base_dir / "input" / "config" / "hyperparameters.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"hyperparameters\.json (is not JSON|\w+ \w+, not a map)"):
        hyperparameters_from_env({"SAGEMAKER_BASE_DIR": str(base_dir)})


def test_hyperparameters_merge_file_sm_hps_and_sm_hp_variables(base_dir: Path):
    environ = write_hyperparameters(base_dir, {"epochs": "1", "lr": "1", "train.seed": "1", "Run": "a"})
    assert hyperparameters_from_env(environ) == {"epochs": "1", "lr": "1", "train.seed": "1", "run": "a"}
    environ |= {"SM_HPS": '{"lr": 2, "train.seed": 2}', "SM_HP_TRAIN.SEED": "3"}
    assert hyperparameters_from_env(environ) == {"epochs": "1", "lr": 2, "train.seed": "3", "run": "a"}


def test_hyperparameters_normalize_hyphens_and_ignore_empty_and_service_ones(base_dir: Path):
    service = {"sagemaker_program": '"x"', "SAGEMAKER_REGION": "x", "_tuning_objective_metric": "y"}
    environ = write_hyperparameters(base_dir, {"train__batch-size": "8", **service})
    environ["SM_HP_SAGEMAKER_JOB_NAME"] = "z"
    assert hyperparameters_from_env(environ) == {"train__batch_size": "8"}
    assert hyperparameters_from_env(environ | {"SM_HP_TRAIN__BATCH-SIZE": "16"}) == {"train__batch_size": "16"}
    assert hyperparameters_from_env(environ | {"SM_HP_TRAIN__BATCH_SIZE": ""}) == {"train__batch_size": "8"}
    assert hyperparameters_from_env({"SM_HP_RUN": "", "SM_HPS": ""}) == {}


def test_output_dir_is_none_unless_the_platform_names_one(base_dir: Path):
    assert output_dir({"SAGEMAKER_BASE_DIR": str(base_dir)}) == base_dir / "output"
    assert output_dir({"SAGEMAKER_BASE_DIR": str(base_dir), "SM_OUTPUT_DIR": "/x"}) == Path("/x")
    assert output_dir({"SM_OUTPUT_DATA_DIR": "/x"}) is None


@pytest.mark.parametrize("name", ["predictions.parquet", "holdout.parquet"])
def test_evaluate_takes_predictions_from_its_output_folder(name: str, tmp_path: Path):
    environ = {"SM_OUTPUT_DATA_DIR": str(tmp_path)}
    assert load("evaluate", environ, tmp_path).optional_channel("predictions") is None
    write_text(tmp_path / name, "")
    assert load("evaluate", environ, tmp_path).channel("predictions") == tmp_path
    assert load("evaluate", environ | {"SM_CHANNEL_PREDICTIONS": "/x"}, tmp_path).channels["predictions"] == Path("/x")
    assert "predictions" not in load("ensemble", environ, tmp_path).channels
