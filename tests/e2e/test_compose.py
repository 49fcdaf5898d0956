"""`docker compose run train-fold FOLD=2` and the profile `pipeline`, with Compose 2 and with docker-compose 1.29."""

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml

from docker_helpers import IMAGE, ONE_THREAD, ROOT, SETTINGS, called, differing, docker
from fivefold.config.loading import arguments_layer, collect_layers, load
from fivefold.contract.run_layout import CHANNELS
from jobs.serve import platform_layers
from reference_run import wait_until

NEW, OLD = ["docker", "compose"], ["docker-compose"]
PROFILES = "--profile", "pipeline", "--profile", "stage"


class Project:
    """A user's checkout: compose.yaml with an .env of their own, and an empty folder of runs."""

    def __init__(self, folder: Path, digits: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.runs.mkdir(parents=True)
        for name in ("compose.yaml", "compose.gpu.yaml"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
        own = {
            "IMAGE": IMAGE,
            "TRAIN": digits / "train",
            "EVAL": digits / "test",
            "RUNS": self.runs,
            "RECIPE": "demo",
            "USER_ID": f"{os.getuid()}:{os.getgid()}",
            "SETTINGS": json.dumps(SETTINGS),
            **ONE_THREAD,
        }
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in own.items()))

    def container(self, service: str) -> str:
        return self(NEW, *PROFILES, "ps", "--all", "--quiet", service).stdout.strip()

    def times(self, service: str) -> tuple[str, str]:
        """When a service's container was started, and when it ended: in UTC, so that they sort as texts."""
        state = json.loads(docker("inspect", self.container(service)).stdout)[0]["State"]
        return state["StartedAt"], state["FinishedAt"]

    def __call__(self, tool: list[str], *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return called([*tool, *arguments], where=self.folder, check=check)


@pytest.fixture
def project(tmp_path: Path, digits: Path):
    found = Project(tmp_path / "checkout", digits)
    yield found
    found(NEW, *PROFILES, "down", "--remove-orphans", "--timeout", "0")


@pytest.mark.docker
def test_each_stage_is_a_service_and_what_follows_its_name_are_its_arguments(image, project: Project, here: Path):
    project(NEW, "run", "--rm", "split")
    project(NEW, "run", "--rm", "train-fold", "FOLD=2")
    project(NEW, "run", "--rm", "-e", "FOLD=3", "train-fold")
    for fold in (0, 1, 4):
        project(OLD, "run", "--rm", "train-fold", f"FOLD={fold}")
    for stage in ("ensemble", "evaluate", "distill"):
        project(NEW, "run", "--rm", stage)
    steps = ["split", *(f"fold-{fold}" for fold in range(5)), "ensemble", "evaluate", "distill"]
    assert differing(project.runs / "first", here, steps) == []
    again = project(OLD, "run", "--rm", "train-fold", "FOLD=2")
    assert "nothing to do" in again.stdout + again.stderr
    project(NEW, "run", "--rm", "predict", "images=/data/eval/TEST_00000.png")
    assert (project.runs / "first" / "predict" / "predictions.csv").is_file()


@pytest.mark.docker
def test_the_pipeline_runs_in_order_with_folds_side_by_side(image, project: Project, here: Path):
    project(NEW, "--profile", "pipeline", "up")
    assert differing(project.runs / "first", here) == []
    steps = ("split", "fold-0", "fold-4", "ensemble", "evaluate-student")
    (_, split), (began, fold), (last, _), (ensemble, _), (student, _) = (project.times(f"pipeline-{n}") for n in steps)
    assert split <= began
    assert last < fold, "folds run side by side"
    assert fold <= ensemble <= student


@pytest.mark.docker
def test_the_student_answers_and_drains_when_it_is_stopped(image, project: Project, here: Path, digits: Path):
    shutil.copytree(here, project.runs / "first")
    with open(project.folder / ".env", "a") as file:
        file.write("PORT=0\n")
    project(NEW, "up", "--detach", "serve")
    address = "http://" + project(NEW, "port", "serve", "8080").stdout.strip()
    wait_until(lambda: answered(f"{address}/ping") == 200)
    picture = (digits / "test" / "TEST_00000.png").read_bytes()
    request = Request(f"{address}/invocations", picture, {"Content-Type": "image/png"})
    with urlopen(request, timeout=30) as answer:
        found = json.load(answer)
    with open(here / "ensemble-student" / "output" / "submission.csv", encoding="utf-8-sig") as file:
        row = next(csv.DictReader(file))
    expected = {name: float(row[name]) for name in found["probabilities"]}
    assert found["probabilities"] == pytest.approx(expected, abs=1e-5)
    project(NEW, "stop", "serve")
    state = json.loads(docker("inspect", project.container("serve")).stdout)[0]
    assert state["State"]["ExitCode"] == 143
    assert address.startswith("http://127.0.0.1:")
    assert state["HostConfig"]["ReadonlyRootfs"]


def answered(url: str) -> int:
    """The status of a GET; 0 where nobody listens yet."""
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.docker
@pytest.mark.parametrize("tool", [NEW, OLD], ids=["2", "1.29"])
def test_a_fold_that_fails_stops_what_needs_it(image, project: Project, tool):
    """The recipe of three folds has no fold 3 and 4."""
    with open(project.folder / ".env", "a") as file:
        file.write(f"SETTINGS={json.dumps({**SETTINGS, 'train.epochs': 1, 'split.folds': 3})}\n")
    done = project(tool, "--profile", "pipeline", "up", check=False)
    text = project(tool, "--profile", "pipeline", "logs").stdout
    assert done.returncode
    assert re.search(r"FOLD=4 is out of range: the split has the folds 0 to 2", text), text
    docker("wait", project.container("pipeline-fold-2"))
    assert (project.runs / "first" / "fold-2" / "model" / "stage.json").is_file(), "the others go on"
    assert not (project.runs / "first" / "ensemble").exists()
    assert "give FOLD=" not in text


@pytest.mark.docker
def test_a_missing_folder_is_named(image, project: Project):
    with open(project.folder / ".env", "a") as file:
        file.write("RUNS=./nowhere\n")
    for tool in (NEW, OLD):
        done = project(tool, "run", "--rm", "split", check=False)
        assert done.returncode
        assert "nowhere" in done.stdout + done.stderr
    assert not (project.folder / "nowhere").exists()


@pytest.mark.docker
@pytest.mark.parametrize("tool", [NEW, OLD], ids=["2", "1.29"])
def test_with_gpus_each_fold_has_one_of_its_own(project: Project, tool):
    found = project(tool, "-f", "compose.yaml", "-f", "compose.gpu.yaml", "--profile", "pipeline", "config").stdout
    services = yaml.safe_load(found)["services"]
    given = {
        name: [device["device_ids"] for device in service["deploy"]["resources"]["reservations"]["devices"]]
        for name, service in services.items()
        if "deploy" in service
    }
    assert given | {f"pipeline-fold-{fold}": [[str(fold)]] for fold in range(5)} == given
    assert {"pipeline-distill", "pipeline-ensemble", "pipeline-ensemble-student"} <= set(given)


def test_every_service_has_its_grace_and_the_folds_are_the_recipes():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert {service["stop_grace_period"] for service in services.values()} == {"120s"}
    assert all(service["init"] for service in services.values())
    assert {*CHANNELS, "predict", "serve", "tensorboard"} <= set(services)
    count = load([arguments_layer(["recipe=small_images"])]).split.folds
    folds = {f"pipeline-fold-{fold}": [f"FOLD={fold}"] for fold in range(count)}
    assert {name: services[name]["command"] for name in services if name.startswith("pipeline-fold-")} == folds
    for step in ("pipeline-ensemble", "pipeline-distill"):
        assert set(services[step]["depends_on"]) == set(folds)


def test_ports_are_open_to_this_machine_alone_and_servers_only_read_the_runs():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"serve", "tensorboard"}
    for name, ports in published.items():
        assert all(re.fullmatch(r"\$\{ADDRESS:-127\.0\.0\.1\}:\$\{\w+:-\d+\}:\d+", port) for port in ports), name
        (runs,) = services[name]["volumes"]
        assert (runs["target"], runs["read_only"]) == ("/runs", True), name


def test_no_service_is_root_or_may_become_it_or_write_to_its_root():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["user"] == "${USER_ID:-1000:1000}", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert [each.partition(":")[0] for each in service["tmpfs"]] == ["/tmp"], name
        assert not {"privileged", "cap_add"} & set(service), name


def test_the_image_says_that_its_server_listens_to_others():
    (given,) = re.findall(r"FIVEFOLD_HOST=(\S+)", (ROOT / "docker" / "Dockerfile").read_text().partition("ENV HOME")[2])
    hosts = [load([*collect_layers(rest, environ), *platform_layers(environ)]).serve.host for rest, environ in (
        ([], {}), ([], {"FIVEFOLD_HOST": given}), (["serve.host=::1"], {"FIVEFOLD_HOST": given}),
    )]  # fmt: skip
    assert hosts == ["127.0.0.1", "0.0.0.0", "::1"]


def test_what_can_be_set_is_in_the_example():
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text() + (ROOT / "compose.gpu.yaml").read_text()))
    named = set(re.findall(r"^#? ?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used | {"OMP_NUM_THREADS", "COMPOSE_FILE"} == named
