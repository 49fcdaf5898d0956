"""Training stages struck by signals at every phase and at any instant: what goes on ends in the same bytes."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from forked_process import Forked
from reference_run import wait_until
from toy_data import REPOSITORY, RESUMES, environment, run_stage, tinted_in, variables

pytestmark = pytest.mark.slow
PROGRAM = REPOSITORY / "tests" / "fault_injection.py"
EPOCHS, STEPS_OF_AN_EPOCH, INTERVAL = 4, 6, 2
SETTINGS = [
    *RESUMES[1:], f"train.epochs={EPOCHS}", f"train.checkpoint_steps={INTERVAL}", "train.save_raw_weights=true", "train.warmup_epochs=1",
    'augment.train=["random_crop", "horizontal_flip"]', "predict.tta=plain,flip",
]  # fmt: skip
STAGES = {"train-fold": ["FOLD=0", *SETTINGS], "distill": SETTINGS}
BYTES = {
    "train-fold": ("model.safetensors", "model_raw.safetensors", "oof.parquet", "train_log.csv", "model.json"),
    "distill": ("model.safetensors", "model_raw.safetensors", "holdout.parquet", "train_log.csv", "model.json"),
}
PHASES = {
    "start": ("start", 1, 1, 0.05),
    "caching": ("caching", 1, 1, 0.01),
    "preparing": ("preparing", 1, EPOCHS, 0.01),
    "warm-up": ("step", 1, STEPS_OF_AN_EPOCH, 0.01),
    "training": ("step", STEPS_OF_AN_EPOCH + 1, EPOCHS * STEPS_OF_AN_EPOCH, 0.01),
    "validation": ("validation", 1, EPOCHS, 0.01),
    "checkpoint": ("checkpoint", 1, EPOCHS * STEPS_OF_AN_EPOCH // INTERVAL, 0.0),
    "views": ("views", 1, 1, 0.02),
    "weights": ("weights", 1, 2, 0.0),
    "record": ("record", 1, 1, 0.0),
}
"""Of each a point of `fault_injection.py`, the first and the last time that a stage comes by it, and the seconds that it lasts."""
SECONDS_TO_STOP = 30
INSTANTS = int(os.environ.get("FIVEFOLD_INSTANTS", "1"))
"""Random instants in each phase of each stage."""
slowest: dict[str, float] = {}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Drawn images in two classes, their split, teachers, and what the stages make of them when nothing happens."""
    root = tmp_path_factory.mktemp("world")
    tinted_in(root / "train", ["a", "b"], 53, by=100)
    assert run_stage(root, "split", "split", "split.folds=2", "split.holdout=0.1") == 0
    for fold in range(2):
        assert run_stage(root, "train-fold", f"models/fold-{fold}", f"FOLD={fold}", *SETTINGS) == 0
    for stage in STAGES:
        assert struck(root, root / "whole" / stage, stage)[0] == 0
    return root


def begin(
    root: Path, folder: Path, stage: str, number="SIGKILL", point="never", call=1, delay=0.0, more: tuple[str, ...] = ()
) -> Forked:
    folder.mkdir(parents=True, exist_ok=True)
    strike = [number, point, str(call), str(delay), str(folder / "steps")]
    environ = environment(**variables(root, folder, MODEL=root / "models"), OMP_NUM_THREADS=1)
    return Forked([str(PROGRAM), *strike, stage, *STAGES[stage], *more], environ)


def struck(root: Path, folder: Path, stage: str, *strike: str | float) -> tuple[int | None, str]:
    """Runs the stage to its end, or to the strike (a signal, a point, the how-manieth time there): exit code, output."""
    process = begin(root, folder, stage, *strike)
    said = process.wait()
    return process.returncode, said


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


def instant(stage: str, phase: str, seed: int) -> tuple[str, int, float]:
    """A random instant in a phase: a point, the how-manieth time there, and seconds after it."""
    random_ = random.Random(f"{stage} {phase} {seed}")
    point, first, last, seconds = PHASES[phase]
    return point, random_.randint(first, last), random_.uniform(0.0, seconds)


def seconds_since_strike(folder: Path) -> float:
    return time.time() - float((folder / "steps.struck").read_text())


@pytest.mark.parametrize("seed", range(INSTANTS))
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_a_random_instant_of_any_phase_it_goes_on_to_the_same_bytes(stage, phase, seed, world, tmp_path):
    code, said = struck(world, tmp_path, stage, "SIGKILL", *instant(stage, phase, seed))
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "model" / "stage.json").exists(), "nothing looks finished"
    code, said = struck(world, tmp_path, stage)
    assert code == 0, said
    check_whole(world, tmp_path, stage, kills=1)


@pytest.mark.parametrize("seed", range(INSTANTS))
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stage", STAGES)
def test_told_to_stop_at_a_random_instant_it_is_143_and_goes_on_to_the_same_bytes(stage, phase, seed, world, tmp_path):
    code, said = struck(world, tmp_path, stage, "SIGTERM", *instant(stage, phase, seed))
    slowest[f"{stage} {phase} {seed}"] = seconds_since_strike(tmp_path)
    assert code == 143, said
    assert slowest[f"{stage} {phase} {seed}"] < SECONDS_TO_STOP
    assert "stopped by SIGTERM" in said.rstrip().splitlines()[-1]
    assert not (tmp_path / "failure").exists()
    code, said = struck(world, tmp_path, stage)
    assert code == 0, said
    check_whole(world, tmp_path, stage, kills=0)
    where = max(slowest, key=lambda name: slowest[name])
    print(f"slowest of {len(slowest)} exits: {slowest[where]:.2f} s ({where})")


@pytest.mark.parametrize("seed", range(2 * INSTANTS))
@pytest.mark.parametrize("stage", STAGES)
def test_killed_three_times_at_random_instants(stage, seed, world, tmp_path):
    instants = random.Random(seed)
    kills = 0
    for _ in range(3):
        process = begin(world, tmp_path, stage)
        if not process.ended(within=instants.uniform(0.5, 3.0)):
            kills += 1
            process.send_signal(signal.SIGKILL)
        process.wait()
    code, said = struck(world, tmp_path, stage)
    assert code == 0, said
    check_whole(world, tmp_path, stage, kills)


def test_a_second_signal_ends_it_at_once(world, tmp_path):
    """SIGTERM, since a shell that starts something in the background has it ignore SIGINT."""
    process = begin(world, tmp_path, "train-fold", more=("train.epochs=4000",))
    wait_until(lambda: "trains on" in process.said())
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    process.wait(SECONDS_TO_STOP)
    assert process.returncode == 143


def test_checkpoints_of_other_settings_are_left_alone_and_named(world, tmp_path):
    assert struck(world, tmp_path, "train-fold", "SIGKILL", "step", 9)[0] == -signal.SIGKILL
    (other,) = (tmp_path / "checkpoints").iterdir()
    kept = {path.name: path.read_bytes() for path in other.iterdir()}
    code = run_stage(world, "train-fold", tmp_path, "FOLD=0", *SETTINGS, "train.lr=0.01")
    assert code == 0
    assert {path.name: path.read_bytes() for path in other.iterdir()} == kept
    assert struck(world, tmp_path, "train-fold")[0] == 0
    check_whole(world, tmp_path, "train-fold", kills=1 + EPOCHS * STEPS_OF_AN_EPOCH)
