"""Steps as processes of this machine: what they see, side by side, failing, stopped."""

import os
import signal
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fivefold.contract.files import read_json
from fivefold.errors import MissingInputError, RetryableError, SettingsError
from fivefold.launchers import local
from fivefold.launchers.plan import Inputs, Plan, Step, make_plan, select
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.status import STATE, read_status, running_pid
from fivefold.launchers.terminal import SharedTerminal
from fivefold.system import GLIBC_TUNABLES
from reference_run import REPOSITORY, wait_until


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six grey images of each of two classes, no two alike."""
    for number in range(12):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number * 20).save(path)
    return tmp_path / "train"


def plan_of(images: Path, *stages: str) -> Plan:
    inputs = Inputs(train=str(images), eval=str(images))
    plan = make_plan(inputs, ["split.folds=3"], run="r", runs=str(images.parent / "runs"))
    return select(plan, stages)


def submit(images: Path, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs", "submit", f"train={images}", f"runs={images.parent / 'runs'}"]
    command += ["run=r", "stages=split", "split.folds=3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, **{**pipes, **more})


ASLEEP = """
import os, signal, time
if "SM_OUTPUT_DIR" in os.environ:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("asleep", flush=True)
    time.sleep(60)
"""


def endless_steps(folder: Path) -> dict[str, str]:
    """An environment in which a step's process starts, lets SIGINT pass, and does no more until it is stopped."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ASLEEP)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_step_sees_the_users_environment_less_what_the_contract_gives_a_meaning_to() -> None:
    step = Step("fold-0", "train-fold", (), {"SM_MODEL_DIR": "m"}, Path("f"), ())
    users = {"HOME": "/h", "SM_LOG_LEVEL": "30"}
    others = ["SM_CHANNEL_TRAIN", "SM_HPS", "SM_HP_LR", "FOLD", "fold", "STAGE", "RECIPE", "RUN", "SEED"]
    others += ["TRAIN__EPOCHS", "split__folds", "JOB_COMPLETION_INDEX", "SAGEMAKER_BASE_DIR"]
    environ = users | dict.fromkeys(others, "1")
    added = {"PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "20000", "GLIBC_TUNABLES": GLIBC_TUNABLES, "SM_MODEL_DIR": "m"}
    assert local.step_environment(step, environ) == users | added
    assert local.settings_variables(environ) == sorted(n for n in others if not n.startswith("SM_"))

    given = local.step_environment(step, {"GOMP_SPINCOUNT": "7"}, gpu="3", threads=2)
    assert (given["CUDA_VISIBLE_DEVICES"], given["OMP_NUM_THREADS"], given["GOMP_SPINCOUNT"]) == ("3", "2", "7")
    assert local.step_environment(step, {"OMP_NUM_THREADS": "7"}, threads=2)["OMP_NUM_THREADS"] == "7"


def test_folds_stand_side_by_side_one_a_gpu_or_one_a_core_while_memory_lasts(images: Path, monkeypatch) -> None:
    plan = plan_of(images, "split", "train-fold", "ensemble")  # of three folds
    for gpus, cores, memory, expected in (
        (["0", "1"], 64, 1 << 40, 2),
        ([], 64, 1 << 40, 3),
        ([], 1, 1 << 40, 1),
        ([], 64, 1 << 30, 1),
        ([], 64, int(2.5 * local.FOLD_MEMORY_BYTES), 2),
        ([], 2, 1 << 40, 3),  # two, then one, would leave a core idle
        ([], 2, int(2.5 * local.FOLD_MEMORY_BYTES), 2),
    ):
        monkeypatch.setattr(local, "count_cores", lambda cores=cores: cores)
        monkeypatch.setattr(local, "free_memory", lambda memory=memory: memory)
        assert local.default_parallelism(plan, gpus) == expected
    assert local.default_parallelism(plan_of(images, "split"), []) == 1


def test_gpus_are_counted_without_torch(tmp_path: Path) -> None:
    path = {"PATH": str(tmp_path)}
    for visible, expected in (("2,5", ["2", "5"]), ("", []), ("-1", [])):
        assert local.list_gpus({"CUDA_VISIBLE_DEVICES": visible, **path}) == expected
    assert local.list_gpus(path) == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g'\necho 'GPU 1: A (UUID: y)'\n")
    program.chmod(0o755)
    assert local.list_gpus(path) == ["0", "1"]


def test_inputs_must_be_there_and_the_truth_is_found_beside_the_test_table(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="unlabeled="):
        local.check_inputs(Inputs(train=str(tmp_path), unlabeled=str(tmp_path / "no")), tmp_path)
    folder, run = tmp_path / "eval", tmp_path / "run"
    inputs = Inputs(train=str(tmp_path), eval=str(folder))
    (folder / "deep").mkdir(parents=True)
    (folder / "gt.csv").write_text("ID,label\n")
    assert local.check_inputs(inputs, run).ground_truth is None, "no test.csv stands beside it"
    (folder / "deep" / "test.csv").write_text("ID\n")
    (folder / "deep" / "gt.csv").write_text("ID,label\n")
    assert local.check_inputs(inputs, run).ground_truth == str(folder / "deep" / "gt.csv")
    assert local.check_inputs(replace(inputs, ground_truth=str(folder)), run).ground_truth == str(folder)


def test_the_truth_is_taken_out_of_a_zip_only_when_the_run_starts_and_never_in_place_of_the_users(
    tmp_path: Path,
) -> None:
    archive, run, own = tmp_path / "all.zip", tmp_path / "run", tmp_path / "mine.csv"
    own.write_text("mine")
    for label in ("a", "넷"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("set/test.csv", "ID\n")
            file.writestr("set/gt.csv", f"\ufeffID,label\n1,{label}\n")
        inputs = local.check_inputs(Inputs(train=str(archive), eval=str(archive)), run)
        assert inputs.ground_truth == str(run / "gt.csv")
        assert run.exists() == (label != "a")
        for given in (inputs, replace(inputs, ground_truth=str(own))):
            local.unpack_ground_truth(given, run)
        assert (run / "gt.csv").read_text(encoding="utf-8-sig") == f"ID,label\n1,{label}\n", (
            "a corrected one replaces it"
        )
    assert own.read_text() == "mine"


def test_a_step_leaves_its_files_and_has_nothing_to_do_again(images: Path) -> None:
    plan = plan_of(images, "split")
    assert local.launch(plan) == 0
    step = plan.step("split")
    assert (step.folder / "output" / "folds.parquet").is_file()
    assert read_status(step).state == "done"
    state = read_json(step.folder / STATE)
    assert state["exit_code"] == 0
    assert state["ended"] >= state["started"]
    assert local.launch(plan) == 0
    log = (step.folder / "log.txt").read_text()
    assert log.count("split runs: no record of an earlier run") == 1
    assert log.count("nothing to do") == 1


def test_siblings_of_a_failure_end_and_each_has_a_gpu(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(images, "train-fold", "ensemble")  # of folds that no split has made
    given: list[str] = []

    def environment(step: Step, gpu: str) -> dict[str, str]:
        given.append(gpu)
        return local.step_environment(step, os.environ)

    screen = SharedTerminal()
    backend = local.LocalBackend(screen, ["0", "1"], environment)
    assert Scheduler(plan.steps, backend, screen, parallel=2, poll_interval=0.03).run() == 66
    said = capfd.readouterr().err
    for name in ("fold-0", "fold-1", "fold-2"):
        assert read_status(plan.step(name)).state == "failed"
        assert f"[{name}] " in said
        assert f"{name} failed (exit code 66): channel 'folds'" in said
        assert str(plan.step(name).folder / "log.txt") in said
    assert not plan.step("ensemble").folder.exists()
    assert sorted(given[:2]) == ["0", "1"]


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, (143, 143)), (signal.SIGINT, (130, 137))])
def test_a_signal_is_passed_on_and_waited_for_and_a_second_one_kills(
    images: Path, tmp_path: Path, number: int, codes: tuple[int, int]
) -> None:
    step = plan_of(images, "split").step("split")
    log = step.folder / "log.txt"
    process = submit(images, env=endless_steps(tmp_path / "hook"))
    try:
        wait_until(lambda: log.is_file() and "asleep" in log.read_text())
        assert read_status(step).state == "running"
        with pytest.raises(RetryableError, match="wait for it"):
            local.launch(plan_of(images, "split"))
        process.send_signal(number)
        if number == signal.SIGINT:  # which the step lets pass
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.send_signal(number)
        said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, read_json(step.folder / STATE)["exit_code"]) == codes
    assert f"{signal.Signals(number).name}: waiting for split" in said
    assert read_status(step).state == "stopped"
    assert running_pid(step) is None


def test_alone_on_a_terminal_a_step_has_a_terminal(images: Path) -> None:
    ours, theirs = os.openpty()
    process = submit(images, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    said = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal, suppress(OSError):
        while portion := terminal.read(65536):
            said += portion
    assert process.wait(20) == 0
    assert b"split runs: no record" in said
    assert b"[split]" not in said
    log = (images.parent / "runs" / "r" / "split" / "log.txt").read_bytes()
    assert b"split runs: no record" in log
    assert not {0x0D, 0x1B} & {*log}


def test_models_of_another_plan_in_the_run_are_refused_by_name(tmp_path: Path) -> None:
    plan = make_plan(Inputs(train="t"), ["split.folds=2"], run="r", runs=str(tmp_path))
    for name in ("fold-0", "fold-1-seed-43"):
        (tmp_path / "r" / name / "model").mkdir(parents=True)
        (tmp_path / "r" / name / "model" / "model.json").write_text("{}")
    with pytest.raises(SettingsError, match=r": fold-1-seed-43;"):
        local.check_no_foreign_models(plan)
