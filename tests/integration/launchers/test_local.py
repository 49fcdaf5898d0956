"""Steps as local processes: their environments, parallel runs, failures and signals."""

import os
import signal
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fivefold.contract.files import read_json
from fivefold.errors import MissingInputError, RetryableError, SettingsError
from fivefold.launchers import local
from fivefold.launchers.plan import Inputs, Plan, Step, make_plan, select
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.status import STATE, read_status, running_pid
from fivefold.system import GLIBC_TUNABLES
from jobs.__main__ import run
from reference_run import start_submit, wait_until
from toy_data import noise_in


@pytest.fixture
def images(tmp_path: Path) -> Path:
    noise_in(tmp_path / "train", ("a", "b"), 6)
    return tmp_path / "train"


def make_image_plan(images: Path, *stages: str) -> Plan:
    inputs = Inputs(train=str(images), eval=str(images))
    plan = make_plan(inputs, ["split.folds=3"], run="r", runs=str(images.parent / "runs"))
    return select(plan, stages)


SLEEP_HOOK = """
import os, signal, time
if "SM_OUTPUT_DIR" in os.environ:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("asleep", flush=True)
    time.sleep(60)
"""
"""A sitecustomize.py with which a step ignores SIGINT and sleeps until it is stopped."""


def test_step_environment_drops_user_variables_that_configure_a_stage():
    step = Step("fold-0", "train-fold", (), {"SM_MODEL_DIR": "m"}, Path("f"), ())
    user_variables = {"HOME": "/h", "SM_LOG_LEVEL": "30"}
    contract_variables = ["SM_CHANNEL_TRAIN", "SM_HPS", "SM_HP_LR", "FOLD", "fold", "STAGE", "RECIPE", "RUN", "SEED"]
    contract_variables += ["TRAIN__EPOCHS", "split__folds", "JOB_COMPLETION_INDEX", "SAGEMAKER_BASE_DIR"]
    environ = user_variables | dict.fromkeys(contract_variables, "1")
    step_variables = {"PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "20000", "GLIBC_TUNABLES": GLIBC_TUNABLES}
    assert local.step_environment(step, environ) == {**user_variables, **step_variables, "SM_MODEL_DIR": "m"}
    assert set(local.settings_variables(environ)) == {name for name in contract_variables if name[:3] != "SM_"}

    environment = local.step_environment(step, {"GOMP_SPINCOUNT": "7"}, gpu="3", threads=2)
    expected = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7"}
    assert environment.items() >= expected.items()
    assert local.step_environment(step, {"OMP_NUM_THREADS": "7"}, threads=2)["OMP_NUM_THREADS"] == "7"


def test_default_parallelism_is_limited_by_gpus_cores_and_memory(images, monkeypatch):
    plan = make_image_plan(images, "split", "train-fold", "ensemble")  # of three folds
    for gpus, cores, memory, expected in (
        (["0", "1"], 64, 1 << 40, 2),
        ([], 64, 1 << 40, 3),
        ([], 1, 1 << 40, 1),
        ([], 64, 1 << 30, 1),
        ([], 64, int(2.5 * local.FOLD_MEMORY_BYTES), 2),
        ([], 2, 1 << 40, 3),  # two folds, then one, would leave a core idle
        ([], 2, int(2.5 * local.FOLD_MEMORY_BYTES), 2),
    ):
        monkeypatch.setattr(local, "count_cores", lambda cores=cores: cores)
        monkeypatch.setattr(local, "free_memory", lambda memory=memory: memory)
        assert local.default_parallelism(plan, gpus) == expected
    assert local.default_parallelism(make_image_plan(images, "split"), []) == 1


def test_list_gpus_needs_no_torch(tmp_path):
    path = {"PATH": str(tmp_path)}
    for visible, expected in (("2,5", ["2", "5"]), ("", []), ("-1", [])):
        assert local.list_gpus({"CUDA_VISIBLE_DEVICES": visible, **path}) == expected
    assert local.list_gpus(path) == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g'\necho 'GPU 1: A (UUID: y)'\n")
    program.chmod(0o755)
    assert local.list_gpus(path) == ["0", "1"]


def test_check_inputs_needs_existing_paths_and_finds_labels_next_to_the_test_table(tmp_path):
    with pytest.raises(MissingInputError, match="unlabeled="):
        local.check_inputs(Inputs(train=str(tmp_path), unlabeled=str(tmp_path / "no")), tmp_path)
    folder, run = tmp_path / "eval", tmp_path / "run"
    inputs = Inputs(train=str(tmp_path), eval=str(folder))
    (folder / "deep").mkdir(parents=True)
    (folder / "gt.csv").write_text("ID,label\n")
    assert local.check_inputs(inputs, run).ground_truth is None, "there is no test.csv next to it"
    (folder / "deep" / "test.csv").write_text("ID\n")
    (folder / "deep" / "gt.csv").write_text("ID,label\n")
    assert local.check_inputs(inputs, run).ground_truth == str(folder / "deep" / "gt.csv")
    assert local.check_inputs(replace(inputs, ground_truth=str(folder)), run).ground_truth == str(folder)


def test_labels_are_unpacked_from_a_zip_only_at_the_start_and_never_replace_user_files(tmp_path):
    archive, run, user_file = tmp_path / "all.zip", tmp_path / "run", tmp_path / "mine.csv"
    user_file.write_text("mine")
    for label in ("a", "넷"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("set/test.csv", "ID\n")
            file.writestr("set/gt.csv", f"\ufeffID,label\n1,{label}\n")
        inputs = local.check_inputs(Inputs(train=str(archive), eval=str(archive)), run)
        assert inputs.ground_truth == str(run / "gt.csv")
        assert run.exists() == (label != "a")
        for run_inputs in (inputs, replace(inputs, ground_truth=str(user_file))):
            local.unpack_ground_truth(run_inputs, run)
        assert (run / "gt.csv").read_text(encoding="utf-8-sig") == f"ID,label\n1,{label}\n"
    assert user_file.read_text() == "mine"


def test_finished_step_is_skipped_and_its_output_is_logged_and_shown(images, capfd):
    plan = make_image_plan(images, "split")
    step = plan.step("split")
    assert run("split", step.arguments, step.environment) == 0
    capfd.readouterr()
    assert local.launch(plan) == 0
    assert read_status(step).state == "done"
    assert read_json(step.folder / STATE)["exit_code"] == 0
    title, *log = (step.folder / "log.txt").read_text().splitlines()
    assert title[24:] == "split split.folds=3"
    assert sum("nothing to do" in line for line in log) == 1
    assert capfd.readouterr().err.splitlines() == [f"[split] {line}" for line in log]


def test_new_lines_of_a_log_are_complete_and_of_a_progress_bar_the_last_state(tmp_path):
    with open(tmp_path / "log.txt", "w+b", buffering=0) as written, open(tmp_path / "log.txt", "rb") as log:
        process = local.StepProcess(None, log, "")
        for text, lines in (
            (b"one\n\nthr\xc3", ["one", ""]),
            (b"\xa9e\r\n", ["thr\xe9e"]),
            (b"\r 10%|\r100%|\r\n\xff\n", ["100%|", "\ufffd"]),
        ):
            written.write(text)
            assert process.read_new_lines() == lines


def test_failed_folds_do_not_stop_each_other_and_each_uses_a_gpu(images, capfd):
    plan = make_image_plan(images, "train-fold", "ensemble")  # no split has created the folds
    used_gpus: list[str] = []

    def environment(step: Step, gpu: str) -> dict[str, str]:
        used_gpus.append(gpu)
        return local.step_environment(step, os.environ)

    backend = local.LocalBackend(["0", "1"], environment)
    assert Scheduler(plan.steps, backend, parallel=2, poll_interval=0.03).run() == 66
    output = capfd.readouterr().err
    for name in ("fold-0", "fold-1", "fold-2"):
        assert read_status(plan.step(name)).state == "failed"
        assert f"[{name}] " in output
        assert f"{name} failed (exit code 66): channel 'folds'" in output
        assert str(plan.step(name).folder / "log.txt") in output
    assert not plan.step("ensemble").folder.exists()
    assert sorted(used_gpus[:2]) == ["0", "1"]


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, (143, 143)), (signal.SIGINT, (130, 137))])
def test_signal_is_forwarded_to_steps_and_a_second_one_kills_them(images, tmp_path, number, codes):
    step = make_image_plan(images, "split").step("split")
    log = step.folder / "log.txt"
    (tmp_path / "sitecustomize.py").write_text(SLEEP_HOOK)
    keys = [f"train={images}", f"runs={tmp_path}/runs", "run=r", "stages=split", "split.folds=3"]
    process = start_submit(*keys, PYTHONPATH=str(tmp_path))
    try:
        wait_until(lambda: log.is_file() and "asleep" in log.read_text())
        assert read_status(step).state == "running"
        with pytest.raises(RetryableError, match="wait for it"):
            local.launch(make_image_plan(images, "split"))
        process.send_signal(number)
        if number == signal.SIGINT:  # which the step ignores
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, read_json(step.folder / STATE)["exit_code"]) == codes
    assert f"{signal.Signals(number).name}: waiting for split" in output
    assert read_status(step).state == "stopped"
    assert running_pid(step) is None


def test_models_of_another_plan_in_the_run_raise_an_error_that_names_them(tmp_path):
    plan = make_plan(Inputs(train="t"), ["split.folds=2"], run="r", runs=str(tmp_path))
    for name in ("fold-0", "fold-1-seed-43"):
        (tmp_path / "r" / name / "model").mkdir(parents=True)
        (tmp_path / "r" / name / "model" / "model.json").write_text("{}")
    with pytest.raises(SettingsError, match=r": fold-1-seed-43;"):
        local.check_no_foreign_models(plan)
