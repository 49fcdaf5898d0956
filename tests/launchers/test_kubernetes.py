"""Running a plan on a cluster: real processes of a kubectl that keeps its objects in a folder (`cluster.py`)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers import kubernetes
from fivefold.launchers.kubectl import Kubectl
from fivefold.launchers.plan import Inputs, Plan, make_plan, select
from jobs import submit as jobs_submit

REPOSITORY = Path(__file__).parents[2]
FOLDS = "fivefold-r-train-folds"
SECONDS_AT_MOST = 60


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

    def log(self, step: str) -> str:
        return (self.runs / "r" / step / "log.txt").read_text()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(tmp_path)
    monkeypatch.setenv("CLUSTER", str(found.folder))
    return found


def plan_of(cluster: Cluster, *overrides: str, eval_: str | None = None) -> Plan:
    inputs = Inputs("/data/train", eval_)
    given = ["split.folds=3", "kubernetes.poll_seconds=0.05", *overrides]
    return make_plan(inputs, given, run="r", runs=str(cluster.runs), recipe="demo")


def launch(cluster: Cluster, plan: Plan | None = None) -> int:
    return kubernetes.launch(plan or plan_of(cluster), 0, cluster.environ)


def submit(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    given = f"platform=kubernetes recipe=demo run=r train=/data/train runs={cluster.runs} kubernetes.poll_seconds=0.05"
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", "submit", *given.split(), *arguments],
        cwd=REPOSITORY,
        env=cluster.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_whole_graph_in_order(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(cluster, plan_of(cluster, eval_="/data/eval")) == 0
    assert len(cluster.calls("apply")) == 1 + 7
    assert set(cluster.jobs()) == {"split", "train-folds", "ensemble", "evaluate", "distill", "ensemble-student", "evaluate-student"}  # fmt: skip
    said = capsys.readouterr().err
    ends = [line.split(":")[0].removeprefix("fivefold-r-") for line in said.splitlines() if line.endswith(": done")]
    assert ends[:2] == ["split", "train-folds"]
    assert ends.index("ensemble") < ends.index("evaluate")
    assert ends.index("distill") < ends.index("ensemble-student") < ends.index("evaluate-student")
    assert (cluster.folder / "persistentvolumeclaim-fivefold.json").is_file()


def test_what_is_applied_is_what_is_printed(cluster: Cluster) -> None:
    plan = plan_of(cluster)
    launch(cluster, plan)
    printed = {one["metadata"]["name"]: one for one in kubernetes.objects(plan, kubernetes.pods_of(plan))}
    for one in cluster.jobs().values():
        assert one["spec"] == printed[one["metadata"]["name"]]["spec"]


def test_where_it_runs_is_told_to_no_stage(cluster: Cluster) -> None:
    plan = plan_of(cluster, "kubernetes.gpus=0", "train.epochs=2")
    told = {text for step in plan.steps for text in step.arguments}
    assert "train.epochs=2" in told
    assert not [text for text in told if "kubernetes" in text]
    assert kubernetes.pods_of(plan).gpus == 0


def test_logs_are_followed_and_kept(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.script(train_folds={"1": [{"code": 0, "log": "epoch 1 of 3\nepoch 2 of 3"}]})
    assert launch(cluster) == 0
    assert "[fold-1] epoch 1 of 3\n[fold-1] epoch 2 of 3\n" in capsys.readouterr().err
    assert cluster.log("fold-1").splitlines()[1:] == ["epoch 1 of 3", "epoch 2 of 3"]
    assert cluster.log("fold-2").splitlines()[1:] == ["works"]


@pytest.mark.parametrize(("code", "words"), [(64, "train.lr=x"), (65, "row 3 is broken"), (66, "no folds.parquet")])
def test_a_failed_fold_is_named_with_its_last_words(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], code: int, words: str
) -> None:
    cluster.script(train_folds={"1": [{"code": code, "message": f"{words}\n\nTraceback"}]})
    assert launch(cluster) == code
    said = capsys.readouterr().err
    assert f"train-folds failed (exit code {code}): the Job {FOLDS}, FailedIndexes\n" in said
    assert f"  fold-1: exit code {code}: {words}\n" in said
    assert "evaluate was not started: it needs train-folds" in said
    assert "fold-0:" not in said
    assert "evaluate" not in cluster.jobs()


def test_a_try_that_another_makes_good(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.script(train_folds={"0": [{"code": 75, "message": "the store is away"}, {"code": 0}]})
    assert launch(cluster) == 0
    assert "fold-0, pod fivefold-r-train-folds-0-0, failed: exit code 75: the store is away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tries", "code", "words"),
    [
        ([{"code": 75, "message": "disk is full"}], 75, "exit code 75: disk is full"),
        ([{"code": 137, "reason": "OOMKilled"}], 75, "out of memory"),
        ([{"code": None, "message": "The node was low on resource"}], 75, "lost: The node was low on resource"),
        ([{"code": 1, "message": "KeyError: 'x'"}], 1, "exit code 1: KeyError: 'x'"),
    ],
)
def test_a_step_that_failed_to_the_end(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], tries: list[dict[str, Any]], code: int, words: str
) -> None:
    cluster.script(split={"0": tries})
    assert launch(cluster) == code
    said = capsys.readouterr().err
    assert f"split failed (exit code {code}): the Job fivefold-r-split, BackoffLimitExceeded" in said
    assert words in said
    assert list(cluster.jobs()) == ["split"]


def test_the_same_command_skips_what_is_done(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(cluster) == 0
    before = len(cluster.calls("apply"))
    capsys.readouterr()
    assert launch(cluster) == 0
    assert len(cluster.calls("apply")) == before
    assert cluster.calls("replace") == []
    assert capsys.readouterr().err.count("is there and done: skipped") == 4


def test_what_failed_is_made_anew_and_what_followed_too(cluster: Cluster) -> None:
    cluster.script(distill={"0": [{"code": 75}]})
    assert launch(cluster) == 75
    first = {name: one["metadata"]["uid"] for name, one in cluster.jobs().items()}
    cluster.script()
    assert launch(cluster) == 0
    second = {name: one["metadata"]["uid"] for name, one in cluster.jobs().items()}
    assert {name for name in first if first[name] != second[name]} == {"distill"}
    assert len(cluster.calls("replace")) == 1


def test_other_settings_make_done_jobs_anew(cluster: Cluster) -> None:
    assert launch(cluster) == 0
    first = {name: one["metadata"]["uid"] for name, one in cluster.jobs().items()}
    assert launch(cluster, plan_of(cluster, "train.epochs=4")) == 0
    second = {name: one["metadata"]["uid"] for name, one in cluster.jobs().items()}
    assert first["split"] == second["split"]
    assert all(first[name] != second[name] for name in first if name != "split")


def test_a_job_that_runs_with_other_settings_is_left_alone(cluster: Cluster) -> None:
    cluster.script(split={"0": [{"code": 0, "forever": True}]})
    process = submit(cluster, "split.folds=4")
    wait_for(lambda: (cluster.folder / "job-fivefold-r-split.json").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.communicate()
    before = len(cluster.calls("apply"))
    with pytest.raises(SettingsError, match="runs with other settings"):
        launch(cluster)
    assert len(cluster.calls("apply")) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_following_and_not_the_jobs(cluster: Cluster, number: int, code: int) -> None:
    cluster.script(train_folds={str(index): [{"code": 0, "forever": True}] for index in range(5)})
    process = submit(cluster)
    wait_for(lambda: (cluster.runs / "r" / "fold-4" / "log.txt").exists())
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert f"no longer followed: {FOLDS} of r in the cluster\n" in said
    assert "evaluate was not started" in said
    assert "kubectl delete jobs --selector app.kubernetes.io/instance=r" in said
    assert not any("delete" in call for call in cluster.calls("delete"))

    followed = len(cluster.calls("logs"))
    again = submit(cluster)
    wait_for(lambda: len(cluster.calls("logs")) == followed + 5)
    (cluster.folder / "go").touch()
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert "fivefold-r-split is there and done: skipped" in said
    assert f"{FOLDS} is there and runs: it is followed" in said


def test_why_a_pod_does_not_start_is_said_once(cluster: Cluster) -> None:
    reason = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    cluster.script(split={"0": [{"code": 0, "waits": reason}]})
    process = submit(cluster)
    wait_for(lambda: (cluster.folder / "calls.txt").exists() and len(cluster.calls("jobs,pods")) > 5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert said.count(f"split waits: Unschedulable: {reason}") == 1


def test_what_kubectl_says_at_length_is_told_once(tmp_path: Path) -> None:
    log = (
        "E1122 03:10:54.574608   20834 memcache.go:265] couldn't get current server API group list: connection refused"
    )
    program = tmp_path / "kubectl"
    program.write_text(
        f"#!/bin/sh\nprintf '%s\\n%s\\n' \"{log}\" 'The connection to the server was refused' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    with pytest.raises(RetryableError) as caught:
        Kubectl(environ={"PATH": str(tmp_path)}).ask("get", "jobs")
    assert str(caught.value).endswith("kubectl get: The connection to the server was refused")


def test_a_cluster_that_is_away_for_a_while(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster.folder / "outage.json").write_text("[5, 15]")
    assert launch(cluster) == 0
    assert capsys.readouterr().err.count("the cluster does not answer") == 1


def test_a_cluster_that_stays_away_is_worth_another_try(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster.folder / "outage.json").write_text("[5, 999]")
    with pytest.raises(RetryableError, match="i/o timeout"):
        launch(cluster)
    assert "no longer followed: fivefold-r-split of r in the cluster" in capsys.readouterr().err


def test_a_cluster_that_is_away_at_first_gets_nothing(cluster: Cluster) -> None:
    (cluster.folder / "outage.json").write_text("[1, 999]")
    with pytest.raises(RetryableError, match="Unable to connect"):
        launch(cluster)
    assert cluster.jobs() == {}


def test_what_the_cluster_forbids_is_a_matter_of_settings(cluster: Cluster) -> None:
    (cluster.folder / "forbidden").touch()
    with pytest.raises(SettingsError, match=r"kubectl apply was refused.*cannot create resource"):
        launch(cluster)


def test_a_deleted_job_is_no_success(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.script(split={"0": [{"code": 0, "forever": True}]})
    process = submit(cluster)
    job = cluster.folder / "job-fivefold-r-split.json"
    wait_for(lambda: (cluster.runs / "r" / "split" / "log.txt").exists())
    job.unlink()
    (cluster.folder / "pod-fivefold-r-split-0-0.json").unlink()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "the Job fivefold-r-split was deleted" in said


def test_without_kubectl(cluster: Cluster) -> None:
    with pytest.raises(SettingsError, match=r"needs kubectl.*--dry-run"):
        kubernetes.launch(plan_of(cluster), 0, {**cluster.environ, "PATH": ""})


def test_namespace_and_cluster_go_to_every_call(cluster: Cluster) -> None:
    plan = select(plan_of(cluster, "kubernetes.namespace=teams", "kubernetes.context=big"), ["split"])
    assert launch(cluster, plan) == 0
    for call in cluster.calls("--filename") + cluster.calls("get") + cluster.calls("logs"):
        assert call[:4] == ["--context", "big", "--namespace", "teams"]


def test_a_bucket_needs_no_claim(cluster: Cluster) -> None:
    plan = make_plan(
        Inputs("s3://cars/train"),
        ["kubernetes.runs=s3://cars/runs", "kubernetes.poll_seconds=0.05"],
        run="r",
        runs=str(cluster.runs),
        recipe="demo",
    )
    assert launch(cluster, plan) == 0
    assert not list(cluster.folder.glob("persistentvolumeclaim-*"))
    assert kubernetes.results(plan) == "the run is at s3://cars/runs/r"


def test_a_claim_that_is_there_is_left_as_it_is(cluster: Cluster) -> None:
    claim = cluster.folder / "persistentvolumeclaim-fivefold.json"
    claim.write_text("{}")
    assert launch(cluster, select(plan_of(cluster), ["split"])) == 0
    assert claim.read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train=photos"], r"docs/kubernetes\.md"),
        (["kubernetes.runs=here"], "kubernetes.runs=here"),
        (["kubernetes.memory=much"], "kubernetes.memory"),
        (["kubernetes.gpu=2"], "did you mean 'kubernetes.gpus'"),
        ([f"run={'a' * 60}"], "too long for Kubernetes"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_anything_is_written(
    cluster: Cluster, arguments: list[str], says: str
) -> None:
    given = [f"runs={cluster.runs}", "platform=kubernetes", "run=r", "train=/data/train", "recipe=demo"]
    for more in ([], ["--dry-run"]):
        with pytest.raises(SettingsError, match=says):
            jobs_submit.main([*given, *arguments, *more])
    assert not cluster.runs.exists()
    assert not (cluster.folder / "calls.txt").exists()


def test_submit_from_end_to_end(cluster: Cluster) -> None:
    process = submit(cluster, "eval=/data/eval", "stages=split,train-fold", "split.folds=3")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert set(cluster.jobs()) == {"split", "train-folds"}
    assert "the run is in /runs/r of the claim fivefold" in said


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS_AT_MOST
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)
