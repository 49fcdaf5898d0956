"""Images shared by several models: how often each is read, how often each network runs, and equal predictions."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from counting_store import CountingStore
from fivefold.contract.artifacts import ModelDir, open_model_dir
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.data.readers.stores import FolderStore
from fivefold.data.split.fold_table import FoldTable
from fivefold.data.transforms.registry import build_transforms
from fivefold.distillation import DistillRows, compute_soft_targets, ensemble_soft_targets
from fivefold.inference.predictor import predict_all
from fivefold.models.classifier import Classifier
from fivefold.predictions import Predictions, write
from fivefold.trained_model import ImageList, SharedEvalImages, load_model
from random_models import CLASSES, save_model_dir
from toy_data import draw

COUNT, FOLDS, BATCH = 12, 3, 4
NAMES = [f"{number:02d}.png" for number in range(COUNT)]
VIEWS = ["flip", {"name": "rotate", "degrees": 20}]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in NAMES:
        draw(folder / name, random, size=(14, 16))
    return folder


@pytest.fixture
def store(images: Path) -> CountingStore:
    return CountingStore(images)


def save_fold_model(folder: Path, fold: int, transform: str = "resize") -> ModelDir:
    """Write a fold model with random weights and its out-of-fold table."""
    save_model_dir(folder, fold, eval=[transform])
    ids = np.array(NAMES[fold::FOLDS], object)
    log_probs = np.log(out_of_fold_probs(fold)).astype(np.float32)
    write(folder / "oof.parquet", Predictions(ids, np.full(len(ids), fold), "a", tuple(CLASSES), log_probs))
    return open_model_dir(folder)


def out_of_fold_probs(fold: int) -> np.ndarray:
    return np.random.default_rng(fold).dirichlet(np.ones(3), COUNT // FOLDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelDir]:
    return [save_fold_model(tmp_path_factory.mktemp("models") / f"fold-{fold}", fold) for fold in range(FOLDS)]


@pytest.fixture
def student_rows(store: CountingStore) -> DistillRows:
    ids, nulls = pa.array(NAMES), pa.nulls(COUNT, pa.string())
    codes, fold = np.arange(COUNT, dtype=np.int32) % 3, (np.arange(COUNT) % FOLDS).astype(np.int16)
    part = np.full(COUNT, "train")
    return DistillRows(FoldTable(ids, ids, codes, tuple(CLASSES), nulls, fold, part, nulls), np.arange(COUNT), store)


@pytest.fixture
def forward_passes() -> Iterator[Counter]:
    """Number of images in the forward passes of each network, by its id."""
    counted: Counter[int] = Counter()
    alive: list[torch.nn.Module] = []

    def count(module: torch.nn.Module, inputs: tuple, _: object) -> None:
        if isinstance(module, Classifier):
            counted[id(module)] += len(inputs[0])
            alive.append(module)  # so that no other network gets its id

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    yield counted
    handle.remove()


def predict_directly(model: ModelDir, store: FolderStore, paths: list[str], views: list) -> np.ndarray:
    """Predict with a model that reads its own images with the loader."""
    loaded = load_model(model, {})
    transform = build_transforms(loaded.settings.augment.eval, loaded.settings.model.size, evaluation=True)
    return predict_all(loaded.network, ImageDataset(store, paths, transform), BATCH, 0, loaded.runtime, views)


def test_models_with_equal_preprocessing_read_each_image_once_for_all_views(models, store, tmp_path):
    other = save_fold_model(tmp_path / "other", 0, "centre_crop")
    shared = SharedEvalImages(ImageList(store, NAMES), tmp_path)
    views = ["plain", *VIEWS]
    predicted = [load_model(model, {"tta": views}).predict_cached(shared, "") for model in models]
    assert len(shared.caches) == 1
    assert store.reads.total() == COUNT
    predicted.append(load_model(other, {"tta": views}).predict_cached(shared, ""))
    assert len(shared.caches) == 2
    for model, log_probs in zip([*models, other], predicted, strict=True):
        np.testing.assert_array_equal(log_probs, predict_directly(model, store, NAMES, views))
    assert not np.array_equal(predicted[0], predicted[-1])


def test_leak_free_teacher_predicts_only_its_own_rows_once_per_view(models, student_rows, forward_passes):
    compute_soft_targets("oof", models, student_rows, [])
    assert not forward_passes, "the plain view is in the table"
    assert not student_rows.store.reads
    targets = compute_soft_targets("oof", models, student_rows, VIEWS)
    assert sorted(forward_passes.values()) == [len(VIEWS) * COUNT // FOLDS] * FOLDS
    assert student_rows.store.reads.total() == COUNT
    for fold, model in enumerate(models):
        paths = NAMES[fold::FOLDS]
        per_view = [np.exp(predict_directly(model, student_rows.store, paths, [view])) for view in VIEWS]
        expected = np.mean([out_of_fold_probs(fold), *per_view], axis=0)
        np.testing.assert_allclose(np.exp(targets.log_probs[fold::FOLDS]), expected, rtol=1e-5)


def test_ensemble_reads_each_image_once_and_predicts_once_per_view(models, student_rows, forward_passes):
    targets = compute_soft_targets("ensemble", models, student_rows, VIEWS).log_probs
    assert sorted(forward_passes.values()) == [(1 + len(VIEWS)) * COUNT] * len(models)
    assert student_rows.store.reads.total() == COUNT
    forward_passes.clear()
    unlabelled = ensemble_soft_targets(models, student_rows.store, NAMES[:5], student_rows)
    assert sorted(forward_passes.values()) == [5] * len(models)
    assert student_rows.store.reads.total() == COUNT + 5
    for predicted, count, views in ((targets, COUNT, ["plain", *VIEWS]), (unlabelled, 5, ["plain"])):
        direct = [predict_directly(model, student_rows.store, NAMES[:count], views) for model in models]
        np.testing.assert_allclose(np.exp(predicted), np.mean(np.exp(direct), axis=0), rtol=1e-5)
