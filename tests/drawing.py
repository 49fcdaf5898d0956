"""Small drawn images and tables for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PICTURE = b"P6 2 2 255 " + bytes(12)
"""An image of 2 x 2 pixels (PPM), which Pillow knows whatever its name."""


def noise(path: Path, random: np.random.Generator, size: int = 12) -> None:
    """An image of random pixels, of which no two are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


def noise_in(folder: Path, names: Sequence[str], count: int, seed: int = 0) -> None:
    """`count` images in each of the folders below `folder`: 0.png, 1.png, …"""
    random = np.random.default_rng(seed)
    for name in names:
        for number in range(count):
            noise(folder / name / f"{number}.png", random)


def tinted_in(folder: Path, names: Sequence[str], count: int, by: int) -> None:
    """`count` images in each of at most three folders, random but for one colour of its own, which is `by` brighter."""
    random = np.random.default_rng(0)
    for colour, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 120, (12, 12, 3))
            pixels[..., colour] += by
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


def write_test_table(folder: Path, count: int) -> None:
    """A `test.csv` of the images 0.png, 1.png, … in `images`."""
    rows = "".join(f"{n},images/{n}.png\n" for n in range(count))
    (folder / "test.csv").write_text(f"ID,img_path\n{rows}")


def write_data(root: Path, *names: str, **tables: str) -> Path:
    """A folder with the same tiny picture at each name, and `train="..."` as train.csv."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE)
    for name, text in tables.items():
        (root / f"{name}.csv").write_text(text, encoding="utf-8", newline="")
    return root
