"""The precision of a run: chosen once for all its folds, kept by one that goes on, and the one that predicts later."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold import predictions
from fivefold.build import RUNTIME, build_classifier
from fivefold.config.schema import Model, Settings, Train
from fivefold.contract.artifacts import open_model_dir
from fivefold.contract.job import context_from_env
from fivefold.contract.stage_specs import STAGES
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.distributed.process_group import SINGLE_PROCESS
from fivefold.execution import choose_precision
from fivefold.stages import training_run
from fivefold.trained_model import load_model
from fivefold.training.checkpoints import Checkpoints
from toy_data import SETTINGS as TINY
from toy_data import run_stage, tinted_in, variables

GROUPED = "timm/tf_mobilenetv3_small_075"
SETTINGS = [
    *TINY, "model.image_size=32", "model.mean=.5,.5,.5", "model.std=.25,.25,.25", "train.precision=auto",
    "augment.train=horizontal_flip",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A run's folder with drawn images and their split in two folds."""
    root = tmp_path_factory.mktemp("run")
    tinted_in(root / "train", "ab", 12, by=110)
    assert run_stage(root, "split", "split", "split.folds=2") == 0
    return root


def model_json(root: Path, step: str) -> dict:
    return json.loads((root / step / "model" / "model.json").read_text())


@pytest.mark.skipif(
    choose_precision("auto", torch.device("cpu")) != "bf16", reason="one precision alone may be fastest here"
)
def test_all_folds_of_a_run_have_the_precision_that_one_of_them_found(world):
    assert run_stage(world, "train-fold", "fold-0", "FOLD=0", *SETTINGS) == 0
    (kept,) = (world / training_run.PROBE_CACHE_DIR).glob("*.json")
    found, info = json.loads(kept.read_text()), model_json(world, "fold-0")
    assert found["choice"] == info["precision"] == info["training"]["train.precision"]
    for fold, choice in (
        (0, "fp32"),
        (1, "bf16"),
    ):  # it takes what stands there, whatever it would have found by itself
        kept.write_text(json.dumps(found | {"choice": choice}))
        assert run_stage(world, "train-fold", f"fold-{choice}", f"FOLD={fold}", *SETTINGS) == 0
        assert model_json(world, f"fold-{choice}")["precision"] == choice


def test_a_run_whose_folder_is_not_to_be_written_decides_by_itself(world, tmp_path):
    job = context_from_env(STAGES["train-fold"], variables(world, "fold-9"), tmp_path)
    assert training_run.probe_cache_dir(job) == world / training_run.PROBE_CACHE_DIR
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    world.chmod(0o500)
    assert training_run.probe_cache_dir(job) is None
    world.chmod(0o700)


def test_a_model_predicts_later_the_bits_that_it_predicted_in_its_training(world):
    arguments = [
        *SETTINGS,
        f"model.backbone={GROUPED}",
        "model.backbone_kwargs={}",
        "train.precision=bf16_grouped_fp32",
    ]
    assert run_stage(world, "train-fold", "g", "FOLD=0", *arguments) == 0
    member = load_model(open_model_dir(world / "g" / "model"), {})
    assert (member.source.info["precision"], member.runtime.grouped_fp32) == ("bf16_grouped_fp32", True)
    oof = predictions.read(world / "g" / "model" / "oof.parquet")
    table = read_folds(world / "split" / "output" / "folds.parquet", world / "split" / "output" / "classes.json")
    rows = table.valid_rows(0)
    assert list(table.ids_of(rows)) == list(oof.ids)
    found = member.predict(open_store(world / "train"), table.paths_of(rows), "")
    assert np.array_equal(found, oof.log_probs)


def test_a_run_that_goes_on_keeps_the_precision_of_its_checkpoint(world, tmp_path):
    job = context_from_env(STAGES["train-fold"], variables(world, "resumed"), tmp_path)
    state = {RUNTIME: {"precision": "bf16_grouped_fp32", "channels_last": True}}
    job.checkpoints().mkdir(parents=True)
    Checkpoints(job.checkpoints()).save(state)
    of = Settings(model=Model(backbone=GROUPED, image_size=32), train=Train())
    settings, runtime = training_run.resolve_runtime(job, of, build_classifier(of.model, 2), SINGLE_PROCESS)
    assert settings.train.precision == "bf16_grouped_fp32"
    assert (runtime.dtype, runtime.grouped_fp32) == (torch.bfloat16, True)


@pytest.mark.parametrize(
    ("folds", "model", "shared"),
    [
        ("r/split/output", "r/fold-0/model", "r"),
        ("r/split", "r/fold-0/model", "r"),
        ("opt/ml/input/data/folds", "opt/ml/model", None),
        ("r/m/output/split", "r/m", None),
        ("q/split/output", "r/fold-0/model", None),
    ],
)
def test_decisions_are_shared_where_split_and_step_lie_in_one_folder(folds, model, shared, tmp_path):
    (tmp_path / model).mkdir(parents=True)
    environ = {"SM_CHANNEL_FOLDS": str(tmp_path / folds), "SM_MODEL_DIR": str(tmp_path / model)}
    found = training_run.probe_cache_dir(context_from_env(STAGES["train-fold"], environ, tmp_path))
    assert found == (shared and tmp_path / shared / training_run.PROBE_CACHE_DIR)
