"""What the tests of platforms share: images, a run to compare with, and the image that is tested."""

from pathlib import Path

import pytest

from docker_helpers import IMAGE, ONE_THREAD, docker, run_here
from jobs.demo import write_digits
from reference_run import submit


@pytest.fixture(scope="session")
def image() -> str:
    """The image, which `make image` builds."""
    found = docker("image", "inspect", IMAGE, check=False)
    assert found.returncode == 0, f"{IMAGE} is not there, or no engine runs: make image first\n{found.stderr}"
    return IMAGE


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images: train/ and test/ with its tables."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of the whole run by this machine's own processes."""
    return run_here(tmp_path_factory.mktemp("runs"), digits)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of the run of `platform_runs`, by this machine's own processes."""
    runs = tmp_path_factory.mktemp("small")
    ended = submit([f"train={digits / 'train'}", f"eval={digits / 'test'}", f"runs={runs}"], ONE_THREAD)
    assert ended.returncode == 0, ended.stdout
    return runs / "r"
