import hashlib
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch

from fivefold.config.loading import arguments_layer
from fivefold.config.loading import load as load_settings
from fivefold.data.pipeline import dataset
from fivefold.data.pipeline.dataset import (
    ImageDataset,
    count_stats,
    derive_seed,
    image_stats,
    load_batches,
    sequential_batches,
)
from fivefold.data.pipeline.loader import shuffle
from fivefold.data.readers.stores import open_store
from fivefold.data.transforms.registry import build_transforms
from fivefold.errors import SettingsError, StoppedError
from fivefold.signals import defer_signals
from toy_data import noise


@pytest.fixture
def images(tmp_path) -> ImageDataset:
    random = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(11)]
    for name in names:
        noise(tmp_path / name, random, 20)
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names]
    transform = build_transforms(["random_resized_crop", "horizontal_flip"], (8, 8))
    return ImageDataset(open_store(tmp_path), names, transform, seed=5, sha256=digests)


def load_epoch(images: ImageDataset, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(load_batches(images, shuffle(images.paths, 4, 5, number), workers=0))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.rows for batch in batches])


def test_memory_limit_is_checked_without_decoding_all_images(images, monkeypatch):
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 11 * 20 * 20 * 3)
    images.cache_in_memory()
    assert len(images.kept) == 11
    images.kept = None
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 11 * 20 * 20 * 3 - 1)
    monkeypatch.setattr(ImageDataset, "image", lambda *_: pytest.fail("decoded"))
    images.cache_in_memory()
    assert images.kept is None


def test_each_epoch_has_all_rows_with_new_order_and_augmentation(images):
    state = torch.get_rng_state()
    (first, rows_1), (second, rows_2) = load_epoch(images, 1), load_epoch(images, 2)
    assert torch.equal(torch.get_rng_state(), state), "torch's random state must not change"
    assert sorted(rows_1.tolist()) == sorted(rows_2.tolist()) == list(range(11))
    assert not torch.equal(rows_1, rows_2)
    assert not torch.equal(first[rows_1.argsort()], second[rows_2.argsort()])


@pytest.mark.parametrize("recipe", ["small_images", "sketch_caformer"])
def test_batch_equals_its_samples_loaded_singly_with_any_number_of_threads(images, recipe):
    chain = load_settings([arguments_layer([f"recipe={recipe}"])]).augment.train
    images = ImageDataset(images.store, images.paths, build_transforms(chain, (16, 12)), seed=3)
    batch = images.__getitems__([(2, row) for row in range(11)]).images
    assert batch.is_contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        for row in range(11):
            torch.manual_seed(derive_seed(3, 2, row))
            sample = images.transform(torch.from_numpy(images.image(row)).permute(2, 0, 1))
            assert torch.equal(batch[row], sample)
    finally:
        torch.set_num_threads(threads)


def test_computing_image_stats_can_be_interrupted(images):
    rows_read = []

    class SlowDataset(ImageDataset):
        def image(self, row):
            rows_read.append(row)
            if len(rows_read) == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002)
            return np.zeros((8, 8, 3), np.uint8)

    large_dataset = SlowDataset(images.store, ["0.png"] * 2000, images.transform, meta=["aspect"])
    with defer_signals(), pytest.raises(StoppedError):
        large_dataset.compute_image_stats()
    assert len(rows_read) < 200


def test_meta_features_describe_the_untransformed_image_with_any_number_of_workers(images):
    names, samples = ["color_mean", "aspect"], [(1, 3), (2, 3), (1, 7)]
    with_meta = ImageDataset(images.store, images.paths, images.transform, seed=5, meta=names)
    assert next(load_batches(images, [[(1, 0)]], 0)).meta is None
    (batch,) = load_batches(with_meta, [samples], 0)
    expected = np.stack([image_stats(images.image(row), names) for row in (3, 3, 7)])
    np.testing.assert_array_equal(batch.meta.numpy(), expected)
    np.testing.assert_array_equal(with_meta.compute_image_stats()[[3, 3, 7]], expected)
    assert with_meta.compute_image_stats().shape == (11, 4)
    (reloaded,) = load_batches(pickle.loads(pickle.dumps(with_meta)), [samples], 2)
    assert torch.equal(reloaded.meta, batch.meta)
    assert torch.equal(reloaded.images, batch.images)


@pytest.mark.parametrize(("names", "count"), [([], 0), (["aspect"], 1), (["color_mean", "aspect"], 4)])
def test_image_stats_concatenates_features_in_order(names, count):
    pixels = np.full((10, 25, 3), (255, 51, 0), np.uint8)
    expected = {"aspect": [2.5], "color_mean": [1.0, 0.2, 0.0]}
    stats = image_stats(pixels, names)
    assert stats.dtype == np.float32
    np.testing.assert_allclose(stats, [number for name in names for number in expected[name]], atol=1e-6)
    assert count_stats(names) == len(stats) == count
    with pytest.raises(SettingsError, match="did you mean 'color_mean'"):
        count_stats([*names, "color"])


@pytest.mark.parametrize(
    ("rows", "batch_size", "drop_last", "sizes"),
    [
        (130, 64, False, [64, 64]),
        (136, 64, False, [64, 64, 8]),
        (3, 1, False, [1, 1, 1]),
        (9, 4, False, [4, 4]),
        (1, 4, False, [1]),
        (10, 4, True, [4, 4]),
        (3, 4, True, [3]),
    ],
)
def test_only_training_drops_a_last_batch_of_few_rows(rows, batch_size, drop_last, sizes):
    batches = [shuffle(range(rows), batch_size, 0, epoch, drop_last) for epoch in range(3)]
    assert list(map(len, batches[0])) == sizes
    dropped = [set(range(rows)) - {row for batch in epoch for _, row in batch} for epoch in batches]
    assert sum(sizes) == rows or dropped[0] != dropped[1] or dropped[0] != dropped[2]
    assert sum(map(len, sequential_batches(rows, batch_size))) == rows


def test_sample_seeds_are_unique():
    seeds = {derive_seed(seed, epoch, row) for seed in range(5) for epoch in range(5) for row in range(40)}
    assert len(seeds) == 1000
    assert min(seeds) >= 0
