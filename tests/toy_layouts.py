"""Small generated images in the exact layouts of the five reference systems; every run writes the same bytes.

Each class has its own colour, so that a network can learn it. The rest is as in the original data: Korean
class names, tables with a byte-order mark, `&` between paths, a folder per person, hashed names.
"""

import csv
import hashlib
import shutil
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from fivefold.data.readers.profiles import GENDERS, STEMS, age_class, encode_label

COLOURS = ((210, 60, 60), (60, 190, 80), (70, 90, 220), (220, 200, 60))
CARS = ("1시리즈_F20_2013_2015", "디_올뉴니로_2022_2025", "아반떼_N_2022_2023", "K5_3세대_하이브리드_2020_2022")
SKETCHES = ("n01443537", "n01608432", "n02119789", "n03291819")
CUTS = (30, 60)


def draw_cars(root: Path) -> None:
    """open.zip: train/<class>/*.jpg (32 images), test/TEST_00000.jpg (8), test.csv, sample_submission.csv, gt.csv."""
    folder, names = root / "open", [f"TEST_{number:05d}" for number in range(8)]
    for code, name in enumerate(CARS):
        for number in range(8):
            shape = (48, 64) if number % 2 else (64, 56)
            write_image(folder / "train" / name / f"{name}_{number:04d}.jpg", COLOURS[code], shape)
    for number, name in enumerate(names):
        write_image(folder / "test" / f"{name}.jpg", COLOURS[number % 4], (48, 64))
    write_table(folder / "test.csv", ("ID", "img_path"), [(name, f"./test/{name}.jpg") for name in names])
    write_table(folder / "gt.csv", ("ID", "label"), [(name, CARS[number % 4]) for number, name in enumerate(names)])
    columns = sorted(CARS)
    write_table(folder / "sample_submission.csv", ("ID", *columns), [(name, *[0] * len(columns)) for name in names])
    shutil.make_archive(str(folder), "zip", folder)


def draw_sketches(root: Path) -> None:
    """data/: train.csv (class_name,image_path,target) and train/<synset>/sketch_0.JPEG (32); test.csv and test/0.JPEG (8); gt.csv."""
    root, rows = root / "data", []
    for code, name in enumerate(SKETCHES):
        for number in range(8):
            path = f"{name}/sketch_{number}.JPEG"
            write_image(root / "train" / path, COLOURS[code], (72, 64), paper=255)
            rows.append((name, path, code))
    write_table(root / "train.csv", ("class_name", "image_path", "target"), rows)
    for number in range(8):
        write_image(root / "test" / f"{number}.JPEG", COLOURS[number % 4], (72, 64), paper=255)
    write_table(root / "test.csv", ("image_path",), [(f"{number}.JPEG",) for number in range(8)])
    write_table(root / "gt.csv", ("image_path", "target"), [(f"{number}.JPEG", number % 4) for number in range(8)])


def draw_products(root: Path) -> None:
    """image_data.csv of 20 products with their images; batch.csv of six images, one of which is unreadable."""
    columns = {"main_image": 0, "back_image": 0, "text_tag_image": 1, "neck_tag_image": 2, "other": 3}
    rows = []
    for number in range(20):
        cells = []
        for column, code in columns.items():
            paths = [f"사진/P{number:03d}/{column}_{n}.jpg" for n in range(2 if column == "other" else 1)]
            for path in paths:
                write_image(root / "data" / path, COLOURS[code], (60, 50))
            cells.append(("&" if number % 2 else ",").join(paths))
        rows.append((f"P{number:03d}", "상의" if number % 2 else "하의", *cells))
    write_table(root / "data" / "image_data.csv", ("id", "category_name", *columns), rows)
    batch = [(f"data/사진/P{number:03d}/main_image_0.jpg", "full_shot") for number in range(5)]
    (root / "broken.jpg").write_bytes(b"no image")
    write_table(root / "batch.csv", ("image_path", "true_class"), [*batch, ("broken.jpg", "full_shot")])


def draw_faces(root: Path) -> None:
    """train/images/<id>_<gender>_<race>_<age>/ of 12 people; eval/images/<sha>.jpg (18) with info.csv; truth/gt.csv."""
    for number, (gender, age, _) in enumerate(product(GENDERS, (22, 45, 60), range(2))):
        folder = root / "train" / "images" / f"{number:06d}_{gender}_Asian_{age}"
        for stem, mask in STEMS.items():
            write_image(folder / f"{stem}.jpg", face_colour(mask, gender, age), (64, 48))
        (folder / "._mask1.jpg").write_bytes(b"\0")
    rows = []
    for mask, gender, age in product(range(3), GENDERS, (25, 40, 65)):
        name = f"{hashlib.sha1(f'{mask} {gender} {age}'.encode()).hexdigest()}.jpg"
        write_image(root / "eval" / "images" / name, face_colour(mask, gender, age), (64, 48))
        rows.append((name, encode_label(mask, GENDERS.index(gender), age_class(age, CUTS))))
    write_table(root / "eval" / "info.csv", ("ImageID", "ans"), [(name, 0) for name, _ in sorted(rows)], bom=False)
    write_table(root / "truth" / "gt.csv", ("ImageID", "ans"), sorted(rows), bom=False)


def face_colour(mask: int, gender: str, age: int) -> tuple[int, int, int]:
    """Return a colour whose red encodes the mask, green the gender and blue the age."""
    return 40 + 90 * mask, 60 + 140 * GENDERS.index(gender), 40 + 90 * age_class(age, CUTS)


def write_image(path: Path, colour: Sequence[int], shape: tuple[int, int], paper: int = 128) -> None:
    """Write a JPEG of `shape` (height, width): a block of the colour on paper, with noise seeded by its path."""
    random = np.random.default_rng(list("/".join(path.parts[-2:]).encode()))
    pixels = np.full((*shape, 3), float(paper))
    top, left = random.integers(2, shape[0] // 4), random.integers(2, shape[1] // 4)
    pixels[top : top + shape[0] // 2, left : left + shape[1] // 2] = colour
    pixels += random.normal(0, 20, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], bom: bool = True) -> None:
    """Write a CSV, with a byte-order mark if `bom` is true."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
