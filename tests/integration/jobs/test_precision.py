"""The precision of a run: chosen once for all folds, kept on resume, and used again for prediction."""

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
from fivefold.trained_model import ImageList, SharedEvalImages, load_model
from fivefold.training.checkpoints import Checkpoints
from toy_data import SETTINGS as TINY
from toy_data import run_stage, tinted_in, variables

GROUPED = "timm/tf_mobilenetv3_small_075"
SETTINGS = [
    *TINY, "model.image_size=32", "model.mean=.5,.5,.5", "model.std=.25,.25,.25", "train.precision=auto",
    "augment.train=horizontal_flip",
]  # fmt: skip


@pytest.fixture(scope="module")
def split_run(tmp_path_factory) -> Path:
    """A run folder with generated images, split into two folds."""
    root = tmp_path_factory.mktemp("run")
    tinted_in(root / "train", "ab", 12, by=110)
    assert run_stage(root, "split", "split", "split.folds=2") == 0
    return root


def model_json(root: Path, step: str) -> dict:
    return json.loads((root / step / "model" / "model.json").read_text())


@pytest.mark.skipif(
    choose_precision("auto", torch.device("cpu")) != "bf16", reason="one precision alone may be fastest here"
)
def test_all_folds_use_the_precision_that_the_first_one_chose(split_run):
    assert run_stage(split_run, "train-fold", "fold-0", "FOLD=0", *SETTINGS) == 0
    (probe_file,) = (split_run / training_run.PROBE_CACHE_DIR).glob("*.json")
    probe, info = json.loads(probe_file.read_text()), model_json(split_run, "fold-0")
    assert probe["choice"] == info["precision"] == info["training"]["train.precision"]
    for fold, choice in enumerate(("fp32", "bf16")):  # each fold uses the choice in the file, not a probe of its own
        probe_file.write_text(json.dumps(probe | {"choice": choice}))
        assert run_stage(split_run, "train-fold", f"fold-{choice}", f"FOLD={fold}", *SETTINGS) == 0
        assert model_json(split_run, f"fold-{choice}")["precision"] == choice


def test_loaded_model_reproduces_its_out_of_fold_predictions_bit_for_bit(split_run):
    network = [f"model.backbone={GROUPED}", "model.backbone_kwargs={}", "train.precision=bf16_grouped_fp32"]
    assert run_stage(split_run, "train-fold", "g", "FOLD=0", *SETTINGS, *network) == 0
    fold_model = load_model(open_model_dir(split_run / "g" / "model"), {})
    assert (fold_model.source.info["precision"], fold_model.runtime.grouped_fp32) == ("bf16_grouped_fp32", True)
    oof = predictions.read(split_run / "g" / "model" / "oof.parquet")
    split = split_run / "split" / "output"
    table = read_folds(split / "folds.parquet", split / "classes.json")
    rows = table.valid_rows(0)
    assert list(table.ids_of(rows)) == list(oof.ids)
    images = SharedEvalImages(ImageList(open_store(split_run / "train"), table.paths_of(rows)))
    log_probs = fold_model.predict_cached(images, "")
    assert np.array_equal(log_probs, oof.log_probs)


def test_resumed_run_keeps_the_precision_of_its_checkpoint(split_run, tmp_path):
    job = context_from_env(STAGES["train-fold"], variables(split_run, "resumed"), tmp_path)
    state = {RUNTIME: {"precision": "bf16_grouped_fp32", "channels_last": True}}
    job.checkpoints().mkdir(parents=True)
    Checkpoints(job.checkpoints()).save(state)
    config = Settings(model=Model(backbone=GROUPED, image_size=32), train=Train())
    settings, runtime = training_run.resolve_runtime(job, config, build_classifier(config.model, 2), SINGLE_PROCESS)
    assert settings.train.precision == "bf16_grouped_fp32"
    assert (runtime.dtype, runtime.grouped_fp32) == (torch.bfloat16, True)


@pytest.mark.parametrize(
    ("folds", "model", "run_folder"),
    [
        ("r/split/output", "r/fold-0/model", "r"),
        ("opt/ml/input/data/folds", "opt/ml/model", None),
        ("q/split/output", "r/fold-0/model", None),
    ],
)
def test_probe_cache_is_shared_if_split_and_step_lie_in_one_run_folder(folds, model, run_folder, tmp_path):
    (tmp_path / model).mkdir(parents=True)
    environ = {"SM_CHANNEL_FOLDS": str(tmp_path / folds), "SM_MODEL_DIR": str(tmp_path / model)}
    job = context_from_env(STAGES["train-fold"], environ, tmp_path)
    assert training_run.probe_cache_dir(job) == (run_folder and tmp_path / run_folder / training_run.PROBE_CACHE_DIR)
    if run_folder and os.getuid() != 0:  # root may write anywhere
        (tmp_path / run_folder).chmod(0o500)
        assert training_run.probe_cache_dir(job) is None
        (tmp_path / run_folder).chmod(0o700)
