"""Each file that a stage reads, damaged in six ways: the exit code, one clear error, and no finished result.

OTHER_OUTCOMES lists the cases that do not end with exit code 65, with the reasons.
"""

import re
from collections.abc import Callable
from pathlib import Path

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
    "split of a table": ("train/train.csv",),
    "split beside test images": ("eval/test.csv", "eval/images/0.png", "eval/sample_submission.csv"),
    "prepare": ("train/a/0.png", "eval/test.csv", "folds/folds.parquet"),
    "train-fold": ("train/a/0.png", "folds/folds.parquet", "folds/classes.json"),
    "train-fold from a cache": ("cache/images/cache.json", "cache/images/index.npy", "cache/images/pixels.u8"),
    "train-fold from weights": ("weights/start.safetensors",),
    "ensemble": (
        "eval/sample_submission.csv", "model/fold-0/model.json", "model/fold-0/model.safetensors", "model/fold-0/oof.parquet",
        "submissions/output_other.csv",
    ),
    "evaluate": ("predictions/predictions.parquet", "ground_truth/gt.csv", "model/fold-0/model.json", "folds/folds.parquet"),
    "distill": ("model/fold-0/oof.parquet",),
    "predict": ("images/batch.csv",),
    "export": ("model/fold-0/model.json", "model/fold-0/model.safetensors"),
    "compare": ("submissions/output_other.csv",),
}  # fmt: skip
"""For each stage the files whose reader it does not share with an earlier stage, or that it treats in another way."""


def replace_by_folder(path: Path, other_file: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, Callable[[Path, Path], object]] = {
    "emptied": lambda path, _: path.write_bytes(b""),
    "cut off": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a text": lambda path, _: path.write_text("[1, 2, 3]\n", encoding="utf-8"),
    "missing": lambda path, _: path.unlink(),
    "a folder": replace_by_folder,
    "of another run": lambda path, other_file: path.write_bytes(other_file.read_bytes()),
}
ABSENT = ("missing", "a folder")
TABLE, PARQUET, NAMES = "train/train.csv", "folds/folds.parquet", "folds/classes.json"
WEIGHTS, MODEL, OOF = (f"model/fold-0/{name}" for name in ("model.safetensors", "model.json", "oof.parquet"))
OTHER_OUTCOMES: dict[tuple[str, str, str], tuple[int, str]] = {
    # an absent file: 66, with the name of the file and the folder that was searched
    **{("split of a table", TABLE, fault): (66, "no table train.csv in") for fault in ABSENT},
    **{(case, PARQUET, fault): (66, "no folds.parquet below the channel 'folds'")
       for case in ("prepare", "train-fold", "evaluate") for fault in ABSENT},
    **{("train-fold", NAMES, fault): (66, "no classes.json below the channel 'folds'") for fault in ABSENT},
    **{("train-fold from a cache", "cache/images/cache.json", fault): (66, "no cache.json below the channel 'cache'")
       for fault in ABSENT},
    **{("train-fold from weights", "weights/start.safetensors", fault): (66, "no such file") for fault in ABSENT},
    **{(case, WEIGHTS, fault): (66, "no weights at") for case in ("ensemble", "export") for fault in ABSENT},
    **{("distill", OOF, fault): (66, "no predictions at") for fault in ABSENT},
    **{("evaluate", "ground_truth/gt.csv", fault): (66, "gt.csv") for fault in ABSENT},
    **{("compare", "submissions/output_other.csv", fault): (66, "too few to compare") for fault in ABSENT},
    # the fold is a setting, so its absence is a usage error
    **{("export", MODEL, fault): (64, "FOLD=0: no model below") for fault in ABSENT},
    # optional files: a sample, one of several submissions or models, scores of rows that are not required
    **{("split beside test images", "eval/sample_submission.csv", fault): (0, "") for fault in ABSENT},
    **{("ensemble", name, fault): (0, "")
       for name in ("eval/sample_submission.csv", "submissions/output_other.csv", OOF) for fault in ABSENT},
    **{("evaluate", MODEL, fault): (0, "") for fault in ABSENT},
    **{("predict", "images/batch.csv", fault): (0, "") for fault in ABSENT},
    # another valid image is accepted, and so are other initial weights of the same shapes
    ("split", "train/a/0.png", "of another run"): (0, ""),
    ("split beside test images", "eval/images/0.png", "of another run"): (0, ""),
    ("train-fold from weights", "weights/start.safetensors", "of another run"): (0, ""),
    # without its table, the set is all images in the folder; a cache does not depend on ids
    **{("prepare", "eval/test.csv", fault): (0, "") for fault in (*ABSENT, "of another run")},
    # evaluate takes only image paths for its report from folds.parquet; here no row matches, and no score changes
    ("evaluate", PARQUET, "of another run"): (0, ""),
    # a folder of images may also contain a text file
    ("predict", "images/batch.csv", "a text"): (0, ""),
}  # fmt: skip


def write_inputs(root: Path, classes: tuple[str, str], seed: int) -> None:
    """Write images for training, test and prediction, with their tables. Runs with different seeds differ."""
    noise_in(root, (*(f"train/{name}" for name in classes), "eval/images", "images"), 8, seed)
    ids, labels = [f"{seed}{n}" for n in range(8)], [classes[n % 2] for n in range(8)]
    rows = {
        "train/train.csv": [
            ["image_path", "target"],
            *([f"{name}/{n}.png", name] for name in classes for n in range(8)),
        ],
        "eval/test.csv": [["ID", "img_path"], *([id_, f"images/{n}.png"] for n, id_ in enumerate(ids))],
        "eval/sample_submission.csv": [["ID", *classes], *([id_, 0, 0] for id_ in ids)],
        "submissions/output_other.csv": [["ID", *classes], *([id_, 0.4, 0.6] for id_ in ids)],
        "submissions/output_third.csv": [["ID", *classes], *([id_, 0.3, 0.7] for id_ in ids)],
        "ground_truth/gt.csv": [["ID", "label"], *zip(ids, labels, strict=True)],
        "images/batch.csv": [["image_path", "true_class"], *([f"{n}.png", name] for n, name in enumerate(labels))],
    }
    for name, table in rows.items():
        write_csv(root / name, table, "utf-8")


def make_run(root: Path, classes: tuple[str, str], seed: int, models: int) -> Path:
    """Make all files of a run with some of its two models, and one folder per channel. Return the root."""
    write_inputs(root, classes, seed)
    assert run_case(root, "split", root / "folds") == 0
    assert run("prepare", [], make_variables(root, root / "cache", ("TRAIN", "FOLDS"))) == 0
    cache = next((root / "cache").glob("*/cache.json")).parent
    cache.rename(root / "cache" / "images")  # the original name depends on the content
    for fold in range(models):
        folder = root / "model" / f"fold-{fold}"
        assert run("train-fold", [f"FOLD={fold}", *SETTINGS], make_variables(root, folder, ("TRAIN", "FOLDS"))) == 0
    channels = ("EVAL", "MODEL", "FOLDS") if models == 2 else ("EVAL", "SUBMISSIONS")
    assert run("ensemble", [], make_variables(root, root / "predictions", channels)) == 0
    state = load_file(root / "model" / "fold-0" / "model.safetensors")
    backbone = {n.removeprefix("backbone."): tensor for n, tensor in state.items() if n.startswith("backbone.")}
    (root / "weights").mkdir()
    save_file(backbone, root / "weights" / "start.safetensors")
    return root


def make_variables(root: Path, folder: Path, channels: tuple[str, ...]) -> dict[str, str]:
    """Return the variables of a stage that has only these channels and writes all results to one folder."""
    paths = {name: root / name.lower() if name in channels else None for name in ("TRAIN", "EVAL", "FOLDS", *channels)}
    folders = {"SM_OUTPUT_DIR": folder.parent / "failed", "SM_CHECKPOINT_DIR": folder.parent / "checkpoints"}
    return variables(root, folder, **paths, **folders, SM_MODEL_DIR=folder, SM_OUTPUT_DATA_DIR=folder)


def run_case(root: Path, case: str, folder: Path) -> int:
    stage, arguments, channels = STAGES[case]
    return run(stage, arguments, make_variables(root, folder, channels))


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole"), ("a", "b"), 1, models=2)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """A run of other images, with other ids and one other class name."""
    return make_run(tmp_path_factory.mktemp("other"), ("a", "c"), 2, models=1)


CELLS = [(case, name, fault) for case, names in INPUTS.items() for name in names for fault in FAULTS]


SUCCEED = {"train-fold", *(case for (case, _, _), (code, _) in OTHER_OUTCOMES.items() if code == 0)}
"""Stages that succeed in another test or in `make_run`."""


@pytest.mark.parametrize("case", [case for case in STAGES if case not in SUCCEED])
def test_stage_succeeds_with_undamaged_inputs(case, complete_run, tmp_path):
    assert run_case(complete_run, case, tmp_path / "out") == 0


@pytest.mark.parametrize(("case", "name", "fault"), CELLS)
def test_damaged_file_gives_one_error_and_leaves_no_finished_result(
    case, name, fault, complete_run, other_run, tmp_path, capsys
):
    path, content = complete_run / name, (complete_run / name).read_bytes()
    code, message = OTHER_OUTCOMES.get((case, name, fault), (65, ""))
    FAULTS[fault](path, other_run / name)
    try:
        assert run_case(complete_run, case, tmp_path / "out") == code
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
    log = capsys.readouterr().err
    if code == 0:
        return
    errors = [line for line in log.splitlines() if re.match(r"\d\d:\d\d:\d\d ERROR", line)]
    assert len(errors) == 1, log
    assert "Traceback" not in log
    assert message in errors[0]
    assert not (tmp_path / "out" / "stage.json").exists()
    assert not list((tmp_path / "out").rglob(".*.tmp"))
