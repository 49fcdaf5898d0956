"""The image cache: pixels equal to the files', a single builder, and no unfinished cache that looks finished."""

import hashlib
import json
import logging
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counting_store import CountingStore
from fivefold.data.image_io import DecodeOptions, decode
from fivefold.data.pipeline import image_cache
from fivefold.data.pipeline.dataset import ImageDataset, load_batches, shuffled_batches
from fivefold.data.pipeline.image_cache import (
    HEADER_FILE,
    INDEX_DTYPE,
    INDEX_FILE,
    PIXELS_FILE,
    Cache,
    ImageFile,
    build_cache,
    build_lock,
    cache_name,
    check_cache_space,
    check_sample,
    get_or_build,
    make_image_files,
    open_or_build,
    pixel_bytes,
    plan_cache,
)
from fivefold.data.readers.stores import FolderStore, open_store
from fivefold.data.transforms.registry import build_transforms
from fivefold.errors import DataError, MissingInputError, RetryableError, SettingsError
from toy_data import noise

GIB = 2**30
KINDS = [DecodeOptions(), DecodeOptions(24), DecodeOptions(24, scaled=True)]


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
    store: FolderStore
    paths: np.ndarray
    sha256: np.ndarray

    @property
    def files(self) -> list[ImageFile]:
        return make_image_files(self.store, self.paths, self.sha256)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("odd") / "images"
    draw_images(folder)
    store = open_store(folder)
    names = np.array(store.names(), object)
    return Source(store, names, np.array([digest_of(folder / name) for name in names], object))


def make_cache(source: Source, folder: Path, pixels: DecodeOptions = KINDS[0]) -> Cache:
    return open_or_build(
        folder / cache_name(list(source.sha256), pixels), lambda: plan_cache(source.files, pixels), pixels, 1.0
    )


@pytest.mark.parametrize("pixels", KINDS, ids=lambda pixels: pixels.description)
def test_cached_pixels_equal_the_decoded_file_for_every_kind_of_image(
    source: Source, tmp_path: Path, pixels: DecodeOptions
) -> None:
    cache = make_cache(source, tmp_path, pixels)
    cache.verify()
    assert len(cache) == len(source.paths) - 1, "equal files must be stored once"
    for name, index in zip(source.paths, cache.find(source.sha256), strict=True):
        expected = pixels.decode(source.store.read(name), name)
        assert np.array_equal(cache.image(index), expected), name
        assert cache.image(index).ctypes.data % 64 == 0
        assert not cache.image(index).flags.writeable
    assert cache.bytes == (cache.folder / PIXELS_FILE).stat().st_size
    assert pixels.scaled or cache.bytes == pixel_bytes(plan_cache(source.files, pixels)), (
        "the estimated size must equal the written size"
    )
    assert cache.find(["00" * 32, None, "ff" * 32]).tolist() == [-1, -1, -1]
    assert pickle.loads(pickle.dumps(cache)).image(3).tobytes() == cache.image(3).tobytes()


def test_cache_name_depends_on_contents_and_decoding_but_not_on_order(source: Source) -> None:
    digests = list(source.sha256)
    assert cache_name(digests, DecodeOptions()) == cache_name([*digests[::-1], digests[0]], DecodeOptions())
    others = [cache_name(digests[1:], DecodeOptions()), *(cache_name(digests, pixels) for pixels in KINDS)]
    assert len(set(others)) == 4


def load_bytes(images: ImageDataset, workers: int = 0) -> bytes:
    batches = load_batches(images, shuffled_batches(len(images), 4, 5, 1), workers)
    return b"".join(batch.images.contiguous().numpy().tobytes() + batch.rows.numpy().tobytes() for batch in batches)


def test_batches_are_equal_from_files_memory_and_cache_with_any_number_of_workers(
    source: Source, tmp_path: Path
) -> None:
    transform = build_transforms(["random_resized_crop", "horizontal_flip"], (16, 16))

    def make_dataset(store: object, digests: object = source.sha256) -> ImageDataset:
        return ImageDataset(store, source.paths, transform, 5, digests, ["aspect", "color_mean"], KINDS[1])

    plain, in_memory = make_dataset(source.store), make_dataset(source.store)
    cached_store = replace(source.store, caches=[make_cache(source, tmp_path, KINDS[1])])
    assert in_memory.cache_in_memory()
    expected = load_bytes(plain)
    assert load_bytes(plain, workers=1) == expected
    assert load_bytes(in_memory) == expected
    cached, undigested = make_dataset(cached_store), make_dataset(cached_store, None)
    assert (cached.count_cached(), undigested.count_cached()) == (len(source.paths), 0)
    for dataset, workers in ((cached, 0), (undigested, 0), (pickle.loads(pickle.dumps(cached)), 2)):
        assert load_bytes(dataset, workers) == expected
    assert cached.cache_in_memory()
    assert cached.kept is None, "memory-mapped images need no second copy in memory"
    assert cached.compute_image_stats().tobytes() == plain.compute_image_stats().tobytes()


def test_cached_rows_open_no_file_and_uncached_rows_are_read_from_files(source: Source, tmp_path: Path) -> None:
    first_five = Source(source.store, source.paths[:5], source.sha256[:5])
    empty = tmp_path / "empty"
    empty.mkdir()
    cache = make_cache(first_five, tmp_path / "caches")
    transform = build_transforms(["resize"], (8, 8))
    images = ImageDataset(replace(open_store(empty), caches=[cache]), source.paths, transform, 0, source.sha256)
    assert images.count_cached() == 5
    assert images.image(4).shape[2] == 3
    with pytest.raises(DataError, match="cannot be read"):
        images.image(6)
    partly_cached = ImageDataset(replace(source.store, caches=[cache]), source.paths, transform, 0, source.sha256)
    assert np.array_equal(partly_cached.image(6), decode(source.store.read(source.paths[6]), "6"))
    resized = partly_cached.store, source.paths, transform, 0, source.sha256, (), DecodeOptions(24)
    assert ImageDataset(*resized).count_cached() == 0


def edit_header(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / HEADER_FILE).write_text(
        json.dumps(json.loads((folder / HEADER_FILE).read_text()) | values)
    )


def set_offset_outside_file(folder: Path) -> None:
    index = np.load(folder / INDEX_FILE)
    assert index.dtype == INDEX_DTYPE
    index["offset"][-1] = 2**40
    np.save(folder / INDEX_FILE, index)
    edit_header(index_sha256=digest_of(folder / INDEX_FILE))(folder)


def write_garbage(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"\xff\x00garbage")


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-64])


CORRUPTIONS = {
    "garbage header": (write_garbage(HEADER_FILE), r"cache\.json is not JSON"),
    "header is a list": (lambda folder: (folder / HEADER_FILE).write_text("[1]"), r"cache\.json "),
    "header value of another type": (edit_header(resize_shorter_side="24"), "resize_shorter_side"),
    "format": (edit_header(format=99), "format"),
    "truncated pixels": (truncate(PIXELS_FILE), r"pixels\.u8 "),
    "missing pixels": (lambda folder: (folder / PIXELS_FILE).unlink(), r"pixels\.u8 "),
    "truncated index": (truncate(INDEX_FILE), r"index\.npy "),
    "missing index": (lambda folder: (folder / INDEX_FILE).unlink(), r"index\.npy "),
    "index outside the file": (set_offset_outside_file, r"index\.npy "),
}


@pytest.mark.parametrize("fault", CORRUPTIONS)
def test_corrupt_cache_is_rejected_and_rebuilt_on_first_use(
    source: Source, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt, message = CORRUPTIONS[fault]
    with pytest.raises(MissingInputError):
        Cache(tmp_path)
    cache = make_cache(source, tmp_path)
    original = (cache.folder / PIXELS_FILE).read_bytes()
    corrupt(cache.folder)
    with pytest.raises(DataError, match=message):
        Cache(cache.folder)
    rebuilt = get_or_build(tmp_path, source.files, DecodeOptions(), 1.0)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert rebuilt is not None
    assert (rebuilt.folder / PIXELS_FILE).read_bytes() == original


def test_oversized_cache_is_an_error_with_a_remedy(source: Source, tmp_path: Path) -> None:
    images = plan_cache(source.files, DecodeOptions())
    with pytest.raises(SettingsError, match=r"16 decoded images take .*data\.resize_shorter_side"):
        check_cache_space(tmp_path, len(images), pixel_bytes(images), 1e-5)
    assert get_or_build(tmp_path / "caches", source.files, DecodeOptions(), 1e-5) is None
    assert not list((tmp_path / "caches").glob("[!.]*"))
    (tmp_path / "file").write_text("")
    assert get_or_build(tmp_path / "file" / "caches", source.files, DecodeOptions(), 1.0) is None, (
        "the folder cannot be created"
    )


def test_a_sample_of_the_images_shows_that_the_cache_is_far_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "SURVEY_SAMPLE", 10)
    random, names = np.random.default_rng(0), [f"{number}.bmp" for number in range(50)]
    for name in names:
        noise(tmp_path / "images" / name, random, 8)
    small = Source(open_store(tmp_path / "images"), names, [digest_of(tmp_path / "images" / name) for name in names])
    size = pixel_bytes(plan_cache(small.files, DecodeOptions()))
    assert size == 50 * 192
    for share in (2, 1.01, 0.99):
        check_sample(tmp_path, small.files, DecodeOptions(), share * size / GIB)
    with pytest.raises(SettingsError, match=r"50 decoded images .*data\.cache_gib="):
        check_sample(tmp_path, small.files, DecodeOptions(), 0.5 * size / GIB)
    counted = CountingStore(tmp_path / "images")
    files = make_image_files(counted, names, small.sha256)
    assert get_or_build(tmp_path / "caches", files, DecodeOptions(), 0.5 * size / GIB) is None
    assert counted.reads.total() == 10, "not all files may be read"


def test_too_small_a_disk_is_reported_before_anything_is_decoded(
    source: Source, tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = plan_cache(source.files, DecodeOptions())
    with pytest.raises(RetryableError, match="MiB free for them: free some"):
        open_or_build(tiny_disk / "key", lambda: images, DecodeOptions(), 1.0)
    assert get_or_build(tiny_disk, source.files, DecodeOptions(), 1.0) is None
    assert "images are read from their files" in caplog.text
    assert not list(tiny_disk.glob("[!.]*"))
    assert not list(tiny_disk.glob(".*.tmp"))


def test_full_disk_during_a_build_is_retryable_and_leaves_nothing(source: Source, tiny_disk: Path) -> None:
    with pytest.raises(RetryableError, match=r"no space left to write .*free some, then run the same command again"):
        build_cache(tiny_disk / "key", plan_cache(source.files, DecodeOptions()), DecodeOptions())
    assert not list(tiny_disk.iterdir())


def test_finished_cache_is_used_without_writing_anything(source: Source, tmp_path: Path) -> None:
    cache = make_cache(source, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    opened = get_or_build(tmp_path, source.files, DecodeOptions(), 1e-9)
    assert opened is not None
    assert opened.folder == cache.folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("digest", "reason"), [("00" * 32, ".*split"), (None, "cannot be decoded")])
def test_changed_or_truncated_file_is_named_and_no_cache_is_left(
    tmp_path: Path, digest: str | None, reason: str
) -> None:
    images, caches = tmp_path / "images", tmp_path / "caches"
    draw_images(images)
    (images / "grey.jpg").write_bytes((images / "grey.jpg").read_bytes()[:-40])
    digests = [digest or digest_of(images / "grey.jpg"), digest_of(images / "cmyk.jpg")]
    with pytest.raises(DataError, match=rf"grey\.jpg {reason}"):
        get_or_build(
            caches, make_image_files(open_store(images), ["grey.jpg", "cmyk.jpg"], digests), DecodeOptions(), 1.0
        )
    assert [path.name for path in caches.iterdir() if not path.name.endswith(".lock")] == []


def test_second_process_logs_that_it_waits_and_uses_the_first_build(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / cache_name(list(source.sha256), DecodeOptions())
    with ThreadPoolExecutor(1) as pool:
        with build_lock(path):
            second = pool.submit(get_or_build, tmp_path, source.files, DecodeOptions(), 1.0)
            deadline = time.monotonic() + 30
            while "waiting for it" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            first = build_cache(path, plan_cache(source.files, DecodeOptions()), DecodeOptions())
            assert not second.done()
        assert second.result(30).folder == first.folder
    assert "decoded once" not in caplog.text, "the second process must not build"
