"""The launches of docs/sagemaker.md as they are printed there, by the real SDKs in local mode: version 3, and version 2 in a venv of its own.

Only names of data, recipe and fold are changed. Each fold's `model.tar.gz` then feeds an ensemble, by the same SDK.
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
    """The interpreter of a venv with SDK v2, which is built once and kept in build/ while its pins stay."""
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
def containers_of_the_sdk() -> Iterator[None]:
    """Removes the stopped containers that the SDKs leave."""
    of_the_sdk = ["ps", "--all", "--quiet", "--filter", "name=algo-1", "--filter", "status=exited"]
    before = docker(*of_the_sdk).stdout.split()
    yield
    left = [container for container in docker(*of_the_sdk).stdout.split() if container not in before]
    docker("rm", "--volumes", *left)


def example(of: str) -> str:
    """Return the block of the page that imports `of`."""
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if of in each]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    return block


def changed(code: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def run(python: Path | str, code: str, folder: Path, **variables: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ = {**own, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run([python, "-c", code], cwd=folder, env=environ, check=False, timeout=600, **pipes)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def unpacked(tarball: Path, folder: Path) -> Path:
    shutil.unpack_archive(tarball, folder)
    return folder


def data_folder(folder: Path, digits: Path, small_run: Path) -> Path:
    """A folder with `photos`, `split` and `test`, as the examples name them, and `models` with the other fold's model."""
    for name, place in (
        ("photos", digits / "train"),
        ("split", small_run / "split" / "output"),
        ("test", digits / "test"),
    ):
        (folder / name).symlink_to(place)
    shutil.copytree(small_run / "fold-0" / "model", folder / "models" / "fold-0")
    return folder


def assert_same_fold(model: Path, small_run: Path) -> None:
    for name in ("model.safetensors", "model.json", "oof.parquet", "train_log.csv"):
        assert (model / name).read_bytes() == (small_run / "fold-1" / "model" / name).read_bytes(), name


def assert_same_ensemble(output: Path, small_run: Path) -> None:
    for name in ("predictions.parquet", "submission.csv"):
        (found,) = output.rglob(name)
        assert found.read_bytes() == (small_run / "ensemble" / "output" / name).read_bytes(), name


def of_fold(code: str) -> str:
    """The example for the digits, and the fold that there is."""
    fold = '{"STAGE": "train-fold", "FOLD": "1", "OMP_NUM_THREADS": "1"}'
    changes = {'{"recipe": "small_images"}': SETTINGS.replace('"split__folds": "2", ', ""), FOLD: fold}
    return changed(code, {**changes, "fivefold:latest": IMAGE})


def of_ensemble(code: str, changes: dict[str, str]) -> str:
    """The example of a fold as one of the ensemble."""
    code = re.sub(r"environment=\{.*?\}", f"environment={ENSEMBLE}", changed(code, changes))
    return re.sub(r"hyperparameters=\{.*?\}", 'hyperparameters={"recipe": "demo"}', code)


VERSIONS = {
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
"""By what an example imports: where its outputs lie below their folder, and what makes an ensemble of its fold."""


@pytest.mark.parametrize("imported", VERSIONS)
def test_the_launch(
    imported: str, digits: Path, small_run: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_v2 = "Estimator" in imported
    python = request.getfixturevalue("python_of_v2") if is_v2 else sys.executable
    variables = {"AWS_DEFAULT_REGION": "eu-central-1"} if is_v2 else {}
    place, changes = VERSIONS[imported]
    folder = data_folder(tmp_path, digits, small_run)
    fold = of_fold(example(imported))
    run(python, fold, folder, **variables)
    packed = folder / f"sdk/fold-2/{place}model.tar.gz"
    assert_same_fold(unpacked(packed, tmp_path / "model"), small_run)

    (folder / "models" / "fold-1").mkdir()
    packed.rename(folder / "models" / "fold-1" / "model.tar.gz")
    run(python, of_ensemble(fold, changes), folder, **variables)
    packed = folder / f"sdk/ensemble/{place}output.tar.gz"
    assert_same_ensemble(unpacked(packed, tmp_path / "output"), small_run)
