"""Stages on `s3://` that are killed or stopped, or read a damaged checkpoint; each process keeps nothing on its disk."""

import signal
import time
from pathlib import Path

import pytest

from forked_process import Forked
from s3_server import Bucket, Proxy, Request
from toy_data import REPOSITORY, RESUMES, environment, noise_in, run_stage, variables

pytestmark = pytest.mark.slow
PROGRAM = REPOSITORY / "tests" / "fault_injection.py"
SETTINGS = [*RESUMES, "train.loggers=[]"]
IDENTICAL_FILES = ("model.safetensors", "oof.parquet", "train_log.csv", "model.json")
MAX_STOP_SECONDS = 30


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local folders with images, their split and a fold trained without interruption."""
    root = tmp_path_factory.mktemp("whole")
    noise_in(root / "train", "ab", 48)
    assert run_stage(root, "split", "split", "split.folds=2", SM_OUTPUT_DATA_DIR=root / "split") == 0
    outputs = {"FOLDS": root / "split", "SM_MODEL_DIR": root / "model", "SM_OUTPUT_DATA_DIR": root / "output"}
    run_to_end(root, variables(root, "fold", EVAL=None, SM_OUTPUT_DIR=None, **outputs))
    return root


@pytest.fixture
def filled_bucket(bucket: Bucket, uninterrupted_run: Path) -> Bucket:
    """A bucket with the images and their split."""
    for folder in ("train", "split"):
        for path in (uninterrupted_run / folder).rglob("*.*"):
            bucket.write(path.relative_to(uninterrupted_run).as_posix(), path.read_bytes())
    return bucket


def s3_environment(bucket: Bucket, endpoint: str = "") -> dict[str, str]:
    outputs = {"MODEL_DIR": "fold/model", "OUTPUT_DATA_DIR": "fold/output"}
    places = {"CHANNEL_TRAIN": "train", "CHANNEL_FOLDS": "split", **outputs}
    return bucket.environ(endpoint) | {f"SM_{name}": f"s3://{bucket.name}/{key}" for name, key in places.items()}


def start_stage(folder: Path, environ, signal_name="SIGKILL", point="never", call=1) -> Forked:
    fault = [signal_name, point, str(call), "0", str(folder / "steps")]
    environ = environment(OMP_NUM_THREADS=1, TMPDIR=folder, **environ)
    return Forked([str(PROGRAM), *fault, "train-fold", *SETTINGS], environ)


def run_to_end(folder: Path, environ: dict[str, str]) -> str:
    """Run the stage to its end; return its output."""
    process = start_stage(folder, environ)
    output = process.wait()
    assert process.returncode == 0, output
    return output


def assert_result_is_identical(bucket: Bucket, uninterrupted_run: Path) -> None:
    keys = bucket.listed("fold/model")
    attempt = next(key for key in keys if key.endswith("stage.json")).removesuffix("stage.json")
    for name in IDENTICAL_FILES:
        assert bucket.read(attempt + name) == (uninterrupted_run / "model" / name).read_bytes(), name
    assert not bucket.listed("fold/checkpoints")


def test_stage_stopped_on_several_machines_ends_in_the_same_bytes(filled_bucket, uninterrupted_run, tmp_path):
    """After a SIGTERM no step runs twice; a damaged checkpoint falls back to the one before."""
    interruptions = (
        ("SIGTERM", "step", 5),
        ("SIGKILL", "checkpoint", 4),
        ("SIGTERM", "views", 1),
        ("SIGKILL", "record", 1),
    )
    newest = ""
    for number, (name, point, call) in enumerate(interruptions):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start_stage(folder, s3_environment(filled_bucket), name, point, call)
        output = process.wait(120)
        assert process.returncode == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143}[name], output
        assert not [k for k in filled_bucket.listed("fold") if k.endswith("stage.json")], "the stage looks finished"
        if number == 1:
            assert "after step 5" in output, "a step runs twice although the last checkpoint was uploaded"
            newest = filled_bucket.listed("fold/checkpoints")[-1]
            filled_bucket.write(newest, filled_bucket.read(newest)[::-1])
        if number == 2:
            assert f"the checkpoint s3://{filled_bucket.name}/{newest} is damaged" in output
    output = run_to_end(tmp_path, s3_environment(filled_bucket))
    assert "after step" in output
    assert_result_is_identical(filled_bucket, uninterrupted_run)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_sigterm_during_a_transfer_stops_in_time(method, filled_bucket, tmp_path):
    """Two of 96 images, or two result files, take a second longer; after that the store does not answer at all."""
    started: list[float] = []

    def slow(request: Request) -> str | None:
        matches = "/train/" in request.path if method == "GET" else "attempt-" in request.path
        if request.method != method or not matches:
            return None
        started.append(time.monotonic())
        return "slow" if len(started) < 3 else "silent"

    proxy = Proxy(filled_bucket.endpoint, slow)
    with proxy.listening() as endpoint:
        process = start_stage(tmp_path, s3_environment(filled_bucket, endpoint))
        while len(started) < 3:
            assert process.returncode is None
            time.sleep(0.05)
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output = process.wait(120)
    assert process.returncode == 143, output
    assert time.monotonic() - signalled < MAX_STOP_SECONDS
