"""Every file that a stage reads, spoilt in every way: its exit code, one clear error, and nothing that looks finished.

The cells that end otherwise than by 65 stand in OTHERWISE, each with its reason.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from jobs.__main__ import run
from toy_data import SETTINGS, noise_in, variables, write_csv

STAGES: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "split": ("split", ["split.folds=2"], ("TRAIN",)),
    "split of a table": ("split", ["split.folds=2", "data.table=train.csv"], ("TRAIN",)),
    "split beside test images": ("split", ["split.folds=2"], ("TRAIN", "EVAL")),
    "prepare": ("prepare", [], ("TRAIN", "FOLDS", "EVAL")),
    "train-fold": ("train-fold", ["FOLD=0", *SETTINGS], ("TRAIN", "FOLDS")),
    "train-fold from a cache": ("train-fold", ["FOLD=0", *SETTINGS], ("TRAIN", "FOLDS", "CACHE")),
    "train-fold from weights": ("train-fold", ["FOLD=0", "model.weights=start.safetensors", *SETTINGS], ("TRAIN", "FOLDS", "WEIGHTS")),
    "ensemble": ("ensemble", [], ("EVAL", "MODEL", "FOLDS", "SUBMISSIONS")),
    "evaluate": ("evaluate", [], ("PREDICTIONS", "GROUND_TRUTH", "MODEL", "FOLDS", "EVAL")),
    "distill": ("distill", SETTINGS, ("TRAIN", "FOLDS", "MODEL")),
    "predict": ("predict", [], ("IMAGES", "MODEL")),
    "export": ("export", ["export.format=pth", "FOLD=0"], ("MODEL",)),
    "compare": ("compare", [], ("SUBMISSIONS", "GROUND_TRUTH")),
}  # fmt: skip
INPUTS: dict[str, tuple[str, ...]] = {
    "split": ("train/a/0.png",),
    "split of a table": ("train/train.csv", "train/a/0.png"),
    "split beside test images": ("eval/test.csv", "eval/images/0.png", "eval/sample_submission.csv"),
    "prepare": ("train/a/0.png", "eval/images/0.png", "eval/test.csv", "folds/folds.parquet", "folds/classes.json"),
    "train-fold": ("train/a/0.png", "folds/folds.parquet", "folds/classes.json"),
    "train-fold from a cache": ("cache/images/cache.json", "cache/images/index.npy", "cache/images/pixels.u8"),
    "train-fold from weights": ("weights/start.safetensors",),
    "ensemble": (
        "eval/test.csv", "eval/images/0.png", "eval/sample_submission.csv", "model/fold-0/model.json",
        "model/fold-0/model.safetensors", "model/fold-0/oof.parquet", "submissions/output_other.csv", "folds/folds.parquet",
    ),
    "evaluate": (
        "predictions/predictions.parquet", "ground_truth/gt.csv", "model/fold-0/oof.parquet", "model/fold-0/model.json",
        "folds/folds.parquet",
    ),
    "distill": ("folds/folds.parquet", "folds/classes.json", "train/a/0.png", "model/fold-0/model.json", "model/fold-0/oof.parquet"),
    "predict": ("images/batch.csv", "model/fold-0/model.json", "model/fold-0/model.safetensors"),
    "export": ("model/fold-0/model.json", "model/fold-0/model.safetensors"),
    "compare": ("submissions/output_other.csv", "ground_truth/gt.csv"),
}  # fmt: skip


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def random_bytes(path: Path, other: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(500))


def a_text(path: Path, other: Path) -> None:
    path.write_text("[1, 2, 3]\n", encoding="utf-8")


def missing(path: Path, other: Path) -> None:
    path.unlink()


def a_folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_run(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


FAULTS: dict[str, Callable[[Path, Path], None]] = {
    "emptied": emptied, "cut off": cut_off, "random bytes": random_bytes, "a text": a_text, "missing": missing,
    "a folder": a_folder, "of another run": of_another_run,
}  # fmt: skip
ABSENT = ("missing", "a folder")
TABLE, PARQUET, NAMES = "train/train.csv", "folds/folds.parquet", "folds/classes.json"
WEIGHTS, MODEL, OOF = (f"model/fold-0/{name}" for name in ("model.safetensors", "model.json", "oof.parquet"))
OTHERWISE: dict[tuple[str, str, str], tuple[int, str]] = {
    # absent: 66, with what was looked for and where
    **{("split of a table", TABLE, fault): (66, "no table train.csv in") for fault in ABSENT},
    **{(case, PARQUET, fault): (66, "no folds.parquet below the channel 'folds'")
       for case in ("prepare", "train-fold", "ensemble", "evaluate", "distill") for fault in ABSENT},
    **{(case, NAMES, fault): (66, "no classes.json below the channel 'folds'")
       for case in ("prepare", "train-fold", "distill") for fault in ABSENT},
    **{("train-fold from a cache", "cache/images/cache.json", fault): (66, "no cache.json below the channel 'cache'")
       for fault in ABSENT},
    **{("train-fold from weights", "weights/start.safetensors", fault): (66, "no such file") for fault in ABSENT},
    **{(case, WEIGHTS, fault): (66, "no weights at") for case in ("ensemble", "predict", "export") for fault in ABSENT},
    **{("distill", OOF, fault): (66, "no predictions at") for fault in ABSENT},
    **{(case, "ground_truth/gt.csv", fault): (66, "gt.csv") for case in ("evaluate", "compare") for fault in ABSENT},
    **{("compare", "submissions/output_other.csv", fault): (66, "too few to compare") for fault in ABSENT},
    # the fold that was asked for is a setting
    **{("export", MODEL, fault): (64, "FOLD=0: no model below") for fault in ABSENT},
    # what may be left out: a sample, one of several submissions or models, scores of rows that nobody asked for
    **{("split beside test images", "eval/sample_submission.csv", fault): (0, "") for fault in ABSENT},
    **{("ensemble", name, fault): (0, "")
       for name in ("eval/sample_submission.csv", "submissions/output_other.csv", OOF) for fault in ABSENT},
    **{("evaluate", name, fault): (0, "") for name in (OOF, MODEL) for fault in ABSENT},
    **{("predict", name, fault): (0, "") for name in (MODEL, "images/batch.csv") for fault in ABSENT},
    # another image is an image; other weights of the same shapes are weights to start from
    **{(case, "train/a/0.png", "of another run"): (0, "") for case in ("split", "split of a table")},
    **{(case, "eval/images/0.png", "of another run"): (0, "") for case in ("split beside test images", "prepare", "ensemble")},
    ("train-fold from weights", "weights/start.safetensors", "of another run"): (0, ""),
    # without its table the images are all that lie there, and ids are nothing to a cache
    **{("prepare", "eval/test.csv", fault): (0, "") for fault in (*ABSENT, "of another run")},
    # it lends the gallery the paths of training images, and finds none: no figure hangs on it
    ("evaluate", PARQUET, "of another run"): (0, ""),
    # a folder of images that holds a text beside them
    ("predict", "images/batch.csv", "a text"): (0, ""),
}  # fmt: skip


def draw(root: Path, classes: tuple[str, str], seed: int) -> None:
    """Images to train on, to test on and to predict, with their tables; seeded, so that two runs differ."""
    noise_in(root, (*(f"train/{name}" for name in classes), "eval/images", "images"), 8, seed)
    ids, answers = [f"{seed}{n}" for n in range(8)], [classes[n % 2] for n in range(8)]
    rows = {
        "train/train.csv": [
            ["image_path", "target"],
            *([f"{name}/{n}.png", name] for name in classes for n in range(8)),
        ],
        "eval/test.csv": [["ID", "img_path"], *([i, f"images/{n}.png"] for n, i in enumerate(ids))],
        "eval/sample_submission.csv": [["ID", *classes], *([i, 0, 0] for i in ids)],
        "submissions/output_other.csv": [["ID", *classes], *([i, 0.4, 0.6] for i in ids)],
        "submissions/output_third.csv": [["ID", *classes], *([i, 0.3, 0.7] for i in ids)],
        "ground_truth/gt.csv": [["ID", "label"], *zip(ids, answers, strict=True)],
        "images/batch.csv": [["image_path", "true_class"], *([f"{n}.png", name] for n, name in enumerate(answers))],
    }
    for name, table in rows.items():
        write_csv(root / name, table, "utf-8")


def make(root: Path, classes: tuple[str, str], seed: int) -> Path:
    """A whole run's files, each channel in a folder of its own."""
    draw(root, classes, seed)
    assert call(root, "split", root / "folds") == 0
    assert run("prepare", [], given(root, root / "cache", ("TRAIN", "FOLDS"))) == 0
    next((root / "cache").glob("*/cache.json")).parent.rename(
        root / "cache" / "images"
    )  # its own name is of what it holds
    for fold in range(2):
        folder = root / "model" / f"fold-{fold}"
        assert run("train-fold", [f"FOLD={fold}", *SETTINGS], given(root, folder, ("TRAIN", "FOLDS"))) == 0
    assert run("ensemble", [], given(root, root / "predictions", ("EVAL", "MODEL", "FOLDS"))) == 0
    state = load_file(root / "model" / "fold-0" / "model.safetensors")
    start = {name.removeprefix("backbone."): each for name, each in state.items() if name.startswith("backbone.")}
    (root / "weights").mkdir()
    save_file(start, root / "weights" / "start.safetensors")
    return root


def given(root: Path, folder: Path, channels: tuple[str, ...]) -> dict[str, str]:
    """The variables of a stage that is given these channels alone and writes all to one folder."""
    places = {name: root / name.lower() if name in channels else None for name in ("TRAIN", "EVAL", "FOLDS", *channels)}
    own = {"SM_OUTPUT_DIR": folder.parent / "failed", "SM_CHECKPOINT_DIR": folder.parent / "checkpoints"}
    return variables(root, folder, **places, **own, SM_MODEL_DIR=folder, SM_OUTPUT_DATA_DIR=folder)


def call(root: Path, case: str, folder: Path) -> int:
    stage, arguments, channels = STAGES[case]
    return run(stage, arguments, given(root, folder, channels))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("whole"), ("a", "b"), 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A run of other images, with other ids, and with one class that is called otherwise."""
    return make(tmp_path_factory.mktemp("other"), ("a", "c"), 2)


CELLS = [(case, name, fault) for case, names in INPUTS.items() for name in names for fault in FAULTS]


@pytest.mark.parametrize("case", STAGES)
def test_the_stage_runs_where_nothing_is_spoilt(case, whole, tmp_path):
    assert call(whole, case, tmp_path / "out") == 0


@pytest.mark.parametrize(("case", "name", "fault"), CELLS)
def test_a_spoilt_file_is_told_and_nothing_looks_finished(case, name, fault, whole, other, tmp_path, capsys):
    root = Path(shutil.copytree(whole, tmp_path / "in"))
    FAULTS[fault](root / name, other / name)
    code, words = OTHERWISE.get((case, name, fault), (65, ""))
    assert call(root, case, tmp_path / "out") == code
    said = capsys.readouterr().err
    if code == 0:
        return
    errors = [line for line in said.splitlines() if re.match(r"\d\d:\d\d:\d\d ERROR", line)]
    assert len(errors) == 1, said
    assert "Traceback" not in said
    assert words in errors[0]
    assert not (tmp_path / "out" / "stage.json").exists()
    assert not list((tmp_path / "out").rglob(".*.tmp"))
