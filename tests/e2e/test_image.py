"""The image under `docker run`: CPU limits, signals, and the image's contents."""

import json
import re
import shutil
import time

import pytest

from docker_helpers import SETTINGS, as_arguments, differing, docker
from reference_run import wait_until

pytestmark = pytest.mark.docker


def test_cpu_limit_is_detected_inside_the_container(image):
    code = "from fivefold.system import cpu_limit; print(cpu_limit())"
    for options, limit in ((["--cpus=1.5"], "1.5"), ([], "None")):
        assert docker("run", "--rm", *options, "--entrypoint=python", image, "-c", code).stdout.strip() == limit


def test_stopped_training_exits_with_143_and_resumes_to_the_same_bytes(image, tmp_path, digits, local_run):
    run = tmp_path / "first"
    shutil.copytree(local_run / "split", run / "split")
    variables = {"RUN": "first", "RECIPE": "demo", "OMP_NUM_THREADS": "1", "SM_CHANNEL_TRAIN": "/data/train"}
    mounts = [f"{digits / 'train'}:/data/train:ro", f"{digits / 'test'}:/data/eval:ro", f"{tmp_path}:/runs"]
    arguments = [*(f"--env={name}={value}" for name, value in variables.items()), *(f"--volume={m}" for m in mounts)]
    # half a core makes training slow enough to stop in the middle and changes no bit
    arguments += ["--cpus=0.5", image, "train-fold", "FOLD=1", *as_arguments(SETTINGS)]
    name = docker("run", "--detach", *arguments).stdout.strip()
    try:
        wait_until(lambda: "fold 1 epoch 1/2" in docker("logs", name).stderr)
        started = time.monotonic()
        docker("stop", "--time=30", name)
        assert time.monotonic() - started < 15
        assert json.loads(docker("inspect", name).stdout)[0]["State"]["ExitCode"] == 143
        assert list((run / "fold-1" / "checkpoints").rglob("*.pt"))
        assert not (run / "fold-1" / "model" / "stage.json").exists()
    finally:
        docker("rm", "--force", name)
    result = docker("run", "--rm", *arguments)
    assert "after step" in result.stderr
    assert differing(run, local_run, ["fold-1"]) == []


def test_image_contains_runtime_packages_and_no_development_tools(image):
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
