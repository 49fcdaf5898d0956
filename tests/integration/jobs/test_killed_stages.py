"""Training stages that a signal stops at a random instant of each phase: resumed runs end in the same bytes."""

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
    "start": ("start", 1, 0.05),
    "caching": ("caching", 1, 0.01),
    "preparing": ("preparing", 1, 0.01),
    "warm-up": ("step", STEPS_OF_AN_EPOCH, 0.01),
    "training": ("step", STEPS_OF_AN_EPOCH, 0.01),
    "validation": ("validation", 1, 0.01),
    "checkpoint": ("checkpoint", 2, 0.0),
    "views": ("views", 1, 0.02),
    "weights": ("weights", 2, 0.0),
    "record": ("record", 1, 0.0),
}
"""For each phase, in order: a point of `fault_injection.py`, its last call in a stage, and its duration in seconds."""
SECONDS_TO_STOP = 30
RUNS = int(os.environ.get("FIVEFOLD_INSTANTS", "1"))
"""Number of runs of each stage with other random instants."""


@pytest.fixture(scope="module")
def reference_runs(tmp_path_factory) -> Path:
    """Toy images in two classes, their split, teachers, and the results of uninterrupted stages."""
    root = tmp_path_factory.mktemp("world")
    tinted_in(root / "train", ["a", "b"], 53, by=100)
    assert run_stage(root, "split", "split", "split.folds=2", "split.holdout=0.1") == 0
    for fold in range(2):
        assert run_stage(root, "train-fold", f"models/fold-{fold}", f"FOLD={fold}", *SETTINGS) == 0
    for stage in STAGES:
        assert run_process(root, root / "whole" / stage, stage)[0] == 0
    return root


def start_process(
    root, folder: Path, stage: str, signal_name="SIGKILL", point="never", call=1, delay=0.0, more: tuple[str, ...] = ()
) -> Forked:
    folder.mkdir(parents=True, exist_ok=True)
    injection = [signal_name, point, str(call), str(delay), str(folder / "steps")]
    environ = environment(**variables(root, folder, MODEL=root / "models"), OMP_NUM_THREADS=1)
    return Forked([str(PROGRAM), *injection, stage, *STAGES[stage], *more], environ)


def run_process(root: Path, folder: Path, stage: str, *injection: str | float) -> tuple[int | None, str]:
    """Run the stage to its end or to a signal (name, point, call number, delay). Return the exit code and the output."""
    process = start_process(root, folder, stage, *injection)
    log = process.wait()
    return process.returncode, log


def assert_same_as_uninterrupted(root: Path, folder: Path, stage: str, kills: int) -> None:
    """Assert that the files equal those of an uninterrupted run and that no kill repeats more than one checkpoint interval."""
    for name in BYTES[stage]:
        expected = (root / "whole" / stage / "model" / name).read_bytes()
        assert (folder / "model" / name).read_bytes() == expected, name
    assert (folder / "model" / "stage.json").is_file()
    assert not any((folder / "checkpoints").iterdir()), "checkpoints of a finished run remain"
    steps = (folder / "steps").stat().st_size
    expected_steps = (root / "whole" / stage / "steps").stat().st_size
    assert expected_steps <= steps <= expected_steps + kills * INTERVAL


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_stage_stopped_in_each_phase_resumes_to_the_same_bytes(stage, first, seed, reference_runs, tmp_path):
    """SIGKILL and SIGTERM take turns, so that the two orders send both signals in each phase."""
    generator = random.Random(f"{stage} {seed}")
    for number, (phase, (point, last, seconds)) in enumerate(PHASES.items()):
        name = ("SIGKILL", "SIGTERM")[(number + first) % 2]
        instant = generator.randint(1, last), generator.uniform(0.0, seconds)
        code, log = run_process(reference_runs, tmp_path, stage, name, point, *instant)
        if name == "SIGKILL":
            assert not (tmp_path / "model" / "stage.json").exists(), "a killed stage has a record"
        assert code == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143}[name], f"{phase}: {log}"
        if name == "SIGTERM":
            assert time.time() - float((tmp_path / "steps.struck").read_text()) < SECONDS_TO_STOP
            assert "stopped by SIGTERM" in log.rstrip().splitlines()[-1]
            assert not (tmp_path / "failure").exists()
    code, log = run_process(reference_runs, tmp_path, stage)
    assert code == 0, log
    assert_same_as_uninterrupted(reference_runs, tmp_path, stage, kills=len(PHASES) // 2)


def test_second_signal_ends_the_stage_at_once(reference_runs, tmp_path):
    """Send SIGTERM, because background processes of a shell ignore SIGINT."""
    process = start_process(reference_runs, tmp_path, "train-fold", more=("train.epochs=4000",))
    wait_until(lambda: "trains on" in process.read_output())
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    process.wait(SECONDS_TO_STOP)
    assert process.returncode == 143


def test_checkpoints_of_other_settings_are_not_changed(reference_runs, tmp_path):
    other = tmp_path / "checkpoints" / "0123" / "00000001.pt"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x")
    assert run_stage(reference_runs, "train-fold", tmp_path, "FOLD=0", *SETTINGS, f"train.epochs={EPOCHS - 1}") == 0
    assert other.read_bytes() == b"x"
