"""The image cache: the same pixels as the files', one builder, and nothing that looks finished and is not."""

import hashlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
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
from permissions import let_others_in
from toy_data import noise

GIB = 2**30
KINDS = [DecodeOptions(), DecodeOptions(24), DecodeOptions(24, scaled=True)]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw_odd(folder: Path) -> None:
    """An image of each kind that decoding treats in its own way, with shorter sides above and below 24 pixels."""
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
def odd(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("odd") / "images"
    draw_odd(folder)
    store = open_store(folder)
    names = np.array(store.names(), object)
    return Source(store, names, np.array([digest_of(folder / name) for name in names], object))


def cache_of(source: Source, folder: Path, pixels: DecodeOptions = KINDS[0]) -> Cache:
    return open_or_build(
        folder / cache_name(list(source.sha256), pixels), lambda: plan_cache(source.files, pixels), pixels, 1.0
    )


@pytest.mark.parametrize("pixels", KINDS, ids=lambda pixels: pixels.description)
def test_every_kind_of_image_has_the_same_pixels_as_its_file(
    odd: Source, tmp_path: Path, pixels: DecodeOptions
) -> None:
    cache = cache_of(odd, tmp_path, pixels)
    cache.verify()
    assert len(cache) == len(odd.paths) - 1, "equal files lie there once"
    for name, at in zip(odd.paths, cache.find(odd.sha256), strict=True):
        expected = pixels.decode(odd.store.read(name), name)
        assert np.array_equal(cache.image(at), expected), name
        assert cache.image(at).ctypes.data % 64 == 0
        assert not cache.image(at).flags.writeable
    assert cache.bytes == (cache.folder / PIXELS_FILE).stat().st_size
    assert pixels.scaled or cache.bytes == pixel_bytes(plan_cache(odd.files, pixels)), (
        "what is estimated is what is written"
    )
    assert cache.find(["00" * 32, None, "ff" * 32]).tolist() == [-1, -1, -1]
    assert pickle.loads(pickle.dumps(cache)).image(3).tobytes() == cache.image(3).tobytes()


def test_the_key_is_of_files_and_pixels_not_of_names_and_order(odd: Source) -> None:
    digests = list(odd.sha256)
    assert cache_name(digests, DecodeOptions()) == cache_name([*digests[::-1], digests[0]], DecodeOptions())
    others = [cache_name(digests[1:], DecodeOptions()), *(cache_name(digests, pixels) for pixels in KINDS)]
    assert len(set(others)) == 4


def batches_of(images: ImageDataset, workers: int = 0) -> bytes:
    found = load_batches(images, shuffled_batches(len(images), 4, 5, 1), workers)
    return b"".join(batch.images.contiguous().numpy().tobytes() + batch.rows.numpy().tobytes() for batch in found)


@pytest.mark.parametrize("pixels", KINDS[:2], ids=lambda pixels: pixels.description)
def test_the_same_batches_from_files_memory_and_cache_with_any_number_of_workers(
    odd: Source, tmp_path: Path, pixels: DecodeOptions
) -> None:
    transform = build_transforms(["random_resized_crop", "horizontal_flip"], (16, 16))

    def images(store: object, digests: object = odd.sha256) -> ImageDataset:
        return ImageDataset(store, odd.paths, transform, 5, digests, ["aspect", "color_mean"], pixels)

    plain, kept = images(odd.store), images(odd.store)
    held = replace(odd.store, caches=[cache_of(odd, tmp_path, pixels)])
    assert kept.cache_in_memory()
    expected = batches_of(plain)
    assert batches_of(kept) == expected
    cached, undigested = images(held), images(held, None)
    assert (cached.count_cached(), undigested.count_cached()) == (len(odd.paths), 0)
    for found in (cached, undigested, pickle.loads(pickle.dumps(cached))):
        for workers in (0, 1, 2):
            assert batches_of(found, workers) == expected
    assert cached.cache_in_memory()
    assert cached.kept is None, "what is mapped need not be kept"
    assert cached.compute_image_stats().tobytes() == plain.compute_image_stats().tobytes()


def test_a_cached_row_opens_no_file_and_others_are_read_from_theirs(odd: Source, tmp_path: Path) -> None:
    some = Source(odd.store, odd.paths[:5], odd.sha256[:5])
    empty = tmp_path / "empty"
    empty.mkdir()
    cache = cache_of(some, tmp_path / "caches")
    transform = build_transforms(["resize"], (8, 8))
    images = ImageDataset(replace(open_store(empty), caches=[cache]), odd.paths, transform, 0, odd.sha256)
    assert images.count_cached() == 5
    assert images.image(4).shape[2] == 3
    with pytest.raises(DataError, match="cannot be read"):
        images.image(6)
    whole = ImageDataset(replace(odd.store, caches=[cache]), odd.paths, transform, 0, odd.sha256)
    assert np.array_equal(whole.image(6), decode(odd.store.read(odd.paths[6]), "6"))
    assert (
        ImageDataset(whole.store, odd.paths, transform, 0, odd.sha256, decode_options=DecodeOptions(24)).count_cached()
        == 0
    )


def edited(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / HEADER_FILE).write_text(
        json.dumps(json.loads((folder / HEADER_FILE).read_text()) | values)
    )


def point_out_of_the_file(folder: Path) -> None:
    index = np.load(folder / INDEX_FILE)
    assert index.dtype == INDEX_DTYPE
    index["offset"][-1] = 2**40
    np.save(folder / INDEX_FILE, index)
    edited(index_sha256=digest_of(folder / INDEX_FILE))(folder)


def garbage(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"\xff\x00garbage")


def cut_off(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-64])


SPOILT = {
    "head garbage": (garbage(HEADER_FILE), "is not JSON"),
    "head a list": (lambda folder: (folder / HEADER_FILE).write_text("[1]"), "does not describe an image cache"),
    "head of another type": (edited(resize_shorter_side="24"), "does not describe an image cache"),
    "format": (edited(format=99), "format 99"),
    "size": (edited(bytes=2**30), "has [0-9,]+ bytes"),
    "pixels cut off": (cut_off(PIXELS_FILE), "has [0-9,]+ bytes"),
    "pixels gone": (lambda folder: (folder / PIXELS_FILE).unlink(), "has 0 bytes"),
    "index cut off": (cut_off(INDEX_FILE), r"index\.npy .*cache\.json"),
    "index garbage": (garbage(INDEX_FILE), r"index\.npy .*cache\.json"),
    "index gone": (lambda folder: (folder / INDEX_FILE).unlink(), r"index\.npy .*cache\.json"),
    "index out of the file": (point_out_of_the_file, r"index\.npy .*cache\.json"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_cache_is_refused_and_on_first_use_made_anew(
    odd: Source, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, message = SPOILT[fault]
    with pytest.raises(MissingInputError):
        Cache(tmp_path)
    cache = cache_of(odd, tmp_path)
    whole = (cache.folder / PIXELS_FILE).read_bytes()
    spoil(cache.folder)
    with pytest.raises(DataError, match=message):
        Cache(cache.folder)
    found = get_or_build(tmp_path, odd.files, DecodeOptions(), 1.0)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert found is not None
    assert (found.folder / PIXELS_FILE).read_bytes() == whole


def test_one_that_is_too_large_is_an_error_that_says_what_helps(odd: Source, tmp_path: Path) -> None:
    images = plan_cache(odd.files, DecodeOptions())
    with pytest.raises(SettingsError, match=r"16 decoded images take .*data\.resize_shorter_side"):
        check_cache_space(tmp_path, len(images), pixel_bytes(images), 1e-5)
    assert get_or_build(tmp_path / "caches", odd.files, DecodeOptions(), 1e-5) is None
    assert not list((tmp_path / "caches").glob("[!.]*"))
    (tmp_path / "file").write_text("")
    assert get_or_build(tmp_path / "file" / "caches", odd.files, DecodeOptions(), 1.0) is None, (
        "nothing can be written there"
    )


def test_of_many_images_a_few_say_that_they_are_far_too_many(tmp_path: Path) -> None:
    random, names = np.random.default_rng(0), [f"{number}.bmp" for number in range(1100)]
    for name in names:
        noise(tmp_path / "images" / name, random, 8)
    source = Source(open_store(tmp_path / "images"), names, [digest_of(tmp_path / "images" / name) for name in names])
    size = pixel_bytes(plan_cache(source.files, DecodeOptions()))
    assert size == 1100 * 192
    for share in (2, 1.01, 0.99):
        check_sample(tmp_path, source.files, DecodeOptions(), share * size / GIB)
    with pytest.raises(SettingsError, match=r"1100 decoded images take 0\.2 MiB, .*data\.cache_gib="):
        check_sample(tmp_path, source.files, DecodeOptions(), 0.5 * size / GIB)
    counted = CountingStore(tmp_path / "images")
    assert (
        get_or_build(
            tmp_path / "caches", make_image_files(counted, names, source.sha256), DecodeOptions(), 0.5 * size / GIB
        )
        is None
    )
    assert counted.reads.total() < 300, "not all files were read"


def test_a_disk_that_is_too_small_is_said_before_anything_is_decoded(
    odd: Source, tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = plan_cache(odd.files, DecodeOptions())
    with pytest.raises(RetryableError, match="MiB free for them: free some"):
        open_or_build(tiny_disk / "key", lambda: images, DecodeOptions(), 1.0)
    assert get_or_build(tiny_disk, odd.files, DecodeOptions(), 1.0) is None
    assert "images are read from their files" in caplog.text
    assert not list(tiny_disk.glob("[!.]*"))
    assert not list(tiny_disk.glob(".*.tmp"))


def test_a_disk_that_fills_while_images_are_written_is_75_and_nothing_is_left(odd: Source, tiny_disk: Path) -> None:
    with pytest.raises(RetryableError, match=r"no space left to write .*free some, then run the same command again"):
        build_cache(tiny_disk / "key", plan_cache(odd.files, DecodeOptions()), DecodeOptions())
    assert not list(tiny_disk.iterdir())


PROGRAM = """
import hashlib, os, sys
from pathlib import Path
from fivefold.data.pipeline.image_cache import get_or_build, make_image_files
from fivefold.data.image_io import DecodeOptions
from fivefold.data.readers.stores import open_store
images, caches, user, *digests = sys.argv[1:]
if user != "0":
    os.setgroups([]); os.setgid(int(user)); os.setuid(int(user))
store = open_store(Path(images))
cache = get_or_build(Path(caches), make_image_files(store, store.names()[:len(digests)], digests), DecodeOptions(), 1.0)
pixels = [] if cache is None else [cache.image(number).tobytes() for number in range(len(cache))]
print(cache and cache.folder.stat().st_ino, hashlib.sha256(b"".join(pixels)).hexdigest())
"""
"""Makes or opens the cache as a user; prints its folder's inode and the digest of all its pixels."""


def command_of(images: Path, caches: Path, digests: list[str], user: int = 0) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(images), str(caches), str(user), *digests]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_may_read_a_cache_and_goes_without_where_it_could_not_make_one(
    odd: Source, tmp_path: Path
) -> None:
    cache = cache_of(odd, tmp_path / "caches")
    let_others_in(tmp_path / "caches", odd.store.root)

    def cached_as(user: int, digests: list[str]) -> tuple[str, str]:
        command = command_of(odd.store.root, tmp_path / "caches", digests, user)
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        return ended.stdout, ended.stderr

    opened, warnings = cached_as(65534, list(odd.sha256))
    assert opened.startswith(f"{cache.folder.stat().st_ino} ")
    assert (opened, warnings) == cached_as(0, list(odd.sha256))
    refused, warnings = cached_as(65534, list(odd.sha256[:2]))
    assert refused.startswith("None ")
    assert "Permission denied" in warnings


def test_a_finished_cache_is_used_where_nothing_can_be_written(odd: Source, tmp_path: Path) -> None:
    cache = cache_of(odd, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = get_or_build(tmp_path, odd.files, DecodeOptions(), 1e-9)
    assert found is not None
    assert found.folder == cache.folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("digest", "reason"), [("00" * 32, ".*split"), (None, "cannot be decoded")])
def test_a_file_that_changed_or_breaks_off_is_named_and_nothing_is_left(
    tmp_path: Path, digest: str | None, reason: str
) -> None:
    images, caches = tmp_path / "images", tmp_path / "caches"
    draw_odd(images)
    (images / "grey.jpg").write_bytes((images / "grey.jpg").read_bytes()[:-40])
    digests = [digest or digest_of(images / "grey.jpg"), digest_of(images / "cmyk.jpg")]
    with pytest.raises(DataError, match=rf"grey\.jpg {reason}"):
        get_or_build(
            caches, make_image_files(open_store(images), ["grey.jpg", "cmyk.jpg"], digests), DecodeOptions(), 1.0
        )
    assert [path.name for path in caches.iterdir() if not path.name.endswith(".lock")] == []


def test_of_several_processes_at_once_one_builds_and_all_have_the_same(odd: Source, tmp_path: Path) -> None:
    command = command_of(odd.store.root, tmp_path, list(odd.sha256))
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    assert len({process.communicate(timeout=60)[0] for process in processes}) == 1
    assert len(list(tmp_path.glob("[!.]*"))) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_who_comes_second_says_that_it_waits_and_takes_what_the_first_made(
    odd: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / cache_name(list(odd.sha256), DecodeOptions())
    with ThreadPoolExecutor(1) as pool:
        with build_lock(path):
            second = pool.submit(get_or_build, tmp_path, odd.files, DecodeOptions(), 1.0)
            deadline = time.monotonic() + 30
            while "waiting for it" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            first = build_cache(path, plan_cache(odd.files, DecodeOptions()), DecodeOptions())
            assert not second.done()
        assert second.result(30).folder == first.folder
    assert "decoded once" not in caplog.text, "the second made nothing"


@pytest.mark.slow
def test_a_build_that_is_killed_leaves_nothing_that_looks_finished_and_the_next_clears_it(tmp_path: Path) -> None:
    images, caches = tmp_path / "images", tmp_path / "caches"
    random = np.random.default_rng(0)
    for number in range(60):
        noise(images / f"{number}.png", random, 400)
    command = command_of(images, caches, [digest_of(images / name) for name in open_store(images).names()])
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 10**6 for path in caches.glob(".*.tmp/pixels.u8")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(caches.glob(".*.tmp"))) == 1
    assert not list(caches.glob("[!.]*"))
    subprocess.run(command, check=True)
    assert not list(caches.glob(".*.tmp"))
    (folder,) = caches.glob("[!.]*")
    cache = Cache(folder)
    cache.verify()
    assert len(cache) == 60
