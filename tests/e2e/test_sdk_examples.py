"""The launch examples of docs/sagemaker.md as printed, run by the real SDKs in local mode: version 3, and version 2 in its own venv.

Only the names of data, recipe and fold change. Each fold's `model.tar.gz` then feeds an ensemble, by the same SDK.
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
from reference_run import REPOSITORY

pytestmark = pytest.mark.docker
PINS = Path(__file__).parent / "sdk-v2.txt"
PAGE = (REPOSITORY / "docs" / "sagemaker.md").read_text(encoding="utf-8")
SETTINGS = '{"recipe": "demo", "split__folds": "2", "train__epochs": "1", "train__warmup_epochs": "0"}'
FOLD = '{"STAGE": "train-fold", "FOLD": "2"}'
ENSEMBLE = '{"STAGE": "ensemble", "OMP_NUM_THREADS": "1"}'


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


def read_example(statement: str) -> str:
    """Return the page's block that contains the import `statement`."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if statement in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    return block


def replace_all(code: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def run_python(python: Path | str, code: str, folder: Path, **variables: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ = {**inherited, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run([python, "-c", code], cwd=folder, env=environ, check=False, timeout=600, **pipes)
    assert result.returncode == 0, result.stdout
    return result.stdout


def unpack(tarball: Path, folder: Path) -> Path:
    shutil.unpack_archive(tarball, folder)
    return folder


def make_data_folder(folder: Path, digits: Path, small_run: Path) -> Path:
    """Make a folder with `photos`, `split` and `test`, as the examples name them, and `models` with the model of fold 0."""
    for name, target in (
        ("photos", digits / "train"),
        ("split", small_run / "split" / "output"),
        ("test", digits / "test"),
    ):
        (folder / name).symlink_to(target)
    shutil.copytree(small_run / "fold-0" / "model", folder / "models" / "fold-0")
    return folder


def assert_same_fold(model: Path, small_run: Path) -> None:
    for name in ("model.safetensors", "model.json", "oof.parquet", "train_log.csv"):
        assert (model / name).read_bytes() == (small_run / "fold-1" / "model" / name).read_bytes(), name


def assert_same_ensemble(output: Path, small_run: Path) -> None:
    for name in ("predictions.parquet", "submission.csv"):
        (path,) = output.rglob(name)
        assert path.read_bytes() == (small_run / "ensemble" / "output" / name).read_bytes(), name


def make_fold_launch(code: str) -> str:
    """Change the example to the demo recipe and fold 1."""
    fold_1 = '{"STAGE": "train-fold", "FOLD": "1", "OMP_NUM_THREADS": "1"}'
    changes = {'{"recipe": "small_images"}': SETTINGS.replace('"split__folds": "2", ', ""), FOLD: fold_1}
    return replace_all(code, {**changes, "fivefold:latest": IMAGE})


def make_ensemble_launch(code: str, changes: dict[str, str]) -> str:
    """Change the example of a fold to one of the ensemble."""
    code = re.sub(r"environment=\{.*?\}", f"environment={ENSEMBLE}", replace_all(code, changes))
    return re.sub(r"hyperparameters=\{.*?\}", 'hyperparameters={"recipe": "demo"}', code)


OUTPUTS_AND_ENSEMBLE_CHANGES = {
    "import ModelTrainer": (
        "compressed_artifacts/",
        {
            'channel_name="train", data_source="photos"': 'channel_name="eval", data_source="test"',
            'channel_name="folds", data_source="split"': 'channel_name="model", data_source="models"',
            'Path("sdk/fold-2")': 'Path("sdk/ensemble")',
        },
    ),
    "import Estimator": (
        "",
        {
            '"train": "file://photos"': '"eval": "file://test"',
            '"folds": "file://split"': '"model": "file://models"',
            "file://sdk/fold-2": "file://sdk/ensemble",
        },
    ),
}
"""By import statement: the subfolder of its outputs, and the changes that turn the fold example into an ensemble."""


@pytest.mark.parametrize("imported", OUTPUTS_AND_ENSEMBLE_CHANGES)
def test_printed_launch_trains_the_same_fold_and_ensemble_as_the_local_run(
    imported: str, digits: Path, small_run: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_v2 = "Estimator" in imported
    python = request.getfixturevalue("python_of_v2") if is_v2 else sys.executable
    variables = {"AWS_DEFAULT_REGION": "eu-central-1"} if is_v2 else {}
    subfolder, changes = OUTPUTS_AND_ENSEMBLE_CHANGES[imported]
    folder = make_data_folder(tmp_path, digits, small_run)
    fold = make_fold_launch(read_example(imported))
    run_python(python, fold, folder, **variables)
    archive = folder / f"sdk/fold-2/{subfolder}model.tar.gz"
    assert_same_fold(unpack(archive, tmp_path / "model"), small_run)

    (folder / "models" / "fold-1").mkdir()
    archive.rename(folder / "models" / "fold-1" / "model.tar.gz")
    run_python(python, make_ensemble_launch(fold, changes), folder, **variables)
    archive = folder / f"sdk/ensemble/{subfolder}output.tar.gz"
    assert_same_ensemble(unpack(archive, tmp_path / "output"), small_run)
