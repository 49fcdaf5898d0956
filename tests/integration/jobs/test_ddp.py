"""One fold by several processes, by the real entrypoint: same curve, every row once, stopped and killed, hosts and torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fivefold import predictions
from fivefold.distributed.rank_launcher import free_port
from jobs.__main__ import run
from s3_server import Proxy
from toy_data import REPOSITORY, RESUMES, environment, failure, run_stage, tinted_in, variables

SHARED = (
    "FOLD=0", "train.epochs=3", "train.batch_size=8", "train.precision=fp32", 'augment.train=["random_crop", "horizontal_flip"]',
)  # fmt: skip
WITHOUT_NORMS = (
    *SHARED, "model.backbone=timm/vit_tiny_patch16_224", "model.image_size=12", "model.dropout=0",
    'model.backbone_kwargs={"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    "train.optimizer=sgd", "train.lr=0.05", "train.ema_decay=0.9", "augment.batch_mix=cutmix", "predict.tta=plain,flip",
)  # fmt: skip
SMALL = (*RESUMES, *SHARED, "train.save_raw_weights=true", "augment.batch_mix=mixup", "train.epochs=25")
BYTES = ("model.safetensors", "model_raw.safetensors", "oof.parquet", "holdout.parquet", "train_log.csv", "model.json")
SECONDS_TO_END = 45


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images of two classes, their split, and another split of them."""
    root = tmp_path_factory.mktemp("world")
    tinted_in(root / "train", ["a", "b"], 53, by=60)
    for name, seed in (("split", 1), ("other", 2)):
        arguments = ("split.folds=2", "split.holdout=0.1", f"split.seed={seed}")
        assert run_stage(root, "split", name, *arguments, SM_OUTPUT_DATA_DIR=root / name) == 0
    return root


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of this host make when nothing happens to them."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = fold(world, folder, NPROC="2")
    assert code == 0, said
    assert "BatchNorm normalises by each process's own rows" in said
    return folder


def given(world: Path, folder: Path, **more: object) -> dict[str, str]:
    own = variables(world, folder, EVAL=None, FOLDS=world / "split")
    return environment(**{**own, "OMP_NUM_THREADS": 1, **more})


def begin(arguments: tuple[str, ...], environ: dict[str, str], *program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", *(program or ("-m", "jobs")), *arguments]
    return subprocess.Popen(
        command, env=environ, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ends_well(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    return said


def fold(world: Path, folder: Path, arguments: tuple[str, ...] = SMALL, **more: str) -> tuple[int, str]:
    """Runs train-fold to its end."""
    process = begin(("train-fold", *arguments), given(world, folder, **more))
    said = process.communicate(timeout=240)[1]
    return process.returncode, said


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if f" epoch={epoch} " in line:
            return
    raise AssertionError(f"no epoch {epoch}: {process.communicate()[1]}")


def table(folder: Path) -> list[list[float]]:
    lines = (folder / "model" / "train_log.csv").read_text().splitlines()[1:]
    return [[float(cell) for cell in line.split(",") if cell] for line in lines]


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it has started, in the order of their ranks."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    by_rank = {}
    for number in found:
        environ = dict(
            each.split("=", 1) for each in Path(f"/proc/{number}/environ").read_text().split("\0") if "=" in each
        )
        by_rank[int(environ["RANK"])] = int(number)
    return [by_rank[rank] for rank in sorted(by_rank)]


def same_files(one: Path, other: Path) -> None:
    for name in BYTES:
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_train_as_one_and_predict_every_row_once(world, tmp_path):
    assert run("train-fold", list(WITHOUT_NORMS), given(world, tmp_path / "one")) == 0
    code, said = fold(world, tmp_path / "two", WITHOUT_NORMS, NPROC="2")
    assert code == 0, said
    assert "train-fold: 2 processes" in said
    for one, two in zip(table(tmp_path / "one"), table(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    for name in ("oof", "holdout"):
        one, two = (predictions.read(tmp_path / which / "model" / f"{name}.parquet") for which in ("one", "two"))
        assert list(one.ids) == list(two.ids)
        assert len(set(two.ids)) == len(two.ids) > 10
        np.testing.assert_allclose(two.log_probs, one.log_probs, rtol=1e-3, atol=1e-4)
    records = [json.loads((tmp_path / which / "model" / "stage.json").read_text()) for which in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["key"] == records[1]["key"], "as with threads, the result is as good"
    models = [json.loads((tmp_path / which / "model" / "model.json").read_text()) for which in ("one", "two")]
    assert [model.get("processes") for model in models] == [None, 2]


@pytest.mark.slow
def test_what_is_done_is_skipped_by_all(world, whole):
    code, said = fold(world, whole, NPROC="2")
    assert (code, said.count("train-fold: nothing to do")) == (0, 1), said
    code, said = fold(world, whole)
    assert (code, said.count("train-fold: nothing to do")) == (0, 1), "whoever made it"


@pytest.mark.slow
@pytest.mark.parametrize("struck", ["the starter", "everybody", 0, 1])
def test_stopped_or_with_one_killed_all_end_and_the_same_command_goes_on(struck, world, whole, tmp_path):
    """Docker and Kubernetes tell a container's first process, systemd and a batch system all of them."""
    process = begin(("train-fold", *SMALL), given(world, tmp_path, NPROC="2"))
    wait_for_epoch(process, 5)
    pids = children(process)
    if struck in (0, 1):
        os.kill(pids[struck], signal.SIGKILL)
    else:
        for pid in [process.pid, *(pids if struck == "everybody" else [])]:
            os.kill(pid, signal.SIGTERM)
    said = process.communicate(timeout=SECONDS_TO_END)[1]
    if struck in (0, 1):
        assert process.returncode == 75, said
        assert failure(tmp_path).startswith(f"process {struck} of 2 was killed by SIGKILL")
    else:
        assert process.returncode == 143, said
        assert said.count("stopped by SIGTERM") == 2
        assert not (tmp_path / "failure").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (tmp_path / "model" / "stage.json").exists()
    code, said = fold(world, tmp_path, NPROC="2")
    assert code == 0, said
    assert "after step" in said
    same_files(whole, tmp_path)


@pytest.mark.slow
def test_told_to_stop_while_one_stands_still_and_the_other_waits_for_it_both_end(world, tmp_path):
    process = begin(("train-fold", *SMALL), given(world, tmp_path, NPROC="2"))
    wait_for_epoch(process, 5)
    pids = children(process)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(2)  # the other one comes to where both add up their gradients
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=SECONDS_TO_END)[1]
    assert process.returncode == 143, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_when_the_starter_is_killed_no_process_trains_on(world, tmp_path):
    process = begin(("train-fold", *SMALL), given(world, tmp_path, NPROC="2"))
    wait_for_epoch(process, 3)
    pids = children(process)
    process.kill()
    process.communicate(timeout=SECONDS_TO_END)
    until = time.monotonic() + SECONDS_TO_END
    while any(_runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hosts(
    world: Path, folder: Path, first: dict[str, str], second: dict[str, str], arguments: tuple[str, ...] = SMALL
) -> list[subprocess.Popen[str]]:
    """Two hosts of one process each on this machine, with outputs and variables of their own."""
    met = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NPROC": "1"}
    return [
        begin(
            ("train-fold", *arguments),
            {**given(world, folder / f"host-{rank}"), **met, "NODE_RANK": str(rank), **own},
        )
        for rank, own in enumerate((first, second))
    ]


@pytest.mark.slow
def test_two_hosts_train_as_two_processes_of_one_and_the_first_alone_has_results(world, whole, tmp_path):
    """In pods of an Indexed Job, whose index is then the host's and not the fold's."""
    started = hosts(world, tmp_path, {"JOB_COMPLETION_INDEX": "0"}, {"JOB_COMPLETION_INDEX": "1"})
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    same_files(whole, tmp_path / "host-0")
    left = [path for path in (tmp_path / "host-1").rglob("*") if path.is_file()]
    assert left == []


@pytest.mark.slow
def test_a_signal_to_one_host_stops_both_and_a_lost_one_is_75(world, tmp_path):
    started = hosts(world, tmp_path, {}, {})
    wait_for_epoch(started[0], 3)
    started[1].send_signal(signal.SIGTERM)
    assert [process.wait(SECONDS_TO_END) for process in started] == [143, 143]
    for process in started:
        process.communicate()
    started = hosts(world, tmp_path, {}, {})
    wait_for_epoch(started[0], 6)
    started[1].kill()
    said = [process.communicate(timeout=SECONDS_TO_END)[1] for process in started]
    assert started[0].returncode == 75, said
    assert " is gone" in failure(tmp_path / "host-0")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_host_that_waits_for_another_can_be_stopped(rank, world, tmp_path):
    met = {"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NPROC": "1"}
    process = begin(("train-fold", *SMALL), given(world, tmp_path, **met))
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "on each of 2 hosts" in line
    assert line.rstrip().endswith(rank)
    time.sleep(6)  # until torch is there, and it waits
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=SECONDS_TO_END)[1]
    assert process.returncode == 143, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"SM_CHANNEL_FOLDS": "other"}, "its folds.parquet "),
        ({"TRAIN__LR": "0.9"}, "its settings "),
    ],
)
def test_hosts_that_are_given_different_things_are_told(own, message, world, tmp_path):
    if "SM_CHANNEL_FOLDS" in own:
        own = {"SM_CHANNEL_FOLDS": str(world / "other")}
    arguments = tuple(each for each in SMALL if not each.startswith("train.lr="))
    started = hosts(world, tmp_path, {}, own, arguments)
    said = [process.communicate(timeout=SECONDS_TO_END)[1] for process in started]
    assert [process.returncode for process in started] == [75, 64], said
    assert message in failure(tmp_path / "host-1")


@pytest.mark.slow
def test_torchrun_starts_the_processes_as_well(world, whole, tmp_path):
    program = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "jobs")
    process = begin(("train-fold", *SMALL), given(world, tmp_path / "run"), *program)
    ends_well(process)
    same_files(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_student_and_a_model_without_a_split_are_trained_by_two_as_well(world, tmp_path):
    for number in range(2):
        arguments = ("train-fold", *WITHOUT_NORMS[1:], f"FOLD={number}")
        process = begin(arguments, given(world, tmp_path / f"fold-{number}", NPROC="2"))
        ends_well(process)
    more = ("distill.teacher_tta=flip", "distill.teacher=oof")
    for name, count in (("one", "1"), ("two", "2")):
        environ = given(world, tmp_path / name, NPROC=count, SM_CHANNEL_MODEL=str(tmp_path))
        environ["SM_MODEL_DIR"] = str(tmp_path.parent / f"student-{tmp_path.name}-{name}" / "model")
        process = begin(("distill", *WITHOUT_NORMS[1:], *more), environ)
        ends_well(process)
    logs = [table(tmp_path.parent / f"student-{tmp_path.name}-{name}") for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    environ = given(world, tmp_path / "train", NPROC="2")
    del environ["SM_CHANNEL_FOLDS"]
    process = begin(("train", *WITHOUT_NORMS), environ)
    ends_well(process)
    assert (tmp_path / "train" / "output" / "split" / "folds.parquet").is_file()


@pytest.mark.slow
def test_from_a_bucket_two_processes_fetch_every_file_once_and_send_the_same_results(bucket, world, whole, tmp_path):
    for folder in ("train", "split"):
        for path in (world / folder).rglob("*"):
            if path.is_file():
                bucket.write(path.relative_to(world).as_posix(), path.read_bytes())
    proxy = Proxy(bucket.endpoint)
    with proxy.listening() as endpoint:
        at = {"CHANNEL_TRAIN": "train", "CHANNEL_FOLDS": "split", "MODEL_DIR": "model", "OUTPUT_DATA_DIR": "output"}
        urls = {f"SM_{name}": f"s3://{bucket.name}/{key}" for name, key in at.items()}
        code, said = fold(world, tmp_path, NPROC="2", **urls, **bucket.environ(endpoint))
    assert code == 0, said
    read = [request.path.partition("?")[0] for request in proxy.requests if request.method == "GET"]
    pictures = [path for path in read if "/train/" in path]
    assert len(pictures) == len(set(pictures)) == len(list((world / "train").rglob("*.png")))
    for name in BYTES:
        (key,) = [key for key in bucket.listed("model/") if key.endswith(f"/{name}")]
        assert bucket.read(key) == (whole / "model" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"NPROC": "2", "TRAIN__BATCH_SIZE": "3"}, "train.batch_size=3 is the batch of all 2 processes together"),
        ({"NPROC": "2", "TRAIN__LR": "fast"}, "train.lr"),
        ({"NPROC": "0"}, "NPROC=0 is not a whole number from 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 is out of range"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 is out of range"),
    ],
)
def test_numbers_that_cannot_be_are_64(more, message, world, tmp_path, caplog):
    arguments = [each for each in SMALL if not each.startswith(("train.batch_size", "train.lr"))]
    assert run("train-fold", arguments, given(world, tmp_path, **more)) == 64
    assert failure(tmp_path).startswith(message)
    assert not (tmp_path / "model").exists()


def test_other_stages_run_on_the_first_host_alone(world, tmp_path):
    met = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}
    assert run("split", [], given(world, tmp_path / "second", **met)) == 0
    assert not (tmp_path / "second").exists()
    assert run("split", [], given(world, tmp_path / "first", **{**met, "NODE_RANK": "0"})) == 0
    assert (tmp_path / "first" / "output" / "folds.parquet").is_file()
    under = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environ = given(world, tmp_path / "third", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", **under)
    assert run("split", [], environ) == 0
    assert not (tmp_path / "third").exists()
