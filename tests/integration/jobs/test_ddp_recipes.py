"""Two processes train a small version of every shipped recipe on images generated in its layout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import toy_layouts
from fivefold import predictions
from fivefold.config.recipes import shipped_recipes
from toy_data import environment

pytestmark = pytest.mark.slow


DATASETS = {
    "car_convnext_tiny": (toy_layouts.draw_cars, "open.zip"),
    "car_efficientnet_b5": (toy_layouts.draw_cars, "open.zip"),
    "sketch_caformer": (toy_layouts.draw_sketches, "data"),
    "product_image_type": (toy_layouts.draw_products, "data"),
    "mask_profile:mask_gender": (toy_layouts.draw_faces, "train"),
    "mask_profile:age": (toy_layouts.draw_faces, "train"),
    "mask_profile": (toy_layouts.draw_faces, "train"),
    "demo": (toy_layouts.draw_cars, "open/train"),
    "small_images": (toy_layouts.draw_cars, "open/train"),
}
"""For each recipe and variant: the function that generates its data, and the path of the training images."""
SMALL_RUN = ("split.folds=2", "train.epochs=2", "train.warmup_epochs=1", "train.batch_size=8")
EXTRA_ARGUMENTS = {
    "demo": SMALL_RUN,
    "small_images": (*SMALL_RUN, "augment.mixup_off_epochs=1"),
}
"""Sizes and counts for few images, for recipes without a smoke variant."""


def test_every_shipped_recipe_has_a_dataset() -> None:
    assert {name.partition(":")[0] for name in DATASETS} == set(shipped_recipes())


def run_stage(root: Path, name: str, *arguments: str, **variables: str) -> str:
    """Run a stage in `root`, with two processes if it trains, and return its log."""
    command = [sys.executable, "-W", "error::UserWarning:fivefold", "-m", "jobs", name, *arguments]
    environ = environment(OMP_NUM_THREADS=1, NPROC=2, **variables)
    process = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    return process.stderr


def check_model(folder: Path) -> None:
    """Check that two processes trained, each row is predicted once, and the losses are finite."""
    assert json.loads((folder / "model.json").read_text())["processes"] == 2
    table = predictions.read(folder / "oof.parquet")
    assert len(set(table.ids)) == len(table.ids) > 0
    assert np.isfinite(table.log_probs).all()
    lines = (folder / "train_log.csv").read_text().splitlines()[1:]
    assert len(lines) >= 2
    assert all(np.isfinite(float(line.split(",")[1])) for line in lines)


@pytest.mark.parametrize("name", DATASETS)
def test_two_processes_train_a_fold_of_each_recipe(name: str, tmp_path: Path) -> None:
    draw, train = DATASETS[name]
    draw(tmp_path)
    recipe = f"recipe={name}" if name in EXTRA_ARGUMENTS else f"recipe={name}{',' if ':' in name else ':'}smoke"
    extra = EXTRA_ARGUMENTS.get(name, ())
    channels = {"SM_CHANNEL_TRAIN": train, "SM_CHANNEL_FOLDS": "split"}
    run_stage(tmp_path, "split", recipe, *extra, SM_CHANNEL_TRAIN=train, SM_OUTPUT_DATA_DIR="split")
    outputs = {"SM_MODEL_DIR": "fold-0/model", "SM_OUTPUT_DATA_DIR": "fold-0/output"}
    log = run_stage(tmp_path, "train-fold", recipe, *extra, "FOLD=0", **channels, **outputs)
    assert "train-fold: 2 processes" in log
    check_model(tmp_path / "fold-0/model")
