"""Fixtures shared by tests in several folders. Slow imports are inside them: the controller of pytest-xdist needs none of them."""

import fcntl
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from s3_server import Bucket, run_server


@pytest.fixture(autouse=True)
def reset_log() -> Iterator[None]:
    """Undo what stages that run in this process change: the level as a rank other than 0, and a handler on a captured stream."""
    yield
    logging.getLogger("fivefold").setLevel(logging.NOTSET)
    for handler in list(logging.getLogger().handlers):
        if type(handler) is logging.StreamHandler:  # pytest's are of derived classes
            logging.getLogger().removeHandler(handler)


def mount_disk(size: str, folder: Path) -> Iterator[Path]:
    """Mount an in-memory file system of this size; skip the test if none can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    yield from mount_disk("64k", tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    yield from mount_disk("8m", tmp_path)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The endpoint of a real server for S3's protocol; all tests of a process share it."""
    with run_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """An empty bucket for this test, with its credentials in the environment."""
    test_bucket = Bucket.create(s3_endpoint, request.node.nodeid)
    for name, value in test_bucket.environ().items():
        monkeypatch.setenv(name, value)
    return test_bucket


@dataclass(frozen=True)
class DrawnProducts:
    """A folder with `image_data.csv` and its images, and the category of each product id."""

    root: Path
    category: dict[str, str]


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> DrawnProducts:
    """Forty drawn products with a varying number of images per cell, in Korean categories of unequal size; read-only."""
    import numpy as np
    from PIL import Image

    root, random = tmp_path_factory.mktemp("products"), np.random.default_rng(0)
    bright = {"main": 0, "back": 0, "tag": 1, "neck": 2, "etc": None}
    category = {f"P{n:03d}": "상의" if n % 10 < 7 else "하의" if n % 10 < 9 else "가방" for n in range(40)}
    lines = ["id,category_name,main_image,back_image,text_tag_image,neck_tag_image,other"]
    for number, (product, name) in enumerate(category.items()):
        cells = []
        for column, channel in bright.items():
            count = 1 if column == "main" else (number + len(cells)) % 3
            images = [f"사진/{product}/{column}_{n}.png" for n in range(count)]
            for image in images:
                pixels = random.integers(0, 100, (16, 16, 3))
                pixels[..., slice(None) if channel is None else channel] += 150
                (root / image).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(root / image)
            cells.append(("&" if number % 2 else ", ").join(images))
        lines.append(",".join([product, name, *(f'"{cell}"' for cell in cells)]))
    (root / "image_data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return DrawnProducts(root, category)


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first process of pytest-xdist makes; the other ones wait for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".done").exists():
            folder.mkdir()
            make(folder)
            folder.with_suffix(".done").touch()
    return folder


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy images with all its steps; read-only: a test that changes it uses `copy_run`."""
    from toy_data import draw_toy_images, make_toy_run

    return make_once(tmp_path_factory, "toy-run", lambda root: make_toy_run(draw_toy_images(root)))


@pytest.fixture(scope="session")
def product_run(products: DrawnProducts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the drawn products; read-only."""
    from toy_data import make_product_run

    return make_once(tmp_path_factory, "product-run", lambda root: make_product_run(products.root, root))
