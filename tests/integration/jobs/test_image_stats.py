"""Meta features through every stage: each of the four variants trains, saves, is rebuilt and predicts the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fivefold import predictions
from fivefold.contract.artifacts import open_model_dir
from fivefold.data.image_io import decode
from fivefold.data.pipeline.dataset import image_stats
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.trained_model import load_model
from toy_data import SETTINGS as TINY
from toy_data import run_stage

SETTINGS = [
    *TINY, 'model.backbone_kwargs={"widths": [4], "stem": 4}', "model.image_size=8", 'model.head={"name": "mlp", "hidden": 8, "dropout": 0.1}',
    "train.epochs=6", "train.lr=0.05", "augment.train=[]", "augment.batch_mix=mixup", "augment.mix_alpha=0.2",
]  # fmt: skip
VARIANTS = {"none": "", "aspect": "aspect", "color": "color_mean", "both": "color_mean,aspect"}
CLASSES = ("tall", "wide")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Plain grey images that differ between the classes in their shape alone: once resized they are the same."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for name, size in zip(CLASSES, ((10, 20), (20, 10)), strict=True):
        for number in range(20):
            # The third channel stays dark: its mean is the same in all rows.
            colour = (*random.integers(100, 140, 2).tolist(), 0)
            for folder in (root / "train" / name, root / "eval"):
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size, colour).save(folder / f"{name}{number}.png")
                colour = (colour[0] + 40, *colour[1:])
    assert run_stage(root, "split", "split", "split.folds=2", "split.holdout=0.1", "split.verify_images=false") == 0
    return root


def train(world: Path, variant: str, fold: int) -> Path:
    """The model dir of a trained fold; a second call finds its record and trains nothing."""
    folder = f"{variant}/fold-{fold}"
    arguments = [f"FOLD={fold}", *SETTINGS, f"model.image_stats={VARIANTS[variant]}", f"system={variant}"]
    assert run_stage(world, "train-fold", folder, *arguments) == 0
    return world / folder / "model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_defect_car_b5_each_variant_trains_and_is_rebuilt_to_the_same_predictions(world, variant):
    folder = train(world, variant, 0)
    saved = predictions.read(folder / "oof.parquet")
    member = load_model(open_model_dir(folder), {})
    table = read_folds(world / "split" / "output" / "folds.parquet")
    found = member.predict(open_store(world / "train"), list(table.paths_of(table.valid_rows(0))), "again")
    assert np.array_equal(found, saved.log_probs)
    accuracy = float((saved.log_probs.argmax(axis=1) == saved.codes()).mean())
    assert accuracy == 1.0 if "aspect" in VARIANTS[variant] else accuracy < 0.9


def test_mean_and_std_are_those_of_the_folds_training_rows_alone(world):
    weights = load_file(train(world, "both", 0) / "model.safetensors")
    table = read_folds(world / "split" / "output" / "folds.parquet")

    def numbers(rows: np.ndarray) -> np.ndarray:
        paths = [world / "train" / path for path in table.paths_of(rows)]
        return np.stack([image_stats(decode(path.read_bytes(), path.name), ["color_mean", "aspect"]) for path in paths])

    own = numbers(table.train_rows(0)).astype(np.float64)
    std = own.std(axis=0)
    std[2] = 1.0  # the dark channel
    torch.testing.assert_close(weights["meta.mean"], torch.from_numpy(own.mean(axis=0)).float())
    torch.testing.assert_close(weights["meta.std"], torch.from_numpy(std).float())
    every = numbers(np.arange(len(table.codes))).mean(axis=0)
    assert not np.allclose(weights["meta.mean"].numpy(), every, atol=1e-6)


def test_an_ensemble_and_a_student_with_other_features_use_them_too(world):
    for fold in range(2):
        train(world, "both", fold)
    models = world / "both"
    assert run_stage(world, "ensemble", "ensemble", MODEL=models) == 0
    found = predictions.read(world / "ensemble" / "output" / "predictions.parquet")
    truth = [CLASSES.index(Path(name).stem.rstrip("0123456789")) for name in found.ids]
    assert (found.log_probs.argmax(axis=1) == truth).all()
    arguments = [
        *SETTINGS,
        "model.image_stats=color_mean",
        'distill.model={"image_stats": ["aspect"]}',
        "distill.teacher_tta=flip",
    ]
    unlabelled = {"MODEL": models, "UNLABELED": world / "eval"}
    assert run_stage(world, "distill", "distill", *arguments, **unlabelled) == 0
    weights = load_file(world / "distill" / "model" / "model.safetensors")
    assert weights["meta.mean"].shape == (1,)
    assert run_stage(world, "ensemble", "student", MODEL=world / "distill" / "model") == 0
    found = predictions.read(world / "student" / "output" / "predictions.parquet")
    assert (found.log_probs.argmax(axis=1) == truth).mean() >= 0.9  # by chance 0.5
