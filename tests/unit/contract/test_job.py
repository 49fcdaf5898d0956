"""SM_* variables, or the folders below /opt/ml, as one Job."""

import json
from pathlib import Path

import pytest

from fivefold.contract.files import write_text
from fivefold.contract.job import StageContext, context_from_env, hyperparameters, output_dir
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import MissingInputError, SettingsError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folders that SageMaker makes for an image of one's own."""
    root = tmp_path / "ml"
    for folder in ("input/config", "input/data/train", "input/data/folds", "model", "output/data"):
        (root / folder).mkdir(parents=True)
    return root


def job(stage: str, environ: dict[str, str], tmp_path: Path) -> StageContext:
    return context_from_env(STAGES[stage], environ, tmp_path / "scratch")


def configured(base: Path, name: str, value: object) -> dict[str, str]:
    write_text(base / "input" / "config" / f"{name}.json", json.dumps(value))
    return {"SAGEMAKER_BASE_DIR": str(base)}


def test_without_any_variable_the_folders_of_sagemaker_are_used(base: Path, tmp_path: Path):
    found = job("train-fold", {"SAGEMAKER_BASE_DIR": str(base)}, tmp_path)
    assert found.channels == {"train": base / "input/data/train", "folds": base / "input/data/folds"}
    assert (found.model_dir, found.output_dir) == (base / "model", base / "output")
    assert (found.output_data_dir, found.checkpoint_dir) == (base / "output/data", base / "checkpoints")


def test_a_variable_that_is_set_is_never_overwritten_and_an_empty_one_is_not_set(base: Path, tmp_path: Path):
    names = ("SM_MODEL_DIR", "SM_OUTPUT_DIR", "SM_OUTPUT_DATA_DIR", "SM_CHECKPOINT_DIR", "SM_CHANNEL_TRAIN")
    environ = {"SAGEMAKER_BASE_DIR": str(base), **{name: str(tmp_path / name) for name in names}}
    found = job("train-fold", environ, tmp_path)
    folders = [found.model_dir, found.output_dir, found.output_data_dir, found.checkpoint_dir, found.channels["train"]]
    assert folders == [tmp_path / name for name in names]
    empty = dict.fromkeys([*names, "SM_GROUND_TRUTH_DIR", "SM_CHANNEL_FOLDS"], "")
    found = job("train-fold", empty | {"SAGEMAKER_BASE_DIR": str(base)}, tmp_path)
    assert (found.model_dir, set(found.channels)) == (base / "model", {"train", "folds"})
    found = job("train-fold", empty | {"SAGEMAKER_BASE_DIR": ""}, tmp_path)
    assert (found.model_dir, found.channels) == (None, {})


def test_channels_are_known_by_plain_names(base: Path, tmp_path: Path):
    (base / "input/data/ground-truth").mkdir()
    (base / "input/data/train-manifest").write_text("")
    environ = {"SAGEMAKER_BASE_DIR": str(base), "SM_CHANNEL_UN-LABELED": "/a", "SM_CHANNEL_Eval": "/b"}
    assert set(job("evaluate", environ, tmp_path).channels) == {"train", "folds", "ground_truth", "un_labeled", "eval"}


def test_ground_truth_has_a_variable_of_its_own_between_channel_and_folder(base: Path, tmp_path: Path):
    (base / "input/data/ground_truth").mkdir()
    environ = {"SAGEMAKER_BASE_DIR": str(base)}
    assert job("evaluate", environ, tmp_path).channels["ground_truth"] == base / "input/data/ground_truth"
    environ["SM_GROUND_TRUTH_DIR"] = "/own"
    assert job("evaluate", environ, tmp_path).channels["ground_truth"] == Path("/own")
    environ["SM_CHANNEL_GROUND_TRUTH"] = "/channel"
    assert job("evaluate", environ, tmp_path).channels["ground_truth"] == Path("/channel")


def test_a_missing_channel_is_told_with_its_variable(tmp_path: Path):
    found = job("train-fold", {"SM_CHANNEL_TRIAN": str(tmp_path), "SM_CHANNEL_FOLDS": str(tmp_path / "no")}, tmp_path)
    with pytest.raises(MissingInputError, match=r"'train': set SM_CHANNEL_TRAIN .*: folds, trian\)"):
        found.channel("train")
    with pytest.raises(MissingInputError, match=r"channel 'folds': .*/no does not exist; check SM_CHANNEL_FOLDS"):
        found.optional_channel("folds")
    assert found.optional_channel("weights") is None
    environ = {"SM_CHANNEL_EVAL": str(tmp_path / "no"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}
    with pytest.raises(MissingInputError, match="channel 'eval'"):
        job("evaluate", environ, tmp_path).check_channels()  # an optional one that is given must exist before any work


def test_outputs_that_are_not_given_are_settings_errors(tmp_path: Path):
    environ = {"SM_CHANNEL_TRAIN": str(tmp_path), "SM_CHANNEL_FOLDS": str(tmp_path)}
    with_model = environ | {"SM_MODEL_DIR": str(tmp_path / "fold-0" / "model")}
    for stage, given, name in (
        ("train-fold", environ, "SM_MODEL_DIR"),
        ("train-fold", with_model, "SM_OUTPUT_DATA_DIR"),
        ("split", environ, "SM_OUTPUT_DATA_DIR"),
    ):
        with pytest.raises(SettingsError, match=f"{name}, which is not set"):
            job(stage, given, tmp_path).check_channels()
    with pytest.raises(SettingsError, match="SM_OUTPUT_DATA_DIR, which is not set"):
        job("train-fold", with_model, tmp_path).output()
    assert job("train", with_model, tmp_path).output() == tmp_path / "fold-0/model/output"
    assert job("train", with_model | {"SM_OUTPUT_DATA_DIR": "/o"}, tmp_path).output() == Path("/o")
    assert job("train-fold", with_model, tmp_path).checkpoint_dir == tmp_path / "fold-0" / "checkpoints"
    assert job("split", {}, tmp_path).checkpoint_dir is None


def test_the_record_stands_with_the_model_or_else_with_the_data(tmp_path: Path):
    environ = {"SM_MODEL_DIR": "/m", "SM_OUTPUT_DATA_DIR": "/o"}
    folders = {name: job(name, environ, tmp_path).record_dir() for name in STAGES}
    with_model = {"train-fold", "distill", "train"}
    assert folders == {name: Path("/m" if name in with_model else "/o") for name in STAGES}


@pytest.mark.parametrize("name", ["SM_CHANNEL_TRAIN", "SM_OUTPUT_DATA_DIR"])
@pytest.mark.parametrize("url", ["gs://bucket/x", "https://bucket/x", "s3://", "s3:///x", "s3://a/../b"])
def test_a_url_never_becomes_a_folder_of_that_name(name: str, url: str, tmp_path: Path):
    with pytest.raises(SettingsError, match=name):
        job("split", {name: url}, tmp_path)
    found = job("split", {"SM_CHANNEL_MODEL": url, "SM_MODEL_DIR": url}, tmp_path)  # which it does not ask for
    assert ("model" in found.channels, found.model_dir) == (False, None)


def test_pipe_mode_is_refused(base: Path, tmp_path: Path):
    modes = {"train": {"TrainingInputMode": "File"}, "eval": {"TrainingInputMode": "Pipe"}}
    with pytest.raises(SettingsError, match="channel 'eval' uses Pipe mode, which has no random access; use File or"):
        job("split", configured(base, "inputdataconfig", modes), tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"a"', "", b"\xff\xfe"])
def test_configuration_that_is_no_map_is_named(text: str | bytes, base: Path, tmp_path: Path):
    for name in ("hyperparameters", "inputdataconfig"):
        path = base / "input" / "config" / f"{name}.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        environ = {"SAGEMAKER_BASE_DIR": str(base)}
        with pytest.raises(SettingsError, match=rf"{name}\.json (is not JSON|\w+ \w+, not a map)"):
            hyperparameters(environ) if name == "hyperparameters" else job("split", environ, tmp_path)
        path.unlink()


def test_hyperparameters_of_all_three_kinds(base: Path):
    environ = configured(
        base, "hyperparameters", {"train.epochs": "1", "train.lr": "1", "train.max_grad_norm": "1", "Run": "a"}
    )
    assert hyperparameters(environ) == {"train.epochs": "1", "train.lr": "1", "train.max_grad_norm": "1", "run": "a"}
    environ["SM_HPS"] = '{"train.lr": 2, "train.max_grad_norm": 2}'
    environ["SM_HP_TRAIN.MAX_GRAD_NORM"] = "3"
    assert hyperparameters(environ) == {"train.epochs": "1", "train.lr": 2, "train.max_grad_norm": "3", "run": "a"}


def test_hyphens_of_hyperparameters_are_underscores_and_empty_ones_and_the_services_are_not_set(base: Path):
    service = {"sagemaker_program": '"x"', "SAGEMAKER_REGION": "x", "_tuning_objective_metric": "y"}
    environ = configured(base, "hyperparameters", {"train__batch-size": "8", **service})
    environ["SM_HP_SAGEMAKER_JOB_NAME"] = "z"
    assert hyperparameters(environ) == {"train__batch_size": "8"}
    assert hyperparameters(environ | {"SM_HP_TRAIN__BATCH-SIZE": "16"}) == {"train__batch_size": "16"}
    assert hyperparameters(environ | {"SM_HP_TRAIN__BATCH_SIZE": ""}) == {"train__batch_size": "8"}
    assert hyperparameters({"SM_HP_RUN": "", "SM_HPS": ""}) == {}


def test_the_failure_file_has_its_folder_only_where_a_platform_names_one(base: Path):
    assert output_dir({"SAGEMAKER_BASE_DIR": str(base)}) == base / "output"
    assert output_dir({"SAGEMAKER_BASE_DIR": str(base), "SM_OUTPUT_DIR": "/x"}) == Path("/x")
    assert output_dir({"SM_OUTPUT_DATA_DIR": "/x"}) is None


@pytest.mark.parametrize("name", ["predictions.parquet", "holdout.parquet"])
def test_evaluate_reads_what_stands_in_its_output_folder(name: str, tmp_path: Path):
    environ = {"SM_OUTPUT_DATA_DIR": str(tmp_path)}
    assert job("evaluate", environ, tmp_path).optional_channel("predictions") is None
    write_text(tmp_path / name, "")
    assert job("evaluate", environ, tmp_path).channel("predictions") == tmp_path
    assert job("evaluate", environ | {"SM_CHANNEL_PREDICTIONS": "/x"}, tmp_path).channels["predictions"] == Path("/x")
    assert "predictions" not in job("ensemble", environ, tmp_path).channels
