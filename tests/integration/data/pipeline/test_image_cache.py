"""Processes that share an image cache: concurrent builds, killed builds and other users."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fivefold.data.image_io import DecodeOptions
from fivefold.data.pipeline.image_cache import Cache, get_or_build, make_image_files
from fivefold.data.readers.stores import open_store
from permissions import let_others_in
from toy_data import noise

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
for count in (len(digests), 2):
    files = make_image_files(store, store.names()[:count], digests[:count])
    cache = get_or_build(Path(caches), files, DecodeOptions(), 1.0)
    pixels = [] if cache is None else [cache.image(number).tobytes() for number in range(len(cache))]
    print(cache and cache.folder.stat().st_ino, hashlib.sha256(b"".join(pixels)).hexdigest(), flush=True)
"""
"""Opens or builds the caches of all and of the first two images as a user; prints each folder's inode and pixel digest."""


def draw_images(folder: Path, count: int, size: int) -> list[str]:
    """Draw images and return the digests of their files, in the order of their names."""
    for number in range(count):
        noise(folder / f"{number}.png", np.random.default_rng(number), size)
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in open_store(folder).names()]


def start(images: Path, caches: Path, digests: list[str], user: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, images, caches, str(user), *digests]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_clean_up_after_a_killed_build_and_share_the_next_one(tmp_path: Path) -> None:
    images, caches = tmp_path / "images", tmp_path / "caches"
    digests = draw_images(images, 30, 400)
    process = start(images, caches, digests)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 10**6 for path in caches.glob(".*.tmp/pixels.u8")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the build ended before the test could kill it"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(caches.glob(".*.tmp"))) == 1
    assert not list(caches.glob("[!.]*"))

    processes = [start(images, caches, digests) for _ in range(2)]
    assert len({process.communicate(timeout=60)[0] for process in processes}) == 1
    assert not list(caches.glob(".*.tmp"))
    built = [Cache(folder) for folder in caches.glob("[!.]*")]
    assert sorted(map(len, built)) == [2, 30]
    for cache in built:
        cache.verify()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_read_a_cache_and_continues_if_it_cannot_build_one(tmp_path: Path) -> None:
    images, caches = tmp_path / "images", tmp_path / "caches"
    digests = draw_images(images, 3, 20)
    store = open_store(images)
    cache = get_or_build(caches, make_image_files(store, store.names(), digests), DecodeOptions(), 1.0)
    let_others_in(caches, images)
    output, warnings = start(images, caches, digests, user=65534).communicate(timeout=60)
    opened, refused = output.splitlines()
    pixels = b"".join(cache.image(number).tobytes() for number in range(3))
    assert opened == f"{cache.folder.stat().st_ino} {hashlib.sha256(pixels).hexdigest()}"
    assert refused.startswith("None ")
    assert "Permission denied" in warnings
