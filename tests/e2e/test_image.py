"""The image under `docker run`: signals, any user, a read-only root, what is inside."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from docker_helpers import SETTINGS, as_arguments, differing, docker
from reference_run import wait_until

pytestmark = pytest.mark.docker


@pytest.fixture
def runs(tmp_path: Path, here: Path) -> Path:
    """A run whose split is done, for folds to train on."""
    folder = tmp_path / "runs"
    shutil.copytree(here / "split", folder / "first" / "split")
    return folder


def run_options(runs: Path, digits: Path) -> list[str]:
    variables = {"RUN": "first", "RECIPE": "demo", "OMP_NUM_THREADS": "1", "SM_CHANNEL_TRAIN": "/data/train"}
    mounts = [f"{digits / 'train'}:/data/train:ro", f"{digits / 'test'}:/data/eval:ro", f"{runs}:/runs"]
    return [*(f"--env={name}={value}" for name, value in variables.items()), *(f"--volume={mount}" for mount in mounts)]


def test_any_user_on_a_root_that_is_read_only(image, runs: Path, digits: Path, here: Path):
    (runs / "first").chmod(0o777)
    restrictions = "--user=54321:54321 --read-only --tmpfs=/tmp --cap-drop=ALL --security-opt=no-new-privileges"
    options = [*run_options(runs, digits), *restrictions.split(), "--network=none"]
    docker("run", "--rm", *options, image, "train-fold", "FOLD=2", *as_arguments(SETTINGS))
    assert differing(runs / "first", here, ["fold-2"]) == []
    assert (runs / "first" / "fold-2" / "model" / "model.safetensors").stat().st_uid == 54321


def test_a_limit_on_cpu_time_is_known_inside(image):
    code = "from fivefold.system import cpu_limit; print(cpu_limit())"
    for given, limit in ((["--cpus=1.5"], "1.5"), ([], "None")):
        assert docker("run", "--rm", *given, "--entrypoint=python", image, "-c", code).stdout.strip() == limit


def test_a_folder_that_the_user_may_not_write_is_named_with_the_user(image, runs: Path, digits: Path):
    (runs / "first").chmod(0o755)
    done = docker("run", "--rm", "--user=54321", *run_options(runs, digits), image, "train-fold", "FOLD=2", check=False)
    assert done.returncode == 64, done.stderr
    assert re.search(r"/runs/first/fold-2.*54321", done.stderr), done.stderr


def test_stopped_it_exits_143_after_a_checkpoint_and_goes_on_to_the_same_bytes(
    image, runs: Path, digits: Path, here: Path
):
    # slow enough to be stopped amid its epochs, by a share of a core, which changes no bit
    given = [*run_options(runs, digits), "--cpus=0.5", image, "train-fold", "FOLD=1", *as_arguments(SETTINGS)]
    name = docker("run", "--detach", *given).stdout.strip()
    try:
        wait_until(lambda: "fold 1 epoch 1/2" in said_by(name))
        begun = time.monotonic()
        docker("stop", "--time=30", name)
        assert time.monotonic() - begun < 15
        assert json.loads(docker("inspect", name).stdout)[0]["State"]["ExitCode"] == 143
        assert list((runs / "first" / "fold-1" / "checkpoints").rglob("*.pt"))
        assert not (runs / "first" / "fold-1" / "model" / "stage.json").exists()
    finally:
        docker("rm", "--force", name)
    done = docker("run", "--rm", *given)
    assert "after step" in done.stderr
    assert differing(runs / "first", here, ["fold-1"]) == []


def test_a_failure_is_told_where_the_platform_looks(image, runs: Path, digits: Path):
    options = run_options(runs, digits)
    done = docker("run", "--rm", *options, image, "train-fold", "FOLD=7", *as_arguments(SETTINGS), check=False)
    assert done.returncode == 64
    assert (runs / "first" / "fold-7" / "failure").read_text().startswith("FOLD=7 is out of range")
    assert docker("run", "--rm", image, "no-such-stage", check=False).returncode == 64


def test_what_is_inside_and_what_is_not(image):
    config = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]
    assert config["Entrypoint"] == ["python", "-m", "jobs"]
    assert not config.get("Cmd")
    assert not config.get("User")
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "fivefold"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    packages = docker("run", "--rm", "--entrypoint=pip", image, "list", "--format=freeze").stdout.lower()
    installed = {line.partition("==")[0] for line in packages.splitlines()}
    assert {"fivefold", "torch", "timm"} <= installed
    assert not installed & {"sagemaker", "pytest", "ruff", "moto", "hypothesis", "albumentations", "wandb", "mlflow"}
    script = "import compileall, pathlib, fivefold, jobs; print(all(p.with_name('__pycache__').is_dir() for m in (fivefold, jobs) for p in pathlib.Path(m.__file__).parent.rglob('*.py')))"
    assert docker("run", "--rm", "--entrypoint=python", image, "-c", script).stdout.strip() == "True"


def said_by(container: str) -> str:
    logs = docker("logs", container)
    return logs.stdout + logs.stderr
