"""Running a plan on a cluster: real processes of a kubectl that keeps its objects in a folder (`cluster.py`)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers import kubernetes, manifests
from fivefold.launchers.plan import Inputs, Plan, make_plan, select
from jobs import submit as jobs_submit
from platform_runs import REPOSITORY, wait_until

FOLDS = "fivefold-r-train-folds"
QUICK = ("split.folds=3", "kubernetes.poll_seconds=0.05")
REQUEST = ("platform=kubernetes", "recipe=demo", "run=r", "train=/data/train")


class Cluster:
    """The folder that the stand-in keeps its objects in."""

    def __init__(self, root: Path) -> None:
        self.folder, self.runs = root / "cluster", root / "runs"
        self.folder.mkdir()
        (root / "bin").mkdir()
        kubectl = root / "bin" / "kubectl"
        shutil.copy(Path(__file__).with_name("cluster.py"), kubectl)
        kubectl.write_text(kubectl.read_text().replace("/usr/bin/env python3", f"{sys.executable} -IS", 1))
        kubectl.chmod(0o755)
        self.environ = {**os.environ, "PATH": f"{root / 'bin'}:/usr/bin:/bin", "CLUSTER": str(self.folder)}
        self.script()

    def script(self, **tries: Any) -> None:
        """What becomes of pods: `train_folds={"1": [{"code": 65}]}`."""
        named = {f"fivefold-r-{name.replace('_', '-')}": each for name, each in tries.items()}
        (self.folder / "script.json").write_text(json.dumps(named))

    def calls(self, verb: str) -> list[list[str]]:
        lines = (self.folder / "calls.txt").read_text().splitlines()
        return [call for line in lines if verb in (call := json.loads(line))]

    def jobs(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in sorted(self.folder.glob("job-*.json"))]
        return {one["metadata"]["name"].removeprefix("fivefold-r-"): one for one in found}

    def uids(self) -> dict[str, str]:
        return {name: one["metadata"]["uid"] for name, one in self.jobs().items()}

    def log(self, step: str) -> list[str]:
        return (self.runs / "r" / step / "log.txt").read_text().splitlines()[1:]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(tmp_path)
    monkeypatch.setenv("CLUSTER", str(found.folder))
    return found


def plan_of(cluster: Cluster, *overrides: str, train: str = "/data/train", eval_: str | None = None) -> Plan:
    return make_plan(Inputs(train, eval_), [*QUICK, *overrides], run="r", runs=str(cluster.runs), recipe="demo")


def launch(cluster: Cluster, plan: Plan | None = None) -> int:
    return kubernetes.launch(plan or plan_of(cluster), 0, cluster.environ)


def submit(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "jobs", "submit", f"runs={cluster.runs}", *REQUEST, *QUICK, *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, env=cluster.environ, **pipes)


def test_the_whole_graph_in_order(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.script(train_folds={"1": [{"code": 0, "log": "epoch 1 of 3\nepoch 2 of 3"}]})
    plan = plan_of(cluster, eval_="/data/eval")
    assert launch(cluster, plan) == 0
    assert len(cluster.calls("apply")) == 1 + 7
    said = capsys.readouterr().err
    ends = [line.split(":")[0].removeprefix("fivefold-r-") for line in said.splitlines() if line.endswith(": done")]
    assert ends[:2] == ["split", "train-folds"]
    assert ends.index("ensemble") < ends.index("evaluate")
    assert ends.index("distill") < ends.index("ensemble-student") < ends.index("evaluate-student")
    printed = list(yaml.safe_load_all(kubernetes.describe(plan)))
    claim = json.loads((cluster.folder / "persistentvolumeclaim-fivefold.json").read_text())
    assert claim["spec"] == manifests.claim(plan.settings.kubernetes)["spec"]
    assert {one["metadata"]["name"]: one["spec"] for one in printed} == {
        one["metadata"]["name"]: one["spec"] for one in cluster.jobs().values()
    }
    assert "[fold-1] epoch 1 of 3\n[fold-1] epoch 2 of 3\n" in said
    assert cluster.log("fold-1") == ["epoch 1 of 3", "epoch 2 of 3"]
    assert cluster.log("fold-2") == ["works"]


@pytest.mark.parametrize(
    ("job", "tries", "code", "words"),
    [
        ("train_folds", [{"code": 64, "message": "train.lr=x\n\nTraceback"}], 64, "fold-1: exit code 64: train.lr=x\n"),
        ("train_folds", [{"code": 66, "message": "no folds"}], 66, "evaluate was not started: it needs train-folds"),
        ("train_folds", [{"code": 75, "message": "store away"}, {"code": 0}], 0, "failed: exit code 75: store away"),
        ("split", [{"code": 75, "message": "disk is full"}], 75, "split: exit code 75: disk is"),
        ("split", [{"code": 137, "reason": "OOMKilled"}], 75, "out of memory"),
        ("split", [{"code": None, "message": "The node was low"}], 75, "lost: The node was low"),
        ("split", [{"code": 1, "message": "KeyError: 'x'"}], 1, "exit code 1: KeyError: 'x'"),
    ],
)
def test_a_pod_that_failed_is_named_with_its_last_words(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], job: str, tries: list[Any], code: int, words: str
) -> None:
    cluster.script(**{job: {"1" if job == "train_folds" else "0": tries}})
    assert launch(cluster) == code
    assert words in capsys.readouterr().err
    if code:
        assert set(cluster.jobs()) == ({"split", "train-folds"} if job == "train_folds" else {"split"})


def test_the_same_command_runs_what_failed_and_what_is_asked_for_otherwise(cluster: Cluster) -> None:
    cluster.script(distill={"0": [{"code": 75}]})
    assert launch(cluster) == 75
    first = cluster.uids()
    cluster.script()
    assert launch(cluster) == 0
    second = cluster.uids()
    assert {name for name in first if first[name] != second[name]} == {"distill"}
    assert launch(cluster) == 0
    assert cluster.uids() == second, "all is done"
    assert launch(cluster, plan_of(cluster, "train.epochs=4")) == 0
    third = cluster.uids()
    assert {name for name in second if second[name] == third[name]} == {"split"}


def test_a_signal_ends_the_following_and_not_the_jobs(cluster: Cluster) -> None:
    cluster.script(train_folds={str(index): [{"code": 0, "forever": True}] for index in range(3)})
    process = submit(cluster)
    wait_until(lambda: (cluster.runs / "r" / "fold-2" / "log.txt").exists())
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert f"no longer followed: {FOLDS} of r" in said
    assert "kubectl delete jobs --selector app.kubernetes.io/instance=r" in said
    assert cluster.calls("delete") == []

    applied = len(cluster.calls("apply"))
    with pytest.raises(SettingsError, match="runs with other settings"):
        launch(cluster, plan_of(cluster, "train.epochs=4"))
    assert len(cluster.calls("apply")) == applied

    followed = len(cluster.calls("logs"))
    again = submit(cluster)
    wait_until(lambda: len(cluster.calls("logs")) == followed + 3)
    (cluster.folder / "go").touch()
    printed, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert "fivefold-r-split is there and done: skipped" in said
    assert f"{FOLDS} is there and runs: it is followed" in said
    assert "the run is in /runs/r of the claim fivefold" in printed


def test_why_a_pod_does_not_start_is_said_once_and_a_deleted_job_is_no_success(cluster: Cluster) -> None:
    reason = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    cluster.script(split={"0": [{"code": 0, "waits": reason}]})
    process = submit(cluster)
    wait_until(lambda: (cluster.folder / "calls.txt").exists() and len(cluster.calls("jobs,pods")) > 5)
    (cluster.folder / "delete-jobs").touch()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert said.count(f"split waits: Unschedulable: {reason}") == 1
    assert "the Job fivefold-r-split was deleted" in said


def test_a_cluster_that_is_away(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for calls, jobs in (("[1, 2]", set()), ("[6, 999]", {"split"})):
        (cluster.folder / "outage.json").write_text(calls)
        with pytest.raises(RetryableError, match="i/o timeout"):
            launch(cluster)
        assert set(cluster.jobs()) == jobs
    assert "no longer followed: fivefold-r-split of r in the cluster" in capsys.readouterr().err


def test_what_the_cluster_forbids_is_a_matter_of_settings(cluster: Cluster) -> None:
    (cluster.folder / "forbidden").touch()
    with pytest.raises(SettingsError, match=r"kubectl apply was refused.*cannot create resource"):
        launch(cluster)
    with pytest.raises(SettingsError, match=r"needs kubectl.*--dry-run"):
        kubernetes.launch(plan_of(cluster), 0, {**cluster.environ, "PATH": ""})


def test_every_call_names_namespace_and_cluster_a_claim_stays_as_it_is_and_a_bucket_needs_none(
    cluster: Cluster,
) -> None:
    claim = cluster.folder / "persistentvolumeclaim-fivefold.json"
    claim.write_text("{}")
    plan = select(plan_of(cluster, "kubernetes.namespace=teams", "kubernetes.context=big"), ["split"])
    assert launch(cluster, plan) == 0
    assert claim.read_text() == "{}"
    for call in cluster.calls("--filename") + cluster.calls("get") + cluster.calls("logs"):
        assert call[:4] == ["--context", "big", "--namespace", "teams"]
    claim.unlink()
    (cluster.folder / "job-fivefold-r-split.json").unlink()
    assert (
        launch(cluster, select(plan_of(cluster, "kubernetes.runs=s3://cars/r", train="s3://cars/train"), ["split"]))
        == 0
    )
    assert not claim.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train=photos"], r"docs/kubernetes\.md"),
        (["kubernetes.runs=here"], "kubernetes.runs=here"),
        (["kubernetes.memory=much"], "kubernetes.memory"),
        ([f"run={'a' * 60}"], "too long for Kubernetes"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_anything_is_written(
    cluster: Cluster, arguments: list[str], says: str
) -> None:
    for more in ([], ["--dry-run"]):
        with pytest.raises(SettingsError, match=says):
            jobs_submit.main([f"runs={cluster.runs}", *REQUEST, *arguments, *more])
    assert not cluster.runs.exists()
    assert not (cluster.folder / "calls.txt").exists()
