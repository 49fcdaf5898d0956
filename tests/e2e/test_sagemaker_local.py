"""SageMaker's local mode on a real Docker engine, with the real SDKs: no region, no credentials, the same bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docker_helpers import IMAGE, ONE_THREAD, differing, docker
from fivefold.errors import DataError
from reference_run import REPOSITORY, SETTINGS, submit, wait_until

pytestmark = pytest.mark.docker
NO_AWS = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
"""Hides the region and credentials that this machine may have."""


def make_args(digits: Path, runs: Path, *more: str) -> list[str]:
    inputs = ["platform=sagemaker-local", f"train={digits / 'train'}", f"eval={digits / 'test'}", f"runs={runs}"]
    return [*inputs, f"sagemaker.image={IMAGE}", "sagemaker.environment={OMP_NUM_THREADS='1'}", *more]


def test_complete_run_writes_the_same_bytes_as_the_local_run(digits, small_run, tmp_path):
    # another HOME hides the user's Compose 2 plugin; this needs docker-compose 1.29 on the PATH
    environ = NO_AWS | ({"HOME": str(tmp_path)} if shutil.which("docker-compose") else {})
    result = submit(make_args(digits, tmp_path, "parallel=2"), environ)
    assert result.returncode == 0, result.stdout
    assert differing(tmp_path / "r", small_run) == []
    assert (tmp_path / "r" / "sagemaker" / "folds" / "fold-0" / "model.tar.gz").is_file()
    assert "report: " in result.stdout
    assert "ensemble" in result.stdout
    assert "trains on" in (tmp_path / "r" / "fold-1" / "log.txt").read_text()
    assert not list((tmp_path / "r").glob("*/work"))


def test_failed_job_reports_the_containers_error_and_exit_code(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    keys = ["platform=sagemaker-local", f"train={tmp_path / 'train'}", f"runs={tmp_path}", f"sagemaker.image={IMAGE}"]
    result = submit([*keys, "stages=split"], NO_AWS | ONE_THREAD)
    assert result.returncode == DataError.exit_code, result.stdout
    assert "split failed (exit code 65)" in result.stdout
    assert "only 1 class ('a')" in result.stdout.split("split failed")[1]


def test_missing_image_is_reported(digits, tmp_path):
    result = submit(make_args(digits, tmp_path, "stages=split", "sagemaker.image=fivefold:no-such"), NO_AWS)
    assert result.returncode == 1, result.stdout
    assert "started no container" in result.stdout


def test_signal_stops_and_removes_the_container(digits, small_run, tmp_path):
    shutil.copytree(small_run / "split", tmp_path / "r" / "split")
    shutil.copytree(small_run / "split" / "output", tmp_path / "r" / "sagemaker" / "split" / "output")
    command = [sys.executable, "-m", "jobs", "submit", *SETTINGS, *make_args(digits, tmp_path, "stages=train-fold")]
    log = tmp_path / "output.txt"
    with open(log, "w") as file:
        process = subprocess.Popen([*command, "folds=1", "train.epochs=5000"], cwd=REPOSITORY, stdout=file, stderr=file)
    wait_until(lambda: process.poll() is not None or "metric fold=1 epoch=2" in log.read_text(), 120)
    process.terminate()
    assert process.wait(timeout=120) == 143, log.read_text()
    assert "(exit code 143)" in log.read_text()
    project = "label=com.docker.compose.project=fivefold-r-fold-1"
    assert docker("ps", "--all", "--quiet", "--filter", project).stdout == ""
    assert not (tmp_path / "r" / "fold-1" / "work").exists()
