import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counting_store import CountingStore
from fivefold.data.pipeline.dataset import Batch, ImageDataset, load_batches, sequential_batches
from fivefold.data.pipeline.eval_cache import EvalImageCache
from fivefold.data.transforms.registry import build_transforms
from fivefold.errors import DataError
from toy_data import noise

COUNT = 11
BATCHES = sequential_batches(COUNT, 4)


@pytest.fixture
def images(tmp_path: Path) -> ImageDataset:
    random = np.random.default_rng(0)
    store = CountingStore(tmp_path / "images")
    names = [f"{number}.png" for number in range(COUNT)]
    for number, name in enumerate(names):
        noise(store.root / name, random, 20 + number)
    digests = [hashlib.sha256((store.root / name).read_bytes()).hexdigest() for name in names]
    transform = build_transforms(["resize"], (8, 12), evaluation=True)
    return ImageDataset(store, names, transform, sha256=digests, meta=["color_mean", "aspect"])


def batches_equal(batches: list[Batch], expected: list[Batch]) -> bool:
    return len(batches) == len(expected) and all(
        torch.equal(batch.images, reference.images)
        and torch.equal(batch.rows, reference.rows)
        and torch.equal(batch.meta, reference.meta)
        for batch, reference in zip(batches, expected, strict=True)
    )


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["memory", "file"])
def test_cache_returns_the_bytes_of_the_loader_on_every_pass(images, tmp_path, limit):
    expected = list(load_batches(images, BATCHES, 0))
    disabled = EvalImageCache(images, limit=0)
    assert all(batches_equal(list(disabled.batches(BATCHES, workers)), expected) for workers in (0, 1))
    assert disabled.memory_bytes == 0
    images.store.reads.clear()
    random = torch.get_rng_state()
    cache = EvalImageCache(images, tmp_path, limit)
    for _ in range(3):
        assert batches_equal(list(cache.batches(BATCHES, 0)), expected)
    assert isinstance(cache.pixels, np.memmap) == (limit == 0)
    assert cache.memory_bytes == (COUNT * 8 * 12 * 3 if limit else 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(images.store.reads.values()) == [1] * COUNT
    assert list(tmp_path.iterdir()) == [tmp_path / "images"]  # the file has no name, so nothing can be left behind


def test_full_disk_is_reported_and_images_are_read_from_files(images, tiny_disk, caplog):
    images.transform = build_transforms(["resize"], (80, 80), evaluation=True)
    cache = EvalImageCache(images, tiny_disk, limit=0)
    assert batches_equal(list(cache.batches(BATCHES, 0)), list(load_batches(images, BATCHES, 0)))
    assert "(No space left on device)" in caplog.text
    assert "TMPDIR" in caplog.text


def test_rows_are_prepared_once_on_first_use(images):
    cache = EvalImageCache(images, limit=1 << 20)
    requested = [[(0, 9), (0, 2)], [(0, 4)]]
    assert batches_equal(list(cache.batches(requested, 0)), list(load_batches(images, requested, 0)))
    assert np.flatnonzero(cache.done).tolist() == [2, 4, 9]
    list(cache.batches(BATCHES, 0))
    assert cache.done.all()
    assert list(cache.batches([], 0)) == []
    Image.new("RGB", (20, 20)).save(images.store.root / "3.png")
    with pytest.raises(DataError, match=r"3\.png .*split"):
        list(EvalImageCache(images).batches(BATCHES, 0))


@pytest.mark.parametrize(("limit", "in_file"), [(1 << 20, True), (0, True), (0, False)], ids=["memory", "file", "none"])
def test_unreadable_images_raise_one_error_or_get_placeholders(images, tmp_path, limit, in_file):
    complete = list(load_batches(images, BATCHES, 0))
    bad = [0, 5]
    for row in bad:
        (images.store.root / images.paths[row]).write_bytes(b"no image")
    images.sha256 = [None] * COUNT
    scratch = tmp_path if in_file else None
    with pytest.raises(DataError) as error:
        list(EvalImageCache(images, scratch, limit).batches(BATCHES, 0))
    if limit or in_file:
        assert all(images.paths[row] in str(error.value) for row in bad)
    cache = EvalImageCache(images, scratch, limit, use_placeholders=True)
    for _ in range(2):
        batches = list(cache.batches(BATCHES, 0))
        assert sorted(cache.unreadable) == bad
        for batch, expected in zip(batches, complete, strict=True):
            readable = ~torch.isin(expected.rows, torch.tensor(bad))
            assert torch.equal(batch.images[readable], expected.images[readable])
            assert torch.equal(batch.meta[readable], expected.meta[readable])


@pytest.mark.parametrize("limit", [1 << 20, 0])
def test_placeholders_are_not_used_if_every_image_is_unreadable(images, limit):
    images.paths = ["absent.png"] * COUNT
    with pytest.raises(DataError, match="11 of 11 images"):
        list(EvalImageCache(images, limit=limit, use_placeholders=True).batches(BATCHES, 0))
