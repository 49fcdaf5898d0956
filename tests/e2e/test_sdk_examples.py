"""The launch examples of docs/sagemaker.md as printed, run by the real SDKs in local mode: version 3, and version 2 in its own venv.

Only the names of recipe and fold change.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docker_helpers import IMAGE, docker
from reference_run import PIPES, REPOSITORY

pytestmark = pytest.mark.docker
PINS = Path(__file__).parent / "sdk-v2.txt"
PAGE = (REPOSITORY / "docs" / "sagemaker.md").read_text(encoding="utf-8")
CHANGES = {
    '{"recipe": "small_images"}': '{"recipe": "demo", "train__epochs": "1", "train__warmup_epochs": "0"}',
    '{"STAGE": "train-fold", "FOLD": "2"}': '{"STAGE": "train-fold", "FOLD": "1", "OMP_NUM_THREADS": "1"}',
}
"""The changes to an example: the settings of the small run and one of its folds."""


@pytest.fixture(scope="session")
def python_of_v2() -> Path:
    """The interpreter of a venv with SDK v2, which is built once and kept in build/ until its pins change."""
    digest = hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
    folder = REPOSITORY / "build" / "sdk-v2"
    python, stamp = folder / "bin" / "python", folder / f"built-{digest}"
    if not stamp.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        quiet = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *quiet, "--require-hashes", "-r", PINS], check=True)
        stamp.touch()
    return python


@pytest.fixture(autouse=True)
def remove_sdk_containers() -> Iterator[None]:
    """Remove the stopped containers that the SDKs leave."""
    list_stopped = ["ps", "--all", "--quiet", "--filter", "name=algo-1", "--filter", "status=exited"]
    before = docker(*list_stopped).stdout.split()
    yield
    remaining = [container for container in docker(*list_stopped).stdout.split() if container not in before]
    docker("rm", "--volumes", *remaining)


@pytest.mark.parametrize("statement", ["import ModelTrainer", "import Estimator"])
def test_printed_launch_trains_the_same_fold_as_the_local_run(statement, digits, small_run, tmp_path, request):
    is_v2 = statement == "import Estimator"
    python = request.getfixturevalue("python_of_v2") if is_v2 else sys.executable
    variables = {"AWS_DEFAULT_REGION": "eu-central-1"} if is_v2 else {}
    (tmp_path / "photos").symlink_to(digits / "train")
    (tmp_path / "split").symlink_to(small_run / "split" / "output")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if statement in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    for old, new in {**CHANGES, "fivefold:latest": IMAGE}.items():
        assert old in code
        code = code.replace(old, new)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ = {**inherited, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, **variables}
    result = subprocess.run([python, "-c", code], cwd=tmp_path, env=environ, timeout=600, **PIPES)
    assert result.returncode == 0, result.stdout
    archive = tmp_path / "sdk/fold-2" / ("model.tar.gz" if is_v2 else "compressed_artifacts/model.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "model")
    for name in ("model.safetensors", "model.json", "oof.parquet", "train_log.csv"):
        expected = small_run / "fold-1" / "model" / name
        assert (tmp_path / "model" / name).read_bytes() == expected.read_bytes(), name
