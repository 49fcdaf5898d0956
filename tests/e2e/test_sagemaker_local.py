"""SageMaker's local mode on the real Docker engine, with the real SDKs: no region, no credentials, the same bytes."""

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
NOWHERE = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
"""No region and no credentials, whatever this machine has."""


def asked(digits: Path, runs: Path, *more: str) -> list[str]:
    given = ["platform=sagemaker-local", f"train={digits / 'train'}", f"eval={digits / 'test'}", f"runs={runs}"]
    return [*given, f"sagemaker.image={IMAGE}", "sagemaker.environment={OMP_NUM_THREADS='1'}", *more]


@pytest.mark.parametrize("compress", ["true", "false"])
def test_the_chain_is_the_same_bytes(compress: str, digits: Path, small_run: Path, tmp_path: Path) -> None:
    given = asked(digits, tmp_path, f"sagemaker.compress_outputs={compress}", "parallel=2")
    # another home hides Compose 2, a plugin of the user's, where 1.29 is installed too
    ended = submit(
        given, NOWHERE | ({"HOME": str(tmp_path)} if compress == "true" and shutil.which("docker-compose") else {})
    )
    assert ended.returncode == 0, ended.stdout
    assert differing(tmp_path / "r", small_run) == []
    packed = (tmp_path / "r" / "sagemaker" / "folds" / "fold-0" / "model.tar.gz").is_file()
    assert packed == (compress == "true")
    assert "report: " in ended.stdout
    assert "ensemble" in ended.stdout
    assert "trains on" in (tmp_path / "r" / "fold-1" / "log.txt").read_text()
    assert not list((tmp_path / "r").glob("*/work"))


def test_a_failure_is_told_with_the_containers_own_words_and_code(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    given = ["platform=sagemaker-local", f"train={tmp_path / 'train'}", f"runs={tmp_path}", f"sagemaker.image={IMAGE}"]
    ended = submit([*given, "stages=split"], NOWHERE | ONE_THREAD)
    assert ended.returncode == DataError.exit_code, ended.stdout
    assert "split failed (exit code 65)" in ended.stdout
    assert "only 1 class ('a')" in ended.stdout.split("split failed")[1]


def test_an_image_that_is_not_there_is_told(digits: Path, tmp_path: Path) -> None:
    ended = submit(
        [*asked(digits, tmp_path, "stages=split")[:-2], "sagemaker.image=fivefold:no-such", "stages=split"], NOWHERE
    )
    assert ended.returncode == 1, ended.stdout
    assert "started no container" in ended.stdout


def test_a_signal_stops_the_container_and_leaves_none(digits: Path, small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "split", tmp_path / "r" / "split")
    shutil.copytree(small_run / "split" / "output", tmp_path / "r" / "sagemaker" / "split" / "output")
    command = [sys.executable, "-m", "jobs", "submit", *SETTINGS, *asked(digits, tmp_path, "stages=train-fold")]
    said = tmp_path / "said.txt"
    with open(said, "w") as file:
        process = subprocess.Popen([*command, "folds=1", "train.epochs=5000"], cwd=REPOSITORY, stdout=file, stderr=file)
    wait_until(lambda: process.poll() is not None or "metric fold=1 epoch=2" in said.read_text(), 120)
    process.terminate()
    assert process.wait(timeout=120) == 143, said.read_text()
    assert "(exit code 143)" in said.read_text()
    project = "label=com.docker.compose.project=fivefold-r-fold-1"
    assert docker("ps", "--all", "--quiet", "--filter", project).stdout == ""
    assert not (tmp_path / "r" / "fold-1" / "work").exists()
