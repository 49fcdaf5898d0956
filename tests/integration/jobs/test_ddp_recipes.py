"""Every shipped recipe, made small, is trained by two processes on images drawn in its layout."""

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


DRAWN = {
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
"""Of each recipe, with its variant, what is drawn for it and where its training images then lie."""
TWO = ("split.folds=2", "train.epochs=2", "train.warmup_epochs=1", "train.batch_size=8")
MORE = {
    "demo": TWO,
    "small_images": (*TWO, "augment.mixup_off_epochs=1"),
}
"""What so few images ask for: sizes and counts of recipes without a smoke variant."""


def test_every_shipped_recipe_is_here() -> None:
    assert {name.partition(":")[0] for name in DRAWN} == set(shipped_recipes())


def stage(root: Path, name: str, *arguments: str, **variables: str) -> str:
    """Runs a stage in `root`, by two processes if it trains; what it said."""
    command = [sys.executable, "-W", "error::UserWarning:fivefold", "-m", "jobs", name, *arguments]
    environ = environment(OMP_NUM_THREADS=1, NPROC=2, **variables)
    ended = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def check_model(folder: Path) -> None:
    """Two processes took part, each row is predicted once, and the curve has figures."""
    assert json.loads((folder / "model.json").read_text())["processes"] == 2
    table = predictions.read(folder / "oof.parquet")
    assert len(set(table.ids)) == len(table.ids) > 0
    assert np.isfinite(table.log_probs).all()
    lines = (folder / "train_log.csv").read_text().splitlines()[1:]
    assert len(lines) >= 2
    assert all(np.isfinite(float(line.split(",")[1])) for line in lines)


@pytest.mark.parametrize("name", DRAWN)
def test_two_processes_train_a_fold(name: str, tmp_path: Path) -> None:
    draw, train = DRAWN[name]
    draw(tmp_path)
    recipe = f"recipe={name}" if name in MORE else f"recipe={name}{',' if ':' in name else ':'}smoke"
    more = MORE.get(name, ())
    given = {"SM_CHANNEL_TRAIN": train, "SM_CHANNEL_FOLDS": "split"}
    stage(tmp_path, "split", recipe, *more, SM_CHANNEL_TRAIN=train, SM_OUTPUT_DATA_DIR="split")
    out = {"SM_MODEL_DIR": "fold-0/model", "SM_OUTPUT_DATA_DIR": "fold-0/output"}
    said = stage(tmp_path, "train-fold", recipe, *more, "FOLD=0", **given, **out)
    assert "train-fold: 2 processes" in said
    check_model(tmp_path / "fold-0/model")
