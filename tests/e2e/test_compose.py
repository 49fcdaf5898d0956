"""`docker compose run train-fold FOLD=2` and the profile `pipeline`, with Compose 2 and with docker-compose 1.29."""

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import requests
import yaml
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from docker_helpers import IMAGE, ONE_THREAD, ROOT, SETTINGS, called, differing, docker
from fivefold.config.loading import arguments_layer, collect_layers, load
from fivefold.contract.run_layout import CHANNELS
from jobs.serve import platform_layers

NEW, OLD = ["docker", "compose"], ["docker-compose"]
PROFILES = "--profile", "pipeline", "--profile", "stage"


class Project:
    """A user's checkout: compose.yaml with its own .env, and an empty folder of runs."""

    def __init__(self, folder: Path, digits: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.runs.mkdir(parents=True)
        for name in ("compose.yaml", "compose.gpu.yaml"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
        variables = {
            "IMAGE": IMAGE,
            "TRAIN": digits / "train",
            "EVAL": digits / "test",
            "RUNS": self.runs,
            "RECIPE": "demo",
            "USER_ID": f"{os.getuid()}:{os.getgid()}",
            "SETTINGS": json.dumps(SETTINGS),
            **ONE_THREAD,
        }
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))

    def container(self, service: str) -> str:
        return self(NEW, *PROFILES, "ps", "--all", "--quiet", service).stdout.strip()

    def times(self, service: str) -> tuple[str, str]:
        """Return when a service's container started and ended, in UTC, so that the strings sort by time."""
        state = json.loads(docker("inspect", self.container(service)).stdout)[0]["State"]
        return state["StartedAt"], state["FinishedAt"]

    def __call__(self, tool: list[str], *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return called([*tool, *arguments], where=self.folder, check=check)


@pytest.fixture
def project(tmp_path: Path, digits: Path):
    checkout = Project(tmp_path / "checkout", digits)
    yield checkout
    checkout(NEW, *PROFILES, "down", "--remove-orphans", "--timeout", "0")


@pytest.mark.docker
def test_each_stage_is_a_service_that_takes_stage_arguments(image, project, local_run):
    project(OLD, "run", "--rm", "split")
    project(NEW, "run", "--rm", "train-fold", "FOLD=2")
    project(OLD, "run", "--rm", "-e", "FOLD=3", "train-fold")
    assert differing(project.runs / "first", local_run, ["split", "fold-2", "fold-3"]) == []
    again = project(OLD, "run", "--rm", "train-fold", "FOLD=2")
    assert "nothing to do" in again.stdout + again.stderr


@pytest.mark.docker
def test_pipeline_runs_stages_in_order_and_folds_in_parallel(image, project, local_run):
    project(NEW, "--profile", "pipeline", "up")
    assert differing(project.runs / "first", local_run) == []
    steps = ("split", "fold-0", "fold-4", "ensemble", "evaluate-student")
    (_, split_end), (fold0_start, fold0_end), (fold4_start, _), (ensemble_start, _), (student_start, _) = (
        project.times(f"pipeline-{step}") for step in steps
    )
    assert split_end <= fold0_start
    assert fold4_start < fold0_end, "folds run in parallel"
    assert fold0_end <= ensemble_start <= student_start


@pytest.mark.docker
def test_serve_predicts_like_the_student_and_exits_with_143_when_stopped(image, project, local_run, digits):
    shutil.copytree(local_run, project.runs / "first")
    with open(project.folder / ".env", "a") as file:
        file.write("PORT=0\n")
    project(NEW, "up", "--detach", "serve")
    address = "http://" + project(NEW, "port", "serve", "8080").stdout.strip()
    session = requests.Session()
    session.mount(
        "http://", HTTPAdapter(max_retries=Retry(60, backoff_factor=0.1, backoff_max=1, status_forcelist=[503]))
    )
    assert session.get(f"{address}/ping").status_code == 200
    png = (digits / "test" / "TEST_00000.png").read_bytes()
    prediction = session.post(f"{address}/invocations", png, headers={"Content-Type": "image/png"}).json()
    with open(local_run / "ensemble-student" / "output" / "submission.csv", encoding="utf-8-sig") as file:
        row = next(csv.DictReader(file))
    expected = {name: float(row[name]) for name in prediction["probabilities"]}
    assert prediction["probabilities"] == pytest.approx(expected, abs=1e-5)
    project(NEW, "stop", "serve")
    state = json.loads(docker("inspect", project.container("serve")).stdout)[0]
    assert state["State"]["ExitCode"] == 143
    assert address.startswith("http://127.0.0.1:")
    assert state["HostConfig"]["ReadonlyRootfs"]


@pytest.mark.docker
def test_failed_fold_stops_dependent_services_only(image, project):
    """The split has three folds; the services of folds 3 and 4 fail. Another test starts the pipeline with Compose 2."""
    with open(project.folder / ".env", "a") as file:
        file.write(f"SETTINGS={json.dumps({**SETTINGS, 'train.epochs': 1, 'split.folds': 3})}\n")
    result = project(OLD, "--profile", "pipeline", "up", check=False)
    log = project(OLD, "--profile", "pipeline", "logs").stdout
    assert result.returncode
    assert re.search(r"FOLD=4 is out of range: the split has the folds 0 to 2", log), log
    docker("wait", project.container("pipeline-fold-2"))
    assert (project.runs / "first" / "fold-2" / "model" / "stage.json").is_file(), "the other folds complete"
    assert not (project.runs / "first" / "ensemble").exists()
    assert "give FOLD=" not in log


@pytest.mark.docker
def test_missing_runs_folder_is_named_in_the_error(image, project):
    with open(project.folder / ".env", "a") as file:
        file.write("RUNS=./nowhere\n")
    for tool in (NEW, OLD):
        result = project(tool, "run", "--rm", "split", check=False)
        assert result.returncode
        assert "nowhere" in result.stdout + result.stderr
    assert not (project.folder / "nowhere").exists()


@pytest.mark.docker
@pytest.mark.parametrize("tool", [NEW, OLD], ids=["2", "1.29"])
def test_compose_gpu_file_gives_each_fold_its_own_gpu(project, tool):
    config = project(tool, "-f", "compose.yaml", "-f", "compose.gpu.yaml", "--profile", "pipeline", "config").stdout
    services = yaml.safe_load(config)["services"]
    gpus = {
        name: [device["device_ids"] for device in service["deploy"]["resources"]["reservations"]["devices"]]
        for name, service in services.items()
        if "deploy" in service
    }
    assert gpus | {f"pipeline-fold-{fold}": [[str(fold)]] for fold in range(5)} == gpus
    assert {"pipeline-distill", "pipeline-ensemble", "pipeline-ensemble-student"} <= set(gpus)


def test_services_have_a_grace_period_and_match_stages_and_folds():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert {service["stop_grace_period"] for service in services.values()} == {"120s"}
    assert all(service["init"] for service in services.values())
    assert {*CHANNELS, "predict", "serve", "tensorboard"} <= set(services)
    count = load([arguments_layer(["recipe=small_images"])]).split.folds
    folds = {f"pipeline-fold-{fold}": [f"FOLD={fold}"] for fold in range(count)}
    assert {name: services[name]["command"] for name in services if name.startswith("pipeline-fold-")} == folds
    for step in ("pipeline-ensemble", "pipeline-distill"):
        assert set(services[step]["depends_on"]) == set(folds)


def test_servers_listen_on_localhost_and_mount_runs_read_only():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"serve", "tensorboard"}
    for name, ports in published.items():
        assert all(re.fullmatch(r"\$\{ADDRESS:-127\.0\.0\.1\}:\$\{\w+:-\d+\}:\d+", port) for port in ports), name
        (runs,) = services[name]["volumes"]
        assert (runs["target"], runs["read_only"]) == ("/runs", True), name


def test_services_run_unprivileged_with_a_read_only_root():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["user"] == "${USER_ID:-1000:1000}", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"], name
        assert not {"privileged", "cap_add"} & set(service), name


def test_settings_override_the_images_server_host():
    (host,) = re.findall(r"FIVEFOLD_HOST=(\S+)", (ROOT / "docker" / "Dockerfile").read_text().partition("ENV HOME")[2])
    hosts = [load([*collect_layers(arguments, environ), *platform_layers(environ)]).serve.host for arguments, environ in (
        ([], {}), ([], {"FIVEFOLD_HOST": host}), (["serve.host=::1"], {"FIVEFOLD_HOST": host}),
    )]  # fmt: skip
    assert hosts == ["127.0.0.1", "0.0.0.0", "::1"]


def test_env_example_lists_every_compose_variable():
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text() + (ROOT / "compose.gpu.yaml").read_text()))
    listed = set(re.findall(r"^#? ?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used | {"OMP_NUM_THREADS", "COMPOSE_FILE"} == listed
