"""Each stage on a disk that fills up: exit 75, nothing half-written, and the same command goes on once there is room."""

from pathlib import Path

import pytest

from jobs.__main__ import run
from toy import noise_in, write_test_table

pytestmark = pytest.mark.slow
SETTINGS = [
    "model.backbone=fivefold/small_net", 'model.options={"widths": [8, 8], "stem": 8}', "model.image_size=12", "train.epochs=2",
    "train.batch_size=8", "train.precision=fp32",
]  # fmt: skip
STAGES = {
    "split": ["split.folds=2", "split.seed=1"],
    "prepare": [],
    "train-fold": ["FOLD=0", *SETTINGS],
    "ensemble": [],
    "evaluate": [],
    "distill": SETTINGS,
    "predict": ["predict.file=answers.csv"],
    "export": ["export.format=pth", "FOLD=0"],
}
WHOLE = {
    "split": "folds.parquet", "prepare": "*/pixels.u8", "train-fold": "model.safetensors", "ensemble": "predictions.parquet", "evaluate": "metrics.json",
    "distill": "model.safetensors", "predict": "answers.csv", "export": "model.pth",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Images, their split, two folds and what each stage makes of them where there is room."""
    root = tmp_path_factory.mktemp("world")
    noise_in(root, ("train/a", "train/b", "eval/images"), 40)
    write_test_table(root / "eval", 40)
    assert stage(root, root / "split", "split") == 0
    for fold in range(2):
        folder = root / "models" / f"fold-{fold}"
        assert run("train-fold", [f"FOLD={fold}", *SETTINGS], variables(root, folder)) == 0
    for name in ("ensemble", *(name for name in STAGES if name not in ("split", "ensemble"))):
        assert stage(root, root / name, name) == 0
    return root


def variables(root: Path, folder: Path) -> dict[str, str]:
    return {
        "SM_CHANNEL_TRAIN": str(root / "train"),
        "SM_CHANNEL_EVAL": str(root / "eval"),
        "SM_CHANNEL_IMAGES": str(root / "eval" / "images"),
        "SM_CHANNEL_MODEL": str(root / "models"),
        "SM_CHANNEL_FOLDS": str(root / "split"),
        "SM_CHANNEL_PREDICTIONS": str(root / "ensemble"),
        "SM_MODEL_DIR": str(folder),
        "SM_OUTPUT_DATA_DIR": str(folder),
        "SM_CHECKPOINT_DIR": str(folder.parent / "checkpoints"),
        "SM_OUTPUT_DIR": str(folder.parent.parent / "failed"),
    }


def stage(root: Path, folder: Path, name: str) -> int:
    given = variables(root, folder)
    for absent in {"split": ("FOLDS",), "predict": ("FOLDS",)}.get(name, ()):
        given.pop(f"SM_CHANNEL_{absent}")
    return run(name, STAGES[name], given)


def fill(disk: Path, left: int) -> None:
    """Takes all but `left` KiB."""
    with open(disk / "filler", "wb") as file:
        file.write(bytes((8 * 1024 - left) * 1024))


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_75_and_nothing_is_half_written(name, left, world, small_disk, tmp_path):
    fill(small_disk, left)
    folder = small_disk / "out"
    assert stage(world, folder, name) == 75
    assert "free some, then run the same command again" in (tmp_path / "failed" / "failure").read_text()
    assert not (folder / "stage.json").exists()
    assert not list(small_disk.rglob(".*.tmp")), "temporary files"
    (small_disk / "filler").unlink()
    assert stage(world, folder, name) == 0
    made, expected = (next(root.glob(WHOLE[name])) for root in (folder, world / name))
    assert made.read_bytes() == expected.read_bytes()
