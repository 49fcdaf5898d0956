import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fivefold.config.loading import arguments_layer
from fivefold.config.loading import load as load_settings
from fivefold.data.pipeline import dataset
from fivefold.data.pipeline.dataset import (
    ImageDataset,
    derive_seed,
    image_stats,
    load_batches,
    sequential_batches,
    shuffled_batches,
)
from fivefold.data.readers.stores import open_store
from fivefold.data.transforms.registry import build_transforms
from fivefold.errors import DataError, StoppedError
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


def load_epoch(images: ImageDataset, number: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(load_batches(images, shuffled_batches(len(images), 4, 5, number), workers))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.rows for batch in batches])


def test_batches_do_not_depend_on_workers_or_caching_in_memory(images):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    plain, order = load_epoch(images, 1, workers=0)
    assert torch.equal(torch.rand(3), expected), "torch's random state must not change"
    for workers in (1, 2):
        pixels, rows = load_epoch(images, 1, workers)
        assert torch.equal(pixels, plain)
        assert torch.equal(rows, order)
    assert images.cache_in_memory()
    assert torch.equal(load_epoch(images, 1, workers=0)[0], plain)


def test_memory_limit_is_checked_without_decoding_all_images(images, monkeypatch):
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 11 * 20 * 20 * 3)
    assert images.cache_in_memory()
    images.kept = None
    monkeypatch.setattr(dataset, "MEMORY_LIMIT", 11 * 20 * 20 * 3 - 1)
    monkeypatch.setattr(ImageDataset, "image", lambda *_: pytest.fail("decoded"))
    assert not images.cache_in_memory()


def test_each_epoch_has_all_rows_with_new_order_and_augmentation(images):
    (first, rows_1), (second, rows_2) = load_epoch(images, 1, 0), load_epoch(images, 2, 0)
    assert sorted(rows_1.tolist()) == sorted(rows_2.tolist()) == list(range(11))
    assert not torch.equal(rows_1, rows_2)
    assert not torch.equal(first[rows_1.argsort()], second[rows_2.argsort()])


@pytest.mark.parametrize("recipe", ["small_images", "sketch_caformer", "demo"])
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


SIGNAL_SCRIPT = """
import os, signal, subprocess, sys
from pathlib import Path
from fivefold.data.pipeline.dataset import ImageDataset, load_batches, shuffled_batches
from fivefold.data.readers.stores import open_store
from fivefold.data.transforms.registry import build_transforms
from fivefold.errors import StoppedError
from fivefold.progress import interruptible
from fivefold.signals import defer_signals

folder, number = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests in the background has it ignored
images = ImageDataset(open_store(Path(folder)), [f"{n}.png" for n in range(11)], build_transforms([], (8, 8)))
try:
    with defer_signals():
        for count, _ in enumerate(interruptible(load_batches(images, shuffled_batches(11, 2, 0, 1) * 1000, 2))):
            if count == 3:
                subprocess.Popen(["setsid", "kill", "-s", number, "--", f"-{os.getpid()}"])
except StoppedError as stopped:
    print("stopped by", stopped.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_group_stops_the_process_but_not_its_workers(images, tmp_path, number):
    """A terminal's ^C and `timeout` signal the whole group. A worker that died of it would make training fail."""
    command = [sys.executable, "-c", SIGNAL_SCRIPT, tmp_path, str(int(number))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"stopped by {int(number)}\n"), result.stderr


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
    assert large_dataset.measured is None


def test_meta_features_describe_the_untransformed_image_with_any_number_of_workers(images):
    with_meta = ImageDataset(images.store, images.paths, images.transform, seed=5, meta=["color_mean", "aspect"])
    assert next(load_batches(images, [[(1, 0)]], 0)).meta is None
    (batch,) = load_batches(with_meta, [[(1, 3), (2, 3), (1, 7)]], 0)
    expected = np.stack([image_stats(images.image(row), ["color_mean", "aspect"]) for row in (3, 3, 7)])
    assert batch.meta.dtype == torch.float32
    np.testing.assert_array_equal(batch.meta.numpy(), expected)
    np.testing.assert_array_equal(with_meta.compute_image_stats()[[3, 3, 7]], expected)
    assert with_meta.compute_image_stats().shape == (11, 4)
    for workers in (0, 2):
        (reloaded,) = load_batches(pickle.loads(pickle.dumps(with_meta)), [[(1, 3), (2, 3), (1, 7)]], workers)
        assert torch.equal(reloaded.meta, batch.meta)
        assert torch.equal(reloaded.images, batch.images)
    assert ImageDataset(images.store, [], images.transform, meta=["aspect"]).compute_image_stats().shape == (0, 1)


def test_error_names_a_file_that_changed_after_the_split(images, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "3.png")
    with pytest.raises(DataError, match=r"3\.png .*split"):
        list(load_batches(images, sequential_batches(len(images), 4), 0))


def test_only_training_drops_a_last_batch_of_few_rows():
    assert [len(batch) for batch in shuffled_batches(130, 64, 0, 0)] == [64, 64]
    assert [len(batch) for batch in shuffled_batches(136, 64, 0, 0)] == [64, 64, 8]
    assert [len(batch) for batch in shuffled_batches(3, 64, 0, 0)] == [3]
    assert [len(batch) for batch in shuffled_batches(10, 4, 0, 0, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in shuffled_batches(3, 4, 0, 0, drop_last=True)] == [3]
    assert [len(batch) for batch in shuffled_batches(3, 1, 0, 0)] == [1, 1, 1]
    left_out = [
        set(range(130)) - {row for batch in shuffled_batches(130, 64, 0, n) for _, row in batch} for n in (1, 2)
    ]
    assert left_out[0] != left_out[1]
    assert [len(batch) for batch in shuffled_batches(9, 4, 0, 0)] == [4, 4]
    assert [len(batch) for batch in shuffled_batches(10, 4, 0, 0)] == [4, 4, 2]
    assert [len(batch) for batch in shuffled_batches(1, 4, 0, 0)] == [1]
    assert [len(batch) for batch in sequential_batches(9, 4)] == [4, 4, 1]


def test_sample_seeds_are_unique():
    seeds = {derive_seed(seed, epoch, row) for seed in range(5) for epoch in range(5) for row in range(40)}
    assert len(seeds) == 1000
    assert min(seeds) >= 0
