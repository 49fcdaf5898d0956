import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counting_store import CountingStore
from fivefold.data.image_io import DecodeOptions, decode
from fivefold.data.pipeline import image_cache
from fivefold.data.pipeline.dataset import ImageDataset, load_batches
from fivefold.data.pipeline.image_cache import (
    HEADER_FILE,
    INDEX_FILE,
    PIXELS_FILE,
    Cache,
    ImageFile,
    build_cache,
    cache_name,
    check_sample,
    get_or_build,
    make_image_files,
    open_or_build,
    plan_cache,
)
from fivefold.data.pipeline.loader import shuffle
from fivefold.data.readers.stores import FolderStore, open_store
from fivefold.data.transforms.registry import build_transforms
from fivefold.errors import DataError, RetryableError, SettingsError
from toy_data import noise

GIB = 2**30
FULL = DecodeOptions()
KINDS = [FULL, DecodeOptions(24), DecodeOptions(24, scaled=True)]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw_images(folder: Path) -> None:
    """Write one image of each kind that decoding handles differently, with shorter sides above and below 24 pixels."""
    random = np.random.default_rng(0)
    rgb = np.kron(random.integers(0, 256, (9, 15, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    image = Image.fromarray(rgb)
    folder.mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.rotate(orientation).save(folder / f"upright{orientation}.jpg", exif=exif)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(random.integers(0, 2**16, (40, 30), dtype=np.uint16)).save(folder / "wide.png")
    image.convert("RGBA").rotate(30, expand=True).save(folder / "alpha.png")
    image.convert("RGBA").rotate(30).quantize(17).save(folder / "palette.png")
    image.resize((9, 70)).save(folder / "narrow.webp")
    image.resize((25, 24)).save(folder / "exact.bmp")
    image.save(folder / "twice.png")
    image.save(folder / "twice again.png")


@dataclass(frozen=True)
class Source:
    """Images of a store with their digests."""

    store: FolderStore
    paths: list[str]
    sha256: list[str]

    @property
    def files(self) -> list[ImageFile]:
        return make_image_files(self.store, self.paths, self.sha256)

    def dataset(self, store: FolderStore, **options: object) -> ImageDataset:
        transform = build_transforms(["random_resized_crop", "horizontal_flip"], (16, 16))
        return ImageDataset(store, self.paths, transform, 5, **{"sha256": self.sha256} | options)


def open_source(folder: Path) -> Source:
    store = open_store(folder)
    return Source(store, store.names(), [digest_of(folder / name) for name in store.names()])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("odd") / "images"
    draw_images(folder)
    return open_source(folder)


def make_cache(source: Source, folder: Path, options: DecodeOptions = FULL) -> Cache:
    cache = get_or_build(folder, source.files, options, 1.0)
    assert cache is not None
    return cache


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options.description)
def test_cached_pixels_equal_the_decoded_file_for_every_kind_of_image(source, tmp_path, options):
    cache = make_cache(source, tmp_path, options)
    cache.verify()
    assert len(cache) == len(source.paths) - 1, "equal files must be stored once"
    for name, index in zip(source.paths, cache.find(source.sha256), strict=True):
        assert np.array_equal(cache.image(index), options.decode(source.store.read(name), name)), name
        assert cache.image(index).ctypes.data % 64 == 0
        assert not cache.image(index).flags.writeable
    planned = sum(image.bytes for image in plan_cache(source.files, options))
    assert options.scaled or cache.bytes == planned, "the estimate must be exact"
    assert cache.find(["00" * 32, None, "ff" * 32]).tolist() == [-1, -1, -1]


def test_cache_name_depends_on_contents_and_decoding_but_not_on_order(source):
    digests = source.sha256
    assert cache_name(digests, FULL) == cache_name([*digests[::-1], digests[0]], FULL)
    assert len({cache_name(digests[1:], FULL), *(cache_name(digests, options) for options in KINDS)}) == 4


def load_bytes(images: ImageDataset, workers: int = 0) -> bytes:
    batches = load_batches(images, shuffle(images.paths, 4, 5, 1), workers)
    return b"".join(batch.images.contiguous().numpy().tobytes() + batch.rows.numpy().tobytes() for batch in batches)


def test_batches_are_equal_from_files_memory_and_cache_with_any_number_of_workers(source, tmp_path):
    options = {"meta": ["aspect", "color_mean"], "decode_options": KINDS[1]}
    cached_store = replace(source.store, caches=[make_cache(source, tmp_path, KINDS[1])])
    plain, in_memory = source.dataset(source.store, **options), source.dataset(source.store, **options)
    in_memory.cache_in_memory()
    assert in_memory.kept
    expected = load_bytes(plain)
    assert load_bytes(plain, workers=1) == load_bytes(in_memory) == expected
    cached, undigested = source.dataset(cached_store, **options), source.dataset(cached_store, sha256=None, **options)
    assert (cached.count_cached(), undigested.count_cached()) == (len(source.paths), 0)
    for dataset, workers in ((cached, 0), (undigested, 0), (pickle.loads(pickle.dumps(cached)), 2)):
        assert load_bytes(dataset, workers) == expected
    cached.cache_in_memory()
    assert cached.kept is None, "memory-mapped images need no second copy in memory"
    assert cached.compute_image_stats().tobytes() == plain.compute_image_stats().tobytes()


def test_cached_rows_open_no_file_and_uncached_rows_are_read_from_files(source, tmp_path):
    cache = make_cache(Source(source.store, source.paths[:5], source.sha256[:5]), tmp_path / "caches")
    (tmp_path / "empty").mkdir()
    images = source.dataset(replace(open_store(tmp_path / "empty"), caches=[cache]))
    assert images.count_cached() == 5
    assert images.image(4).shape[2] == 3
    with pytest.raises(DataError, match="cannot be read"):
        images.image(6)
    partly_cached = replace(source.store, caches=[cache])
    uncached = source.dataset(partly_cached).image(6)
    assert np.array_equal(uncached, decode(source.store.read(source.paths[6]), "6"))
    assert source.dataset(partly_cached, decode_options=DecodeOptions(24)).count_cached() == 0


def edit_header(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / HEADER_FILE).write_text(
        json.dumps(json.loads((folder / HEADER_FILE).read_text()) | values)
    )


CORRUPTIONS = {
    "header is a list": (lambda folder: (folder / HEADER_FILE).write_text("[1]"), "cache.json"),
    "header value of another type": (edit_header(resize_shorter_side="24"), "resize_shorter_side"),
    "format": (edit_header(format=99), "format"),
    "truncated pixels": (lambda folder: os.truncate(folder / PIXELS_FILE, 64), "pixels.u8"),
    "missing index": (lambda folder: (folder / INDEX_FILE).unlink(), "index.npy"),
    "damaged index": (lambda folder: (folder / INDEX_FILE).write_bytes(b"no index"), "index.npy"),
}


@pytest.mark.parametrize("fault", CORRUPTIONS)
def test_corrupt_cache_is_rejected_and_rebuilt_on_first_use(tmp_path, fault, caplog):
    corrupt, named = CORRUPTIONS[fault]
    noise(tmp_path / "images" / "1.png", np.random.default_rng(0), 8)
    source, caches = open_source(tmp_path / "images"), tmp_path / "caches"
    cache = make_cache(source, caches)
    original = (cache.folder / PIXELS_FILE).read_bytes()
    corrupt(cache.folder)
    with pytest.raises(DataError) as error:
        Cache(cache.folder)
    assert named in str(error.value)
    assert (make_cache(source, caches).folder / PIXELS_FILE).read_bytes() == original
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_no_cache_is_built_if_it_is_too_large_or_its_folder_cannot_be_created(source, tmp_path):
    with pytest.raises(SettingsError, match=r"16 decoded images take .*data\.resize_shorter_side"):
        open_or_build(tmp_path / "key", lambda: plan_cache(source.files, FULL), FULL, 1e-5)
    (tmp_path / "file").write_text("")
    for folder, most_gib in ((tmp_path / "caches", 1e-5), (tmp_path / "file" / "caches", 1.0)):
        assert get_or_build(folder, source.files, FULL, most_gib) is None
        assert not list(folder.glob("[!.]*"))


def test_a_sample_of_the_images_shows_that_the_cache_is_far_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "SURVEY_SAMPLE", 10)
    for number in range(50):
        noise(tmp_path / "images" / f"{number}.bmp", np.random.default_rng(number), 8)
    source = open_source(tmp_path / "images")
    size = 50 * 192 / GIB
    check_sample(tmp_path, source.files, FULL, 0.99 * size)
    with pytest.raises(SettingsError, match=r"50 decoded images .*data\.cache_gib="):
        check_sample(tmp_path, source.files, FULL, 0.5 * size)
    counted = CountingStore(tmp_path / "images")
    assert get_or_build(tmp_path / "caches", replace(source, store=counted).files, FULL, 0.5 * size) is None
    assert counted.reads.total() == 10, "not all files may be read"


def test_too_small_a_disk_is_reported_before_anything_is_decoded(source, tiny_disk, caplog):
    with pytest.raises(RetryableError, match="MiB free for them: free some"):
        open_or_build(tiny_disk / "key", lambda: plan_cache(source.files, FULL), FULL, 1.0)
    assert get_or_build(tiny_disk, source.files, FULL, 1.0) is None
    assert "images are read from their files" in caplog.text
    assert not list(tiny_disk.glob("[!.]*"))
    assert not list(tiny_disk.glob(".*.tmp"))


def test_full_disk_during_a_build_is_retryable_and_leaves_nothing(source, tiny_disk):
    with pytest.raises(RetryableError, match="no space left to write"):
        build_cache(tiny_disk / "key", plan_cache(source.files, FULL), FULL)
    assert not list(tiny_disk.iterdir())


@pytest.mark.parametrize(("digest", "reason"), [("00" * 32, ".*split"), (None, "cannot be decoded")])
def test_changed_or_truncated_file_is_named_and_no_cache_is_left(tmp_path, digest, reason):
    path = tmp_path / "images" / "1.png"
    noise(path, np.random.default_rng(0), 20)
    path.write_bytes(path.read_bytes()[:-40])
    files = make_image_files(open_store(path.parent), [path.name], [digest or digest_of(path)])
    with pytest.raises(DataError, match=rf"1\.png {reason}"):
        get_or_build(tmp_path / "caches", files, FULL, 1.0)
    assert not list((tmp_path / "caches").glob("[!.]*"))
