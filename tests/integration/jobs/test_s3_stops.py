"""Stages on `s3://` that are killed, stopped, or find a damaged checkpoint: each is a process, and nothing stays on its disk."""

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
BYTES = ("model.safetensors", "oof.parquet", "train_log.csv", "model.json")
SECONDS_TO_STOP = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, their split, and a fold to which nothing happened, all in folders."""
    root = tmp_path_factory.mktemp("whole")
    noise_in(root / "train", "ab", 48)
    assert run_stage(root, "split", "split", "split.folds=2", SM_OUTPUT_DATA_DIR=root / "split") == 0
    there = {"FOLDS": root / "split", "SM_MODEL_DIR": root / "model", "SM_OUTPUT_DATA_DIR": root / "output"}
    ends_well(root, variables(root, "fold", EVAL=None, SM_OUTPUT_DIR=None, **there))
    return root


@pytest.fixture
def filled(bucket: Bucket, whole: Path) -> Bucket:
    """A bucket with the images and the split."""
    for folder in ("train", "split"):
        for path in (whole / folder).rglob("*.*"):
            bucket.write(path.relative_to(whole).as_posix(), path.read_bytes())
    return bucket


def urls(bucket: Bucket, endpoint: str = "") -> dict[str, str]:
    places = {
        "CHANNEL_TRAIN": "train",
        "CHANNEL_FOLDS": "split",
        "MODEL_DIR": "fold/model",
        "OUTPUT_DATA_DIR": "fold/output",
    }
    return bucket.environ(endpoint) | {f"SM_{name}": f"s3://{bucket.name}/{key}" for name, key in places.items()}


def begin(
    folder: Path, environ: dict[str, str], number: str = "SIGKILL", point: str = "never", call: int = 1
) -> Forked:
    strike = [number, point, str(call), "0", str(folder / "steps")]
    environ = environment(OMP_NUM_THREADS=1, TMPDIR=folder, **environ)
    return Forked([str(PROGRAM), *strike, "train-fold", *SETTINGS], environ)


def ends_well(folder: Path, environ: dict[str, str]) -> str:
    """Runs the stage to its end; what it said."""
    process = begin(folder, environ)
    said = process.wait()
    assert process.returncode == 0, said
    return said


def steps(folder: Path) -> int:
    """How many its processes made; none where all were made before."""
    return (folder / "steps").stat().st_size if (folder / "steps").exists() else 0


def check_whole(bucket: Bucket, whole: Path) -> None:
    keys = bucket.listed("fold/model")
    attempt = next(key for key in keys if key.endswith("stage.json")).removesuffix("stage.json")
    for name in BYTES:
        assert bucket.read(attempt + name) == (whole / "model" / name).read_bytes(), name
    assert not bucket.listed("fold/checkpoints")


@pytest.mark.parametrize(("point", "call"), [("step", 20), ("checkpoint", 6), ("views", 1), ("record", 1)])
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_on_another_machine_it_goes_on_to_the_same_bytes(number, point, call, filled, whole, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    process = begin(first, urls(filled), number, point, call)
    said = process.wait(120)
    assert process.returncode == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143}[number], said
    assert not [key for key in filled.listed("fold") if key.endswith("stage.json")], "nothing looks finished"
    assert filled.listed("fold/checkpoints")
    said = ends_well(second, urls(filled))
    assert "after step" in said
    check_whole(filled, whole)
    if number == "SIGTERM":
        assert steps(first) + steps(second) == steps(whole), "its last checkpoint went up, so no step is run twice"


def test_of_a_damaged_checkpoint_the_one_before_is_taken(filled, whole, tmp_path):
    process = begin(tmp_path, urls(filled), "SIGTERM", "step", 20)
    process.wait(120)
    newest = filled.listed("fold/checkpoints")[-1]
    filled.write(newest, filled.read(newest)[::-1])
    said = ends_well(tmp_path, urls(filled))
    assert f"the checkpoint s3://{filled.name}/{newest} is damaged" in said
    check_whole(filled, whole)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_told_to_stop_amid_a_transfer_it_stops_in_time(method, filled, whole, tmp_path):
    """Each of 96 images, or each file of the result, takes a second more than it should; or nothing is answered at all."""
    started: list[float] = []

    def slow(request: Request) -> str | None:
        wanted = "/train/" in request.path if method == "GET" else "attempt-" in request.path
        if request.method != method or not wanted:
            return None
        started.append(time.monotonic())
        return "slow" if len(started) < 3 else "silent"

    proxy = Proxy(filled.endpoint, slow)
    with proxy.listening() as endpoint:
        process = begin(tmp_path, urls(filled, endpoint))
        while len(started) < 3:
            assert process.returncode is None
            time.sleep(0.05)
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = process.wait(120)
    assert process.returncode == 143, said
    assert time.monotonic() - told < SECONDS_TO_STOP
    said = ends_well(tmp_path, urls(filled))
    check_whole(filled, whole)
