"""Fixtures that the platform tests share: images, local reference runs, and the image under test."""

from pathlib import Path

import pytest

from docker_helpers import IMAGE, ONE_THREAD, SETTINGS, as_arguments, docker
from jobs.demo import write_digits
from reference_run import submit


@pytest.fixture(scope="session")
def image() -> str:
    """The name of the image, which `make image` builds."""
    result = docker("image", "inspect", IMAGE, check=False)
    assert result.returncode == 0, (
        f"{IMAGE} does not exist, or no Docker engine runs: run `make image` first\n{result.stderr}"
    )
    return IMAGE


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images: train/ and test/ with its tables."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def run_locally(runs: Path, digits: Path, *settings: str) -> Path:
    """Run the small run, with other settings, by local processes of one thread each; return its folder."""
    keys = [f"train={digits / 'train'}", f"eval={digits / 'test'}", f"runs={runs}"]
    result = submit([*keys, *settings], ONE_THREAD)
    assert result.returncode == 0, result.stdout
    return runs / "r"


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of a complete run of the demo's five folds."""
    return run_locally(tmp_path_factory.mktemp("runs"), digits, "split.folds=5", *as_arguments(SETTINGS))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of the run defined in `reference_run`."""
    return run_locally(tmp_path_factory.mktemp("small"), digits)
