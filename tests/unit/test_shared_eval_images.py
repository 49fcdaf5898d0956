"""Images shared by several models: how often each is read, how often each network runs, and equal predictions."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from counting_store import CountingStore
from fivefold.build import build_classifier, make_training_runtime, seed_everything
from fivefold.config.schema import Augment, Model, Predict, Settings, Train
from fivefold.contract.artifacts import ModelDir
from fivefold.contract.files import read_json
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.data.readers.stores import FolderStore
from fivefold.data.split.fold_table import FoldTable
from fivefold.data.transforms.registry import build_transforms
from fivefold.distillation import DistillRows, compute_soft_targets, ensemble_soft_targets
from fivefold.inference.predictor import predict_all
from fivefold.models.classifier import Classifier
from fivefold.predictions import Predictions, write
from fivefold.trained_model import ImageList, SharedEvalImages, load_model, save_model
from fivefold.training.trainer import BestCheckpoint
from toy_data import draw

CLASSES = ["a", "b", "c"]
COUNT, FOLDS, BATCH = 12, 3, 4
VIEWS = ["flip", {"name": "rotate", "degrees": 20}]


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    random = np.random.default_rng(0)
    for name in names():
        draw(tmp_path / "images" / name, random, size=(14, 16))
    return CountingStore(tmp_path / "images")


def save_fold_model(folder: Path, fold: int, transform: str = "resize") -> ModelDir:
    """Write a fold model with random weights and its out-of-fold table."""
    settings = Settings(
        system="s",
        model=Model(backbone="fivefold/small_net", backbone_kwargs={"widths": [8], "stem": 8}, image_size=[10, 12]),
        augment=Augment(train=[], eval=[transform]),
        train=Train(precision="fp32", num_workers=0),
        predict=Predict(batch_size=BATCH, tta=["plain"]),
    )
    seed_everything(fold)
    network = build_classifier(settings.model, len(CLASSES))
    network.train()(torch.randn(16, 3, 10, 12))
    facts = {
        "fold": fold,
        "folds": FOLDS,
        "classes": CLASSES,
        "split": "x",
        "shares": [1 / len(CLASSES)] * len(CLASSES),
    }
    best = {"raw": BestCheckpoint("logloss", 1, {"logloss": 1.0}, network.state_dict())}
    save_model(folder, "fold", best, settings, make_training_runtime(settings), facts)
    rows = np.arange(fold, COUNT, FOLDS)
    log_probs = np.log(np.random.default_rng(fold).dirichlet(np.ones(3), len(rows))).astype(np.float32)
    ids = np.array([f"{row:02d}.png" for row in rows], object)
    write(folder / "oof.parquet", Predictions(ids, np.full(len(rows), fold), "s", tuple(CLASSES), log_probs))
    return ModelDir(folder, read_json(folder / "model.json"))


@pytest.fixture
def models(tmp_path: Path) -> list[ModelDir]:
    return [save_fold_model(tmp_path / f"fold-{fold}", fold) for fold in range(FOLDS)]


def names() -> list[str]:
    return [f"{number:02d}.png" for number in range(COUNT)]


@pytest.fixture
def student_rows(store: CountingStore) -> DistillRows:
    ids, nulls = pa.array(names()), pa.nulls(COUNT, pa.string())
    codes, fold = np.arange(COUNT, dtype=np.int32) % 3, (np.arange(COUNT) % FOLDS).astype(np.int16)
    part = np.full(COUNT, "train")
    return DistillRows(FoldTable(ids, ids, codes, tuple(CLASSES), nulls, fold, part, nulls), np.arange(COUNT), store)


@pytest.fixture
def forward_passes() -> Iterator[Counter]:
    """Number of images in the forward passes of each network, by its id."""
    counted: Counter[int] = Counter()

    def count(module: torch.nn.Module, inputs: tuple, _: object) -> None:
        if isinstance(module, Classifier):
            counted[id(module)] += len(inputs[0])
            alive.append(module)  # so that no other network gets its id

    alive: list[torch.nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(count)
    yield counted
    handle.remove()


def predict_directly(model: ModelDir, store: FolderStore, paths: list[str], views: list) -> np.ndarray:
    """Predict with a model that reads its own images with the loader."""
    loaded = load_model(model, {})
    transform = build_transforms(loaded.settings.augment.eval, loaded.settings.model.size, evaluation=True)
    return predict_all(loaded.network, ImageDataset(store, paths, transform), BATCH, 0, loaded.runtime, views)


def test_models_with_equal_preprocessing_read_each_image_once_for_all_views(models, store, tmp_path):
    shared = SharedEvalImages(ImageList(store, names()), tmp_path)
    predicted = [load_model(model, {"tta": ["plain", *VIEWS]}).predict_cached(shared, "") for model in models]
    assert len(shared.caches) == 1
    assert sum(store.reads.values()) == COUNT + 1  # the first one gives the size
    for model, log_probs in zip(models, predicted, strict=True):
        np.testing.assert_array_equal(log_probs, predict_directly(model, store, names(), ["plain", *VIEWS]))


def test_models_with_other_preprocessing_get_their_own_images(models, store, tmp_path):
    other = save_fold_model(tmp_path / "other", 0, "centre_crop")
    shared = SharedEvalImages(ImageList(store, names()), tmp_path)
    predicted = [load_model(model, {}).predict_cached(shared, "") for model in (models[0], other)]
    assert len(shared.caches) == 2
    assert not np.array_equal(*predicted)
    np.testing.assert_array_equal(predicted[1], predict_directly(other, store, names(), ["plain"]))


def test_leak_free_teacher_predicts_only_its_own_rows_once_per_view(models, student_rows, forward_passes):
    targets = compute_soft_targets("oof", models, student_rows, VIEWS)
    assert sorted(forward_passes.values()) == [len(VIEWS) * COUNT // FOLDS] * FOLDS
    assert sum(student_rows.store.reads.values()) == COUNT + 1
    held_out_rows = [np.arange(fold, COUNT, FOLDS) for fold in range(FOLDS)]
    per_view = [np.zeros((COUNT, 3)) for _ in VIEWS]
    plain = np.zeros((COUNT, 3))
    for model, rows in zip(models, held_out_rows, strict=True):
        plain[rows] = np.random.default_rng(model.info["fold"]).dirichlet(np.ones(3), len(rows))
        for predicted, view in zip(per_view, VIEWS, strict=True):
            predicted[rows] = np.exp(
                predict_directly(model, student_rows.store, [names()[row] for row in rows], [view])
            )
    np.testing.assert_allclose(np.exp(targets.log_probs), np.mean([plain, *per_view], axis=0), rtol=1e-5)


def test_leak_free_teacher_takes_the_plain_view_from_its_table(models, student_rows, forward_passes):
    compute_soft_targets("oof", models, student_rows, [])
    assert not forward_passes
    assert not student_rows.store.reads


def test_ensemble_teacher_reads_each_image_once_and_predicts_once_per_view(models, student_rows, forward_passes):
    targets = compute_soft_targets("ensemble", models, student_rows, VIEWS)
    assert sorted(forward_passes.values()) == [(1 + len(VIEWS)) * COUNT] * len(models)
    assert sum(student_rows.store.reads.values()) == COUNT + 1
    expected = np.mean(
        [np.exp(predict_directly(m, student_rows.store, names(), ["plain", *VIEWS])) for m in models], axis=0
    )
    np.testing.assert_allclose(np.exp(targets.log_probs), expected, rtol=1e-5)


def test_unlabelled_images_are_read_once_for_the_whole_ensemble(models, student_rows, forward_passes):
    predicted = ensemble_soft_targets(models, student_rows.store, names()[:5], student_rows)
    assert sorted(forward_passes.values()) == [5] * len(models)
    assert sum(student_rows.store.reads.values()) == 5 + 1
    expected = np.mean(
        [np.exp(predict_directly(m, student_rows.store, names()[:5], ["plain"])) for m in models], axis=0
    )
    np.testing.assert_allclose(np.exp(predicted), expected, rtol=1e-5)
