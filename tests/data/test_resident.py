"""Batches made of images that lie on the device: the loader's, byte for byte; and when images come to lie there."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fivefold.data.ahead import ahead
from fivefold.data.cached import with_caches
from fivefold.data.caching import Source, key_of_images, made, survey
from fivefold.data.dataset import Batch, ImageSet, epoch_batches, load
from fivefold.data.images import Pixels
from fivefold.data.resident import Resident, made_resident, sizes_of
from fivefold.data.store import open_store
from fivefold.data.transforms import build_transforms

CPU, GIB = torch.device("cpu"), 2**30
CROP = [{"name": "random_resized_crop", "scale": [0.3, 1.0]}, "horizontal_flip"]
CHAINS = {
    "crop and flip": CROP,
    "flip, crop, flip, at times": [
        {"name": "horizontal_flip", "p": 0.4},
        {"name": "random_resized_crop", "p": 0.6},
        "horizontal_flip",
    ],
    "centre": [{"name": "centre_crop", "p": 0.5}],
    "reflected": [{"name": "random_crop", "padding": 5}, "horizontal_flip"],
    "black": ["horizontal_flip", {"name": "random_crop", "padding": 9, "mode": "constant", "p": 0.7}],
    "repeated": [*CROP, {"name": "random_crop", "padding": 3, "mode": "replicate"}],
    "round": [{"name": "random_crop", "padding": 4, "mode": "circular"}],
    "nothing": [],
}
SIZE = (24, 32)
WHOLE = Pixels()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Images of many sizes, some smaller than what a network takes, one very tall."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    sizes = [(int(h), int(w)) for h, w in random.integers(5, 150, (22, 2))]
    for number, size in enumerate([*sizes, (700, 9), SIZE]):
        coarse = random.integers(0, 256, (max(1, size[0] // 4), max(1, size[1] // 4), 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1]).save(folder / f"{number:02d}.jpg", quality=90)
    names = sorted(path.name for path in folder.iterdir())
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    return Source(open_store(folder), np.array(names, object), np.array(digests, object))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


def images_of(source: Source, folder: Path | None, steps: list, pixels: Pixels = WHOLE, meta: tuple = ()) -> ImageSet:
    """The images with a cache in `folder` (None: without)."""
    store = source.store
    if folder is not None:
        found = survey([source], pixels)
        store = with_caches(store, [made(folder / key_of_images(found, pixels), found, pixels, 1.0)])
    return ImageSet(store, source.paths, build_transforms(steps, SIZE), 5, source.sha256, meta, pixels)


def same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images.cpu(), other.images)
        assert one.images.stride() == other.images.stride(), "laid out alike"
        assert torch.equal(one.rows.cpu(), other.rows)
        assert (one.meta is None) == (other.meta is None)
        assert one.meta is None or torch.equal(one.meta.cpu(), other.meta)


@pytest.mark.parametrize("pixels", [WHOLE, Pixels(20)], ids=lambda pixels: pixels.in_words)
@pytest.mark.parametrize("chain", CHAINS)
def test_the_batches_are_the_loaders_byte_for_byte(source, folder, chain, pixels):
    images = images_of(source, folder, CHAINS[chain], pixels)
    resident = made_resident(images, True, CPU, GIB)
    plain = images_of(source, None, CHAINS[chain], pixels)
    for epoch in (1, 2):
        batches = epoch_batches(len(images), 7, 5, epoch)
        same(list(resident.batches(batches)), list(load(plain, batches, 0)))


def test_meta_features_and_images_that_are_kept_in_memory(source):
    images = images_of(source, None, CROP, meta=("aspect", "color_mean"))
    images.read_once(keep=True)
    batches = epoch_batches(len(images), 7, 5, 3)
    same(list(made_resident(images, True, CPU, GIB).batches(batches)), list(load(images, batches, 0)))


@pytest.mark.parametrize("at_once", [1, 3000])
def test_a_batch_that_is_too_much_at_once_is_made_in_parts(source, folder, at_once):
    images = images_of(source, folder, CROP)
    batches = epoch_batches(len(images), 12, 5, 1)
    in_parts = Resident(images, sizes_of(images), CPU, at_once)
    same(list(in_parts.batches(batches)), list(load(images, batches, 0)))


def test_a_device_that_makes_other_pixels_is_noticed(source, folder):
    images = images_of(source, folder, CROP)
    resident = Resident(images, sizes_of(images), CPU)
    assert resident.agrees()
    resident.pixels ^= 1
    assert not resident.agrees()


def test_making_batches_does_not_move_torchs_random_state(source, folder):
    resident = made_resident(images_of(source, folder, CROP), True, CPU, GIB)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(resident.batches([[(1, 0), (1, 1)]]))
    assert torch.equal(torch.rand(3), expected)


def test_they_take_the_bytes_of_their_stored_pixels(source, folder):
    images = images_of(source, folder, CROP, Pixels(20))
    stored = sum(images.image(row).nbytes for row in range(len(images)))
    assert made_resident(images, True, CPU, stored).pixels.nbytes == stored
    assert sizes_of(images).tolist() == [list(images.image(row).shape[:2]) for row in range(len(images))]


@pytest.mark.parametrize(
    ("steps", "cached", "free", "reason"),
    [
        (["vertical_flip", *CROP], True, GIB, "augment.train has RandomVerticalFlip, which is made on the host"),
        (CROP, False, GIB, "they do not all lie decoded in a cache (data.cache) or in memory"),
        (CROP, True, 300_000, "they would take 0.4 MiB, and there is room for 0.3"),
        (CROP, True, -5, "they would take 0.4 MiB, and there is room for 0.0"),
    ],
)
def test_where_it_cannot_be_the_loader_goes_on_and_the_log_says_why(
    source, folder, caplog, steps, cached, free, reason
):
    images = images_of(source, folder if cached else None, steps)
    with caplog.at_level(logging.INFO):
        assert made_resident(images, True, CPU, free) is None
    assert caplog.messages == [f"images stay off the device: {reason}"]
    assert caplog.records[0].levelname == "WARNING"


@pytest.mark.parametrize("wanted", ["auto", False])
def test_on_a_cpu_they_are_not_laid_out_twice_unless_that_is_asked_for(source, folder, caplog, wanted):
    with caplog.at_level(logging.INFO):
        assert made_resident(images_of(source, folder, CROP), wanted, CPU, GIB) is None
    assert not caplog.messages


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chain", CHAINS)
def test_on_a_gpu_the_batches_are_the_loaders_byte_for_byte_and_nothing_waits(source, folder, chain):
    cuda = torch.device("cuda")
    images = images_of(source, folder, CHAINS[chain], meta=("aspect",))
    images.read_once(keep=False)
    batches = epoch_batches(len(images), 7, 5, 1)
    resident = made_resident(images, "auto", cuda, GIB)
    assert isinstance(resident, Resident)
    list(ahead(resident.batches(batches), cuda))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(ahead(resident.batches(batches), cuda))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(found, list(load(images, batches, 0)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_auto_takes_a_third_of_what_is_free_at_most(source, folder):
    images, cuda = images_of(source, folder, CROP), torch.device("cuda")
    stored = sum(images.image(row).nbytes for row in range(len(images)))
    assert made_resident(images, "auto", cuda, 3 * stored - 1) is None
    assert made_resident(images, "auto", cuda, 3 * stored) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_that_others_filled_meanwhile_the_loader_goes_on(source, folder, caplog):
    images = images_of(source, folder, CROP)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        assert made_resident(images, "auto", torch.device("cuda"), GIB) is None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert caplog.messages == ["images stay off the device: its memory is taken meanwhile"]
