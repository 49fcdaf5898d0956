"""Image statistics as model inputs in every stage: models train, save, load and predict the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fivefold import predictions
from fivefold.contract.artifacts import open_model_dir
from fivefold.contract.files import read_json
from fivefold.data.image_io import decode
from fivefold.data.pipeline.dataset import image_stats
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.trained_model import ImageList, SharedEvalImages, load_model
from toy_data import SETTINGS as TINY
from toy_data import run_stage

SETTINGS = [
    *TINY, 'model.backbone_kwargs={"widths": [4], "stem": 4}', "model.image_size=8", 'model.head={"name": "mlp", "hidden": 8, "dropout": 0.1}',
    "train.epochs=6", "train.lr=0.05", "augment.train=[]", "augment.batch_mix=mixup", "augment.mix_alpha=0.2", "model.image_stats=color_mean,aspect",
]  # fmt: skip
CLASSES = ("tall", "wide")


@pytest.fixture(scope="module")
def shape_run(tmp_path_factory) -> Path:
    """Two folds of plain images whose classes differ only in shape: after resizing they look the same."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for name, size in zip(CLASSES, ((10, 20), (20, 10)), strict=True):
        for number in range(20):
            # The third channel is always 0, so its mean is the same in all rows.
            colour = (*random.integers(100, 140, 2).tolist(), 0)
            for folder in (root / "train" / name, root / "eval"):
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size, colour).save(folder / f"{name}{number}.png")
                colour = (colour[0] + 40, *colour[1:])
    assert run_stage(root, "split", "split", "split.folds=2", "split.holdout=0.1", "split.verify_images=false") == 0
    for fold in range(2):
        assert run_stage(root, "train-fold", f"models/{fold}", f"FOLD={fold}", *SETTINGS) == 0
    return root


def test_defect_car_b5_image_stats_decide_and_a_loaded_model_predicts_the_same(shape_run):
    folder = shape_run / "models" / "0" / "model"
    oof = predictions.read(folder / "oof.parquet")
    model = load_model(open_model_dir(folder), {})
    table = read_folds(shape_run / "split" / "output" / "folds.parquet")
    images = ImageList(open_store(shape_run / "train"), table.paths_of(table.valid_rows(0)))
    assert np.array_equal(model.predict_cached(SharedEvalImages(images), "again"), oof.log_probs)
    assert (oof.log_probs.argmax(axis=1) == oof.codes()).all()


def test_mean_and_std_come_only_from_the_training_rows_of_the_fold(shape_run):
    weights = load_file(shape_run / "models" / "0" / "model" / "model.safetensors")
    table = read_folds(shape_run / "split" / "output" / "folds.parquet")

    paths = [shape_run / "train" / path for path in table.paths_of(np.arange(len(table)))]
    stats = np.stack([image_stats(decode(path.read_bytes(), path.name), ["color_mean", "aspect"]) for path in paths])
    training_stats = stats[table.train_rows(0)].astype(np.float64)
    std = training_stats.std(axis=0)
    std[2] = 1.0  # the third channel is constant
    torch.testing.assert_close(weights["meta.mean"], torch.from_numpy(training_stats.mean(axis=0)).float())
    torch.testing.assert_close(weights["meta.std"], torch.from_numpy(std).float())
    assert not np.allclose(weights["meta.mean"].numpy(), stats.mean(axis=0), atol=1e-6)


def test_ensemble_and_student_with_other_features_and_unlabeled_images_use_image_stats(shape_run):
    models = shape_run / "models"
    arguments = [*SETTINGS, "model.image_stats=color_mean", 'distill.model={"image_stats": ["aspect"]}']
    channels = {"MODEL": models, "UNLABELED": shape_run / "eval"}
    assert run_stage(shape_run, "distill", "distill", *arguments, "distill.teacher_tta=flip", **channels) == 0
    student = shape_run / "distill" / "model"
    info = read_json(student / "model.json")
    assert (info["unlabeled"], info["leak_free"]) == (40, True)
    assert load_file(student / "model.safetensors")["meta.mean"].shape == (1,)
    for step, trained, accuracy in (("ensemble", models, 1.0), ("student", student, 0.9)):
        assert run_stage(shape_run, "ensemble", step, MODEL=trained) == 0
        predicted = predictions.read(shape_run / step / "output" / "predictions.parquet")
        truth = [CLASSES.index(Path(name).stem.rstrip("0123456789")) for name in predicted.ids]
        assert (predicted.log_probs.argmax(axis=1) == truth).mean() >= accuracy  # 0.5 by chance
