"""One fold trained by several processes through the entrypoint: results, signals, hosts and torchrun."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fivefold import predictions
from fivefold.contract.files import read_json
from jobs.__main__ import run
from s3_server import Proxy
from toy_data import REPOSITORY, RESUMES, environment, failure, run_stage, tinted_in, variables

COMMON_SETTINGS = (
    "train.epochs=2", "train.batch_size=8", "train.precision=fp32", 'augment.train=["random_crop", "horizontal_flip"]',
)  # fmt: skip
WITHOUT_BATCHNORM = (
    *COMMON_SETTINGS, "model.backbone=timm/vit_tiny_patch16_224", "model.image_size=12", "model.dropout=0",
    'model.backbone_kwargs={"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    "train.optimizer=sgd", "train.lr=0.05", "train.ema_decay=0.9", "augment.batch_mix=cutmix", "predict.tta=plain,flip",
)  # fmt: skip
SMALL_MODEL = (*RESUMES, *COMMON_SETTINGS, "train.save_raw_weights=true", "augment.batch_mix=mixup", "train.epochs=20")
MODEL_FILES = (
    "model.safetensors",
    "model_raw.safetensors",
    "oof.parquet",
    "holdout.parquet",
    "train_log.csv",
    "model.json",
)
SECONDS_TO_END = 45


@pytest.fixture(scope="module")
def split_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated images of two classes and two different splits of them."""
    root = tmp_path_factory.mktemp("world")
    tinted_in(root / "train", ["a", "b"], 53, by=60)
    for name, seed in (("split", 1), ("other", 2)):
        arguments = ("split.folds=2", "split.holdout=0.1", f"split.seed={seed}")
        assert run_stage(root, "split", name, *arguments, SM_OUTPUT_DATA_DIR=root / name) == 0
    return root


@pytest.fixture(scope="module")
def uninterrupted_run(split_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two local processes that are not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert "BatchNorm normalises by each process's own rows" in wait_for_exit(start_training(split_data, folder))
    return folder


def make_environment(split_data: Path, folder: Path, **more: object) -> dict[str, str]:
    channels = variables(split_data, folder, EVAL=None, FOLDS=split_data / "split")
    return environment(**{**channels, "OMP_NUM_THREADS": 1, **more})


def start_stage(arguments: tuple[str, ...], environ: dict[str, str], *program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", *(program or ("-m", "jobs")), *arguments]
    return subprocess.Popen(
        command, env=environ, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_exit(process: subprocess.Popen[str], code: int = 0, timeout: int = 240) -> str:
    """Wait for the exit code `code` and return the log."""
    log = process.communicate(timeout=timeout)[1]
    assert process.returncode == code, log
    return log


def start_training(split_data: Path, folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start train-fold with two processes."""
    return start_stage(("train-fold", *SMALL_MODEL), make_environment(split_data, folder, **{"NPROC": "2", **more}))


def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if f" epoch={epoch} " in line:
            return
    raise AssertionError(f"no epoch {epoch}: {process.communicate()[1]}")


def read_curve(folder: Path) -> list[list[float]]:
    lines = (folder / "model" / "train_log.csv").read_text().splitlines()[1:]
    return [[float(cell) for cell in line.split(",") if cell] for line in lines]


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """Return the ids of the child processes in rank order."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    by_rank = {}
    for number in pids:
        items = Path(f"/proc/{number}/environ").read_text().split("\0")
        by_rank[dict(item.split("=", 1) for item in items if "=" in item)["RANK"]] = int(number)
    return [by_rank[rank] for rank in sorted(by_rank)]


def assert_same_files(one: Path, other: Path) -> None:
    for name in MODEL_FILES:
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_match_one_and_predict_every_row_once(split_data, tmp_path):
    arguments = ["FOLD=0", *WITHOUT_BATCHNORM]
    assert run("train-fold", arguments, make_environment(split_data, tmp_path / "one")) == 0
    assert run("train-fold", arguments, make_environment(split_data, tmp_path / "two", NPROC="2")) == 0
    for one, two in zip(read_curve(tmp_path / "one"), read_curve(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    for name in ("oof", "holdout"):
        one, two = (predictions.read(tmp_path / which / "model" / f"{name}.parquet") for which in ("one", "two"))
        assert list(one.ids) == list(two.ids)
        assert len(set(two.ids)) == len(two.ids) > 10
        np.testing.assert_allclose(two.log_probs, one.log_probs, rtol=1e-3, atol=1e-4)
    records = [read_json(tmp_path / which / "model" / "stage.json") for which in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["key"] == records[1]["key"], "the number of processes is not part of the key"
    models = [read_json(tmp_path / which / "model" / "model.json") for which in ("one", "two")]
    assert [model.get("processes") for model in models] == [None, 2]


@pytest.mark.slow
def test_all_ranks_skip_a_finished_stage(split_data, uninterrupted_run):
    log = wait_for_exit(start_training(split_data, uninterrupted_run))
    assert log.count("train-fold: nothing to do") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_all_ranks_end_after_a_signal_and_the_same_command_resumes(number, split_data, uninterrupted_run, tmp_path):
    """SIGTERM to all processes, as systemd and batch systems send it; SIGKILL to one, as if memory ran out."""
    process = start_training(split_data, tmp_path)
    wait_for_epoch(process, 5)
    pids = rank_pids(process)
    for pid in pids[1:] if number == signal.SIGKILL else [process.pid, *pids]:
        os.kill(pid, number)
    log = wait_for_exit(process, 75 if number == signal.SIGKILL else 143, SECONDS_TO_END)
    if number == signal.SIGKILL:
        assert failure(tmp_path).startswith("process 1 of 2 was killed by SIGKILL")
    else:
        assert "stopped by SIGTERM" in log  # the forwarded second signal may end a rank before it logs this
        assert not (tmp_path / "failure").exists()
    assert not any(is_running(pid) for pid in pids)
    assert not (tmp_path / "model" / "stage.json").exists()
    assert "after step" in wait_for_exit(start_training(split_data, tmp_path))
    assert_same_files(uninterrupted_run, tmp_path)


@pytest.mark.slow
def test_sigterm_ends_both_ranks_while_one_is_suspended(split_data, tmp_path):
    """Docker and Kubernetes signal only a container's first process."""
    process = start_training(split_data, tmp_path)
    wait_for_epoch(process, 3)
    pids = rank_pids(process)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1)  # the other rank reaches the gradient all-reduce
    process.send_signal(signal.SIGTERM)
    wait_for_exit(process, 143, SECONDS_TO_END)
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.slow
def test_ranks_end_when_the_launcher_is_killed(split_data, tmp_path):
    process = start_training(split_data, tmp_path)
    wait_for_epoch(process, 1)
    pids = rank_pids(process)
    process.kill()
    process.communicate(timeout=SECONDS_TO_END)
    deadline = time.monotonic() + SECONDS_TO_END
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def host_variables(rank: int, port: int) -> dict[str, str]:
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"NNODES": "2", "NODE_RANK": str(rank), "NPROC": "1", **rendezvous}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start_hosts(
    split_data: Path, folder: Path, first: dict[str, str], second: dict[str, str]
) -> list[subprocess.Popen[str]]:
    """Start two hosts of one process each on this machine, with separate outputs and variables."""
    port = free_port()
    return [
        start_training(split_data, folder / f"host-{rank}", **host_variables(rank, port), **overrides)
        for rank, overrides in enumerate((first, second))
    ]


@pytest.mark.slow
def test_two_hosts_match_two_local_processes_and_only_the_first_writes_results(split_data, uninterrupted_run, tmp_path):
    """In pods of an Indexed Job, the index is then that of the host, not of the fold."""
    for process in start_hosts(split_data, tmp_path, {"JOB_COMPLETION_INDEX": "0"}, {"JOB_COMPLETION_INDEX": "1"}):
        wait_for_exit(process)
    assert_same_files(uninterrupted_run, tmp_path / "host-0")
    assert [path for path in (tmp_path / "host-1").rglob("*") if path.is_file()] == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, [143, 143]), (signal.SIGKILL, [75, -signal.SIGKILL])])
def test_signal_to_one_host_stops_both_and_a_lost_host_exits_75(number, codes, split_data, tmp_path):
    processes = start_hosts(split_data, tmp_path, {}, {})
    wait_for_epoch(processes[0], 2)
    processes[1].send_signal(number)
    for process, code in zip(processes, codes, strict=True):
        wait_for_exit(process, code, SECONDS_TO_END)
    assert (tmp_path / "host-0" / "failure").exists() == (codes[0] == 75)


@pytest.mark.slow
def test_waiting_host_can_be_stopped(split_data, tmp_path):
    process = start_training(split_data, tmp_path, **host_variables(1, free_port()))
    assert process.stderr is not None
    assert "on each of 2 hosts" in process.stderr.readline()
    time.sleep(6)  # until torch is loaded and the host waits
    process.send_signal(signal.SIGTERM)
    wait_for_exit(process, 143, SECONDS_TO_END)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"), [({"SM_CHANNEL_FOLDS": "other"}, "folds.parquet"), ({"SEED": "9"}, "settings")]
)
def test_hosts_with_different_splits_or_settings_fail(overrides, message, split_data, tmp_path):
    overrides = {name: str(split_data / value) if "FOLDS" in name else value for name, value in overrides.items()}
    processes = start_hosts(split_data, tmp_path, {}, overrides)
    for process, code in zip(processes, (75, 64), strict=True):
        wait_for_exit(process, code, SECONDS_TO_END)
    assert message in failure(tmp_path / "host-1")


@pytest.mark.slow
def test_torchrun_can_start_the_ranks(split_data, uninterrupted_run, tmp_path):
    program = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "jobs")
    wait_for_exit(start_stage(("train-fold", *SMALL_MODEL), make_environment(split_data, tmp_path / "run"), *program))
    assert_same_files(uninterrupted_run, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_match_one_for_a_student_and_train_a_model_without_a_split(split_data, tmp_path):
    def run_in_processes(count: int, stage: str, folder: Path, *arguments: str, **more: object) -> None:
        environ = make_environment(split_data, folder, NPROC=str(count), **more)
        if stage == "train":
            del environ["SM_CHANNEL_FOLDS"]
        assert run(stage, [*WITHOUT_BATCHNORM, *arguments], environ) == 0

    models, students = tmp_path / "models", {count: tmp_path / f"student-{count}" for count in (1, 2)}
    for fold in range(2):
        run_in_processes(1, "train-fold", models / f"fold-{fold}", f"FOLD={fold}", "train.epochs=1")
    for count, folder in students.items():
        teacher = ("distill.teacher_tta=flip", "distill.teacher=oof")
        run_in_processes(count, "distill", folder, *teacher, SM_CHANNEL_MODEL=models)
    for one, two in zip(read_curve(students[1]), read_curve(students[2]), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    one, two = (predictions.read(folder / "model" / "holdout.parquet") for folder in students.values())
    assert list(one.ids) == list(two.ids)
    np.testing.assert_allclose(two.log_probs, one.log_probs, rtol=1e-3, atol=1e-4)
    records = [read_json(folder / "model" / "stage.json") for folder in students.values()]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["key"] == records[1]["key"], "the number of processes is not part of the key"
    models = [read_json(folder / "model" / "model.json") for folder in students.values()]
    assert [model.get("processes") for model in models] == [None, 2]
    run_in_processes(2, "train", tmp_path / "train", "train.epochs=1")
    assert (tmp_path / "train" / "output" / "split" / "folds.parquet").is_file()


@pytest.mark.slow
def test_two_processes_read_each_bucket_file_once_and_upload_the_same_results(
    bucket, split_data, uninterrupted_run, tmp_path
):
    for folder in ("train", "split"):
        for path in (split_data / folder).rglob("*"):
            if path.is_file():
                bucket.write(path.relative_to(split_data).as_posix(), path.read_bytes())
    keys = {"CHANNEL_TRAIN": "train", "CHANNEL_FOLDS": "split", "MODEL_DIR": "model", "OUTPUT_DATA_DIR": "output"}
    urls = {f"SM_{name}": f"s3://{bucket.name}/{key}" for name, key in keys.items()}
    proxy = Proxy(bucket.endpoint)
    with proxy.listening() as endpoint:
        wait_for_exit(start_training(split_data, tmp_path, **urls, **bucket.environ(endpoint)))
    read = [request.path.partition("?")[0] for request in proxy.requests if request.method == "GET"]
    image_paths = [path for path in read if "/train/" in path]
    assert len(image_paths) == len(set(image_paths)) == len(list((split_data / "train").rglob("*.png")))
    for name in MODEL_FILES:
        (key,) = [key for key in bucket.listed("model/") if key.endswith(f"/{name}")]
        assert bucket.read(key) == (uninterrupted_run / "model" / name).read_bytes(), name


def test_other_stages_run_only_on_the_first_host(split_data, tmp_path):
    second_rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, more, runs in (
        ("first", host_variables(0, 1), True),
        ("second", host_variables(1, 1), False),
        ("torchrun", {**second_rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, False),
    ):
        assert run("split", [], make_environment(split_data, tmp_path / name, **more)) == 0
        assert (tmp_path / name / "output" / "folds.parquet").is_file() == runs
        assert (tmp_path / name).exists() == runs
