"""Toy data for tests of stages: tiny networks, generated images, small tables, and stages run on a run's folder."""

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fivefold.config.schema import Data
from fivefold.data.readers import training_rows
from fivefold.data.readers.stores import open_store
from jobs.__main__ import run

REPOSITORY = Path(__file__).parents[1]
PICTURE = b"P6 2 2 255 " + bytes(12)
"""An image of 2 x 2 pixels (PPM); Pillow recognises it whatever its file name."""
CLASSES = ("fold", "id", "<b>빨강 차")
"""Class names of the toy run, chosen to break careless tables and HTML pages."""
MODEL = [
    "model.backbone=fivefold/small_net",
    'model.backbone_kwargs={"widths": [8, 16], "stem": 8}',
    "model.image_size=12",
]
SETTINGS = [*MODEL, "train.epochs=1", "train.batch_size=8", "train.precision=fp32", "train.loggers=[]"]
"""A network that trains in a moment."""
LEARNS = [
    *MODEL, "train.epochs=3", "train.batch_size=16", "train.lr=0.02", "train.ema_decay=0.9", "train.precision=fp32",
    'augment.train=["random_crop", "horizontal_flip"]', "augment.batch_mix=cutmix", "predict.tta=plain,flip", "train.loggers=[]",
]  # fmt: skip
"""A network that learns the toy images."""
LEARNS_PRODUCTS = [
    *LEARNS, "model.image_size=16", "train.epochs=4", "train.ema_decay=0", "augment.train=horizontal_flip", "augment.batch_mix=none",
    "train.device=cpu",
]  # fmt: skip
"""A network that learns the drawn products."""
RESUMES = [
    "FOLD=0", *MODEL, "model.dropout=0.3", "train.epochs=4", "train.batch_size=8", "train.lr=0.02", "train.ema_decay=0.9",
    "train.precision=fp32", "train.checkpoint_steps=2", "augment.batch_mix=cutmix",
]  # fmt: skip
"""Training of a fold that is long enough to be interrupted."""


def draw(path: Path, random: np.random.Generator, channel=None, by: int = 100, size=(12, 12)) -> None:
    """Write an image of random pixels; make one channel (or a slice of them) brighter by `by`."""
    pixels = random.integers(0, 120, (*size, 3))
    if channel is not None:
        pixels[..., channel] += by
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def noise(path: Path, random: np.random.Generator, size: int = 12) -> None:
    """Write an image of random pixels; no two images are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


def noise_in(folder: Path, names: Sequence[str], count: int, seed: int = 0) -> None:
    """Write `count` images of random pixels to each of the named folders below `folder`: 0.png, 1.png, …"""
    random = np.random.default_rng(seed)
    for name in names:
        for number in range(count):
            draw(folder / name / f"{number}.png", random)


def tinted_in(folder: Path, names: Sequence[str], count: int, by: int) -> None:
    """Write `count` images to each of at most three folders; each folder has another brighter channel."""
    random = np.random.default_rng(0)
    for channel, name in enumerate(names):
        for number in range(count):
            draw(folder / name / f"{number}.png", random, channel, by)


def write_test_table(folder: Path, count: int, truth: bool = False) -> None:
    """Write a `test.csv` of the images 0.png, 1.png, … in `images`, and a `gt.csv` with the classes a and b in turn."""
    write_csv(folder / "test.csv", [["ID", "img_path"], *([n, f"images/{n}.png"] for n in range(count))])
    if truth:
        write_csv(folder / "gt.csv", [["ID", "label"], *([n, "ab"[n % 2]] for n in range(count))])


def write_data(root: Path, *names: str, **tables: str) -> Path:
    """Make a folder with the same tiny image at each name; `train="..."` becomes train.csv."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE)
    for name, text in tables.items():
        (root / f"{name}.csv").write_text(text, encoding="utf-8", newline="")
    return root


def load_rows(root: Path, check_files: bool = True, **options: object) -> training_rows.LabelledImages:
    """Read the training rows of a folder or zip; `options` are settings of `data`."""
    return training_rows.read_rows(open_store(root), Data(**options), check_files)


def zip_folder(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Pack a folder as a zip beside it that also has an entry for each subfolder."""
    path = folder.parent / f"{folder.name}.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def write_csv(path: Path, rows: Iterable[Iterable[object]], encoding: str = "utf-8-sig") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def read_cells(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table without a byte-order mark."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def variables(root: Path, step: str | Path, **channels: object) -> dict[str, str]:
    """Return the contract's variables for a step of the run in `root`; `step` may be a folder elsewhere.

    A channel overrides the run's own, `None` removes it, and names with SM_ are used as they are.
    """
    defaults = {
        "TRAIN": root / "train", "EVAL": root / "eval" if (root / "eval").exists() else None, "FOLDS": root / "split" / "output",
        "SM_MODEL_DIR": root / step / "model", "SM_OUTPUT_DATA_DIR": root / step / "output", "SM_OUTPUT_DIR": root / step,
    }  # fmt: skip
    return {
        name if name.startswith("SM_") else f"SM_CHANNEL_{name}": str(value)
        for name, value in {**defaults, **channels}.items()
        if value is not None
    }


def run_stage(root: Path, name: str, step: str | Path, *arguments: str, **channels: object) -> int:
    """Run a stage in this process, as its container would on the run in `root`; return the exit code."""
    return run(name, arguments, variables(root, step, **channels))


def failure(folder: Path) -> str:
    """Return what a platform shows of a failed stage: the first 1024 characters of its failure file."""
    return (folder / "failure").read_text(encoding="utf-8")[:1024]


def environment(**more: object) -> dict[str, str]:
    """Return the variables for a process that inherits only PATH and OMP_NUM_THREADS."""
    inherited = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    return {**inherited, "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}", **{key: str(v) for key, v in more.items()}}


def call_jobs(*arguments: object, folder: Path = REPOSITORY, **more: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs …` as a process with only these variables; a warning is an error."""
    command = [sys.executable, "-W", "error", "-m", "jobs", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=240, check=False
    )


def copy_run(root: Path, folder: Path, *left_out: str) -> Path:
    """Copy a run's folder for a test that changes it."""
    return Path(shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*left_out), symlinks=True))


def draw_toy_images(root: Path) -> Path:
    """Draw images of three classes and a test set; one in ten images per class looks like the next class."""
    random = np.random.default_rng(0)
    for code, name in enumerate(CLASSES):
        for number in range(30):
            draw(root / "train" / name / f"{number}.png", random, (code + (number % 10 == 9)) % 3)
        for number in range(6):
            draw(root / "eval" / "test" / f"T{code}{number}.png", random, (code + (number == 5)) % 3)
    names = sorted(path.stem for path in (root / "eval" / "test").iterdir())
    write_csv(root / "eval" / "test.csv", [["ID", "img_path"], *([name, f"test/{name}.png"] for name in names)])
    write_csv(root / "gt.csv", [["ID", "label"], *([name, CLASSES[int(name[1])]] for name in names)])
    sample = [["ID", *reversed(CLASSES)], *([name, 0, 0, 0] for name in reversed(names))]
    write_csv(root / "eval" / "sample_submission.csv", sample)
    return root


def make_toy_run(root: Path, settings: Sequence[str] = LEARNS) -> Path:
    """Make a split, three folds, their ensemble, a student and its ensemble from the toy images in `root`."""
    assert run_stage(root, "split", "split", "split.folds=3", "split.holdout=0.1") == 0
    for fold in range(3):
        assert run_stage(root, "train-fold", f"fold-{fold}", f"FOLD={fold}", *settings) == 0
    assert run_stage(root, "ensemble", "ensemble", MODEL=root) == 0
    assert run_stage(root, "distill", "distill", *settings, MODEL=root) == 0
    assert run_stage(root, "ensemble", "ensemble-student", MODEL=root / "distill" / "model") == 0
    return root


def make_product_run(products: Path, root: Path) -> Path:
    """Make a split of products, two folds, their ensemble's predictions for all images, and a student."""
    (root / "train").symlink_to(products)
    (root / "eval").symlink_to(products / "사진")
    assert run_stage(root, "split", "split", "data.layout=products", "split.folds=2", "split.holdout=0.5") == 0
    for fold in range(2):
        assert run_stage(root, "train-fold", f"fold-{fold}", f"FOLD={fold}", *LEARNS_PRODUCTS) == 0
    assert run_stage(root, "ensemble", "ensemble", MODEL=root) == 0
    assert run_stage(root, "distill", "distill", *LEARNS_PRODUCTS, MODEL=root) == 0
    return root
