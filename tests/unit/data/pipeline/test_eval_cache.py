"""Images made once for an evaluation: the same bytes as read anew, in memory, in a file, or where there is room in neither."""

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


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one.images, other.images)
        and torch.equal(one.rows, other.rows)
        and torch.equal(one.meta, other.meta)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["memory", "file"])
def test_the_same_bytes_as_the_loaders_however_often_they_are_asked_for(images, tmp_path, limit):
    expected = list(load_batches(images, BATCHES, 0))
    nowhere = EvalImageCache(images, limit=0)
    assert all(same(list(nowhere.batches(BATCHES, workers)), expected) for workers in (0, 1))
    assert nowhere.memory_bytes == 0
    images.store.reads.clear()
    random = torch.get_rng_state()
    prepared = EvalImageCache(images, tmp_path, limit)
    for _ in range(3):
        assert same(list(prepared.batches(BATCHES, 0)), expected)
    assert isinstance(prepared.pixels, np.memmap) == (limit == 0)
    assert prepared.memory_bytes == (COUNT * 8 * 12 * 3 if limit else 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert sorted(images.store.reads.values()) == [1] * (COUNT - 1) + [2]  # one image is made twice: it tells the size
    assert list(tmp_path.iterdir()) == [tmp_path / "images"]  # the file has no name: nothing of it can be left behind


def test_a_full_disk_is_told_and_they_are_read_anew(images, tiny_disk, caplog):
    images.transform = build_transforms(["resize"], (80, 80), evaluation=True)
    prepared = EvalImageCache(images, tiny_disk, limit=0)
    assert same(list(prepared.batches(BATCHES, 0)), list(load_batches(images, BATCHES, 0)))
    assert "(No space left on device)" in caplog.text
    assert "TMPDIR" in caplog.text


def test_rows_are_made_when_they_are_asked_for_and_not_again(images):
    prepared = EvalImageCache(images, limit=1 << 20)
    some = [[(0, 9), (0, 2)], [(0, 4)]]
    assert same(list(prepared.batches(some, 0)), list(load_batches(images, some, 0)))
    assert np.flatnonzero(prepared.done).tolist() == [2, 4, 9]
    list(prepared.batches(BATCHES, 0))
    assert prepared.done.all()
    assert list(prepared.batches([], 0)) == []
    Image.new("RGB", (20, 20)).save(images.store.root / "3.png")
    with pytest.raises(DataError, match=r"3\.png .*split"):
        list(EvalImageCache(images).batches(BATCHES, 0))


@pytest.mark.parametrize(("limit", "in_file"), [(1 << 20, True), (0, True), (0, False)], ids=["memory", "file", "none"])
def test_one_error_names_every_image_that_cannot_be_read_or_others_stand_in_for_all(images, tmp_path, limit, in_file):
    whole = list(load_batches(images, BATCHES, 0))
    bad = [0, 5]
    for row in bad:
        (images.store.root / images.paths[row]).write_bytes(b"no image")
    images.sha256 = None
    scratch = tmp_path if in_file else None
    with pytest.raises(DataError) as error:
        list(EvalImageCache(images, scratch, limit).batches(BATCHES, 0))
    if limit or in_file:
        assert all(images.paths[row] in str(error.value) for row in bad)
    prepared = EvalImageCache(images, scratch, limit, use_placeholders=True)
    for _ in range(2):
        found = list(prepared.batches(BATCHES, 0))
        assert sorted(prepared.unreadable) == bad
        for batch, expected in zip(found, whole, strict=True):
            kept = ~torch.isin(expected.rows, torch.tensor(bad))
            assert torch.equal(batch.images[kept], expected.images[kept])
            assert torch.equal(batch.meta[kept], expected.meta[kept])


def test_where_no_image_can_be_read_nothing_stands_in(images):
    for path in images.paths:
        (images.store.root / path).write_bytes(b"no image")
    images.sha256 = None
    prepared = EvalImageCache(images, limit=1 << 20, use_placeholders=True)
    for _ in range(2):
        with pytest.raises(DataError, match="11 of 11 images"):
            list(prepared.batches(BATCHES, 0))
