"""Training stages struck by signals at every phase and at any instant: what goes on ends in the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.__main__ import run

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
STRUCK = Path(__file__).parents[1] / "struck.py"
EPOCHS, STEPS_OF_AN_EPOCH, INTERVAL = 4, 6, 2
SETTINGS = [
    "model.backbone=fivefold/small_net", 'model.options={"widths": [8, 16], "stem": 8}', "model.image_size=12", "model.dropout=0.3",
    f"train.epochs={EPOCHS}", "train.batch_size=8", "train.lr=0.02", "train.ema_decay=0.9", "train.keep_raw=true", "train.precision=fp32",
    "train.warmup_epochs=1", 'augment.train=["random_crop", "horizontal_flip"]', "augment.mix=cutmix", "predict.views=plain,flip",
    f"train.checkpoint_steps={INTERVAL}",
]  # fmt: skip
STAGES = {"train-fold": ["FOLD=0", *SETTINGS], "distill": SETTINGS}
BYTES = {
    "train-fold": ("model.safetensors", "model_raw.safetensors", "oof.parquet", "train_log.csv", "model.json"),
    "distill": ("model.safetensors", "model_raw.safetensors", "holdout.parquet", "train_log.csv", "model.json"),
}
POINTS = {
    "start": 1, "caching": 1, "caching again": 2, "step": 3, "step again": 13, "validation": 4, "checkpoint": 2,
    "checkpoint again": 9, "views": 1, "weights": 2, "record": 1,
}  # fmt: skip
SECONDS_TO_STOP = 30
RANDOM_KILLS = int(os.environ.get("FIVEFOLD_KILLS", "12"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Drawn images in two classes, their split, teachers, and what the stages make of them when nothing happens."""
    root = tmp_path_factory.mktemp("world")
    drawing = np.random.default_rng(0)
    for code, name in enumerate(("a", "b")):
        (root / "train" / name).mkdir(parents=True)
        for number in range(53):
            pixels = drawing.integers(0, 120, (12, 12, 3))
            pixels[..., code] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / name / f"{number}.png")
    split = {"SM_CHANNEL_TRAIN": str(root / "train"), "SM_OUTPUT_DATA_DIR": str(root / "split")}
    assert run("split", ["split.folds=2", "split.holdout=0.1"], split) == 0
    for fold in range(2):
        assert run("train-fold", [f"FOLD={fold}", *SETTINGS], variables(root, root / "models" / f"fold-{fold}")) == 0
    for stage in STAGES:
        assert struck(root, root / "whole" / stage, stage).returncode == 0
    return root


def variables(root: Path, folder: Path) -> dict[str, str]:
    return {
        "SM_CHANNEL_TRAIN": str(root / "train"),
        "SM_CHANNEL_FOLDS": str(root / "split"),
        "SM_CHANNEL_MODEL": str(root / "models"),
        "SM_MODEL_DIR": str(folder / "model"),
        "SM_OUTPUT_DATA_DIR": str(folder / "output"),
        "SM_OUTPUT_DIR": str(folder),
    }


def begin(root: Path, folder: Path, stage: str, number: str = "SIGKILL", point: str = "never", call: int = 1):
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(STRUCK), number, point, str(call), str(folder / "steps"), stage, *STAGES[stage]]
    environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, env={**environ, **variables(root, folder)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def struck(root: Path, folder: Path, stage: str, *strike: str | int) -> subprocess.CompletedProcess[str]:
    """Runs the stage to its end, or to the strike (a signal, a point, the how-manieth time there)."""
    process = begin(root, folder, stage, *strike)
    said = process.communicate(timeout=240)[1].decode()
    return subprocess.CompletedProcess(process.args, process.returncode, stderr=said)


def check_whole(root: Path, folder: Path, stage: str, kills: int) -> None:
    """The files are those of a run to which nothing happened, and no kill has cost more than a checkpoint's interval."""
    for name in BYTES[stage]:
        whole = (root / "whole" / stage / "model" / name).read_bytes()
        assert (folder / "model" / name).read_bytes() == whole, name
    assert (folder / "model" / "stage.json").is_file()
    assert not any((folder / "checkpoints").iterdir()), "checkpoints of a run that is over"
    steps = (folder / "steps").stat().st_size
    wanted = (root / "whole" / stage / "steps").stat().st_size
    assert wanted <= steps <= wanted + kills * INTERVAL


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_phase_it_goes_on_to_the_same_bytes(stage, point, world, tmp_path):
    killed = struck(world, tmp_path, stage, "SIGKILL", point.split()[0], POINTS[point])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "model" / "stage.json").exists(), "nothing looks finished"
    again = struck(world, tmp_path, stage)
    assert again.returncode == 0, again.stderr
    assert ("goes on after step" in again.stderr) == (point not in ("start", "caching", "caching again"))
    check_whole(world, tmp_path, stage, kills=1)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("stage", STAGES)
def test_told_to_stop_in_any_phase_it_is_143_and_goes_on_to_the_same_bytes(stage, point, world, tmp_path):
    start = time.monotonic()
    stopped = struck(world, tmp_path, stage, "SIGTERM", point.split()[0], POINTS[point])
    assert stopped.returncode == 143, stopped.stderr
    assert time.monotonic() - start < SECONDS_TO_STOP
    assert stopped.stderr.rstrip().endswith("stopped by SIGTERM: the same command goes on from here")
    assert not (tmp_path / "failure").exists()
    again = struck(world, tmp_path, stage)
    assert again.returncode == 0, again.stderr
    check_whole(world, tmp_path, stage, kills=0)


@pytest.mark.parametrize("seed", range(RANDOM_KILLS // 3))
@pytest.mark.parametrize("stage", STAGES)
def test_killed_three_times_at_random_instants(stage, seed, world, tmp_path):
    instants = random.Random(seed)
    kills = 0
    for _ in range(3):
        process = begin(world, tmp_path, stage)
        try:
            process.wait(timeout=instants.uniform(2.0, 7.0))
        except subprocess.TimeoutExpired:
            kills += 1
        process.kill()
        process.communicate()
    again = struck(world, tmp_path, stage)
    assert again.returncode == 0, again.stderr
    check_whole(world, tmp_path, stage, kills)


def test_a_second_signal_ends_it_at_once(world, tmp_path):
    process = begin(world, tmp_path, "train-fold")
    assert process.stderr is not None
    while b"trains on" not in process.stderr.readline():
        pass
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS_TO_STOP)
    assert process.returncode == 130


def test_checkpoints_of_other_settings_are_left_alone_and_named(world, tmp_path):
    assert struck(world, tmp_path, "train-fold", "SIGKILL", "step", 9).returncode == -signal.SIGKILL
    (other,) = (tmp_path / "checkpoints").iterdir()
    kept = {path.name: path.read_bytes() for path in other.iterdir()}
    code = run("train-fold", ["FOLD=0", *SETTINGS, "train.lr=0.01"], variables(world, tmp_path))
    assert code == 0
    assert {path.name: path.read_bytes() for path in other.iterdir()} == kept
    assert struck(world, tmp_path, "train-fold").returncode == 0
    check_whole(world, tmp_path, "train-fold", kills=1 + EPOCHS * STEPS_OF_AN_EPOCH)
