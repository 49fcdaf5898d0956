"""Two processes train a small version of every shipped recipe on images generated in its layout."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fivefold import predictions
from fivefold.config.recipes import shipped_recipes
from jobs.__main__ import run
from reference_systems import SYSTEMS
from toy_layouts import draw_cars

pytestmark = pytest.mark.slow

SMALL_RUN = ["split.folds=2", "train.epochs=2", "train.warmup_epochs=1", "train.batch_size=8"]
NARROW = 'model.backbone_kwargs={"widths": [16, 16], "stem": 8}'
OTHERS = {
    "demo": SMALL_RUN,
    "small_images": [*SMALL_RUN, NARROW, "augment.mixup_off_epochs=1"],
    "photographs": [*SMALL_RUN, "model.image_size=64", "train.method=lp_ft"],
}
"""For each other recipe: sizes and counts for few images."""


@pytest.mark.parametrize("name", shipped_recipes())
def test_two_processes_train_a_fold_of_each_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (SYSTEMS[name].draw if name in SYSTEMS else draw_cars)(tmp_path)
    train = next(tmp_path / path for path in ("open.zip", "data", "train") if (tmp_path / path).exists())
    monkeypatch.chdir(tmp_path)
    arguments = [f"recipe={name}", *OTHERS[name]] if name in OTHERS else [f"recipe={name}:smoke"]
    channels = {**os.environ, "SM_CHANNEL_TRAIN": str(train), "SM_CHANNEL_FOLDS": str(tmp_path / "split")}
    assert run("split", arguments, {**channels, "SM_OUTPUT_DATA_DIR": str(tmp_path / "split")}) == 0
    outputs = {"SM_MODEL_DIR": str(tmp_path / "model"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "output")}
    processes = {"NPROC": "2", "OMP_NUM_THREADS": "1"}
    assert run("train-fold", [*arguments, "FOLD=0"], {**channels, **outputs, **processes}) == 0
    assert json.loads((tmp_path / "model" / "model.json").read_text())["processes"] == 2
    table = predictions.read(tmp_path / "model" / "oof.parquet")
    assert len(set(table.ids)) == len(table.ids) > 0
    assert np.isfinite(table.log_probs).all()
    lines = (tmp_path / "model" / "train_log.csv").read_text().splitlines()[1:]
    assert len(lines) >= 2
    assert all(np.isfinite(float(line.split(",")[1])) for line in lines)
