"""Running a plan on a cluster: real processes of a kubectl that keeps its objects in a folder (`fake_kubectl.py`)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers import scheduler
from fivefold.launchers.kubernetes import launch as kubernetes
from fivefold.launchers.kubernetes import manifests
from fivefold.launchers.kubernetes.cluster import Kubectl
from fivefold.launchers.plan import Inputs, Plan, make_plan, select
from jobs import submit as jobs_submit
from reference_run import REPOSITORY, wait_until

FOLDS = "fivefold-r-train-folds"
QUICK = ("split.folds=3", "kubernetes.poll_seconds=0.05")
REQUEST = ("platform=kubernetes", "recipe=demo", "run=r", "train=/data/train")
ROLE = yaml.safe_load((REPOSITORY / "k8s" / "contrib" / "submit-role.yaml").read_text())["rules"]
LOG_OF_KUBECTL = (
    'E1201 16:20:01.123456   12345 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API group list: '
    'Get \\"https://10.0.0.1:6443/api?timeout=32s\\": dial tcp 10.0.0.1:6443: connect: connection refused"\n'
)
REFUSED = (
    f"{LOG_OF_KUBECTL}The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
)


class Cluster:
    """The folder that the stand-in keeps its objects in."""

    def __init__(self, root: Path) -> None:
        self.folder, self.runs = root / "cluster", root / "runs"
        self.folder.mkdir()
        (root / "bin").mkdir()
        kubectl = root / "bin" / "kubectl"
        shutil.copy(REPOSITORY / "tests" / "fake_kubectl.py", kubectl)
        kubectl.write_text(kubectl.read_text().replace("/usr/bin/env python3", f"{sys.executable} -IS", 1))
        kubectl.chmod(0o755)
        self.environ = {**os.environ, "PATH": f"{root / 'bin'}:/usr/bin:/bin", "CLUSTER": str(self.folder)}
        self.script()
        self.grant(ROLE)

    def script(self, **tries: Any) -> None:
        """What becomes of pods: `train_folds={"1": [{"code": 65}]}`."""
        named = {f"fivefold-r-{name.replace('_', '-')}": each for name, each in tries.items()}
        (self.folder / "script.json").write_text(json.dumps(named))

    def grant(self, rules: list[dict[str, Any]]) -> None:
        """What the user of kubectl may do: all that `submit-role.yaml` grants, unless it is said otherwise."""
        (self.folder / "role.json").write_text(json.dumps(rules))

    def be_away(self, first: int, last: int, words: str = REFUSED) -> None:
        (self.folder / "outage.json").write_text(json.dumps([first, last, words]))

    def make_no_pods(self, **jobs: tuple[int, str]) -> None:
        named = {f"fivefold-r-{name.replace('_', '-')}": each for name, each in jobs.items()}
        (self.folder / "no-pods.json").write_text(json.dumps(named))

    def calls(self, verb: str) -> list[list[str]]:
        file = self.folder / "calls.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for line in lines if verb in (call := json.loads(line))]

    def jobs(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in sorted(self.folder.glob("job-*.json"))]
        return {one["metadata"]["name"].removeprefix("fivefold-r-"): one for one in found}

    def uids(self) -> dict[str, str]:
        return {name: one["metadata"]["uid"] for name, one in self.jobs().items()}

    def log(self, step: str) -> list[str]:
        lines = (self.runs / "r" / step / "log.txt").read_text().splitlines()
        return [line for line in lines if not line.startswith("--- ")]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster(tmp_path)
    monkeypatch.setenv("CLUSTER", str(found.folder))
    return found


def plan_of(cluster: Cluster, *overrides: str, train: str = "/data/train", eval_: str | None = None) -> Plan:
    return make_plan(
        Inputs(train, eval_, truth_unknown=eval_ is not None),
        [*QUICK, *overrides],
        run="r",
        runs=str(cluster.runs),
        recipe="demo",
    )


def launch(cluster: Cluster, plan: Plan | None = None) -> int:
    return kubernetes.launch(plan or plan_of(cluster), 0, cluster.environ)


def submit(cluster: Cluster, *arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [
        sys.executable,
        "-m",
        "jobs",
        "submit",
        f"runs={cluster.runs}",
        *REQUEST,
        *QUICK,
        "check=false",
        *arguments,
    ]
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
    assert claim["spec"] == manifests.claim_manifest(plan.settings.kubernetes)["spec"]
    assert {one["metadata"]["name"]: one["spec"] for one in printed} == {
        one["metadata"]["name"]: one["spec"] for one in cluster.jobs().values()
    }
    assert "[fold-1] epoch 1 of 3\n[fold-1] epoch 2 of 3\n" in said
    assert cluster.log("fold-1") == ["epoch 1 of 3", "epoch 2 of 3"]
    assert cluster.log("fold-2") == ["works"]


OWN = "train.lr=x\n\nTraceback (most recent call last):\n  File x"
TAIL = "s/s, 39 s left\n16:20:01 INFO    fold 1: epoch 3\n16:20:16 INFO    fold 1: epoch 4\n"


@pytest.mark.parametrize(
    ("job", "tries", "code", "words"),
    [
        ("train_folds", [{"code": 64, "message": OWN}], 64, "fold-1: exit code 64: train.lr=x\n"),
        ("train_folds", [{"code": 66, "message": "no folds"}], 66, "evaluate was not started: it needs train-folds"),
        ("train_folds", [{"code": 75, "message": "store away"}, {"code": 0}], 0, "failed: exit code 75: store away"),
        ("split", [{"code": 75, "message": "disk is full"}], 75, "split: exit code 75: disk is"),
        ("split", [{"code": None, "message": "Allocate failed"}], 75, "lost: Allocate failed"),
        ("split", [{"code": 1, "message": "KeyError: 'x'"}], 1, "exit code 1: KeyError: 'x'"),
        ("split", [{"code": 1, "message": f"le 'x'\n{OWN[12:]}\nKeyError: 'x'"}], 1, "exit code 1: KeyError: 'x'"),
        ("split", [{"code": 137, "message": TAIL}], 137, "failed: exit code 137: 16:20:16 INFO    fold 1: epoch 4\n"),
        ("split", [{"code": 143, "message": "39 s left\r\n SIGTERM: stops\n"}], 75, "0-0, stopped: exit code 143: SIG"),
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


def test_a_drained_pod_has_not_failed(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    drained = {"code": 137, "drained": True, "message": TAIL}
    cluster.script(train_folds={"1": [drained] * 3 + [{"code": 0}]})
    assert launch(cluster) == 0
    said = capsys.readouterr().err
    assert len(re.findall("stopped, a new pod .*: exit code 137: 16:20:16 INFO    fold 1: epoch 4\n", said)) == 3
    assert "failed" not in said


@pytest.mark.parametrize(
    ("own", "more", "at"), [({}, [], "8Gi"), ({"limit_range": "2Gi"}, [], "2Gi (a LimitRange"), ({}, ["9Gi"], "9Gi")]
)
def test_a_pod_without_memory_names_its_limit_and_is_not_tried_again(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], own: dict[str, str], more: list[str], at: str
) -> None:
    for code in (137, 1):  # killed itself, or one of its processes
        cluster.script(split={"0": [{"code": code, "reason": "OOMKilled", "message": TAIL, **own}]})
        assert launch(cluster, plan_of(cluster, *(f'kubernetes.limits={{"memory": "{each}"}}' for each in more))) == 137
        assert f"out of memory at its limit of {at}" in capsys.readouterr().err
        assert (len(list(cluster.folder.glob("pod-*"))) == 1) == (code == 137)


def test_the_same_command_runs_what_failed_and_what_is_asked_for_otherwise(cluster: Cluster) -> None:
    cluster.script(distill={"0": [{"code": 75}]})
    assert launch(cluster) == 75
    first = cluster.uids()
    cluster.script()
    assert launch(cluster, plan_of(cluster, "kubernetes.memory=6Gi")) == 0
    second = cluster.uids()
    assert {name for name in first if first[name] != second[name]} == {"distill"}, "more memory makes no other result"
    assert launch(cluster) == 0
    assert cluster.uids() == second, "all is done"
    assert launch(cluster, plan_of(cluster, "train.epochs=4")) == 0
    third = cluster.uids()
    assert {name for name in second if second[name] == third[name]} == {"split"}


def test_a_signal_ends_the_following_and_not_the_jobs(cluster: Cluster) -> None:
    forever = {"code": 0, "forever": True}
    cluster.script(train_folds={"0": [{"code": 0, "log": "a\na\nb"}], "1": [forever], "2": [forever]})
    process = submit(cluster, "kubernetes.memory=1024Mi")
    wait_until(lambda: (cluster.runs / "r" / "fold-2" / "log.txt").exists() and cluster.log("fold-2") == ["works"])
    wait_until(lambda: cluster.log("fold-0") == ["a", "a", "b"])
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "no longer follow" in said
    assert f"{FOLDS} of r" in said
    assert "kubectl delete jobs --selector app.kubernetes.io/instance=r" in said
    assert cluster.calls("delete") == []

    applied = len(cluster.calls("apply"))
    for other in ("train.epochs=4", "kubernetes.memory=5Gi"):
        with pytest.raises(SettingsError, match="runs with other settings"):
            launch(cluster, plan_of(cluster, other))
    assert len(cluster.calls("apply")) == applied

    followed = len(cluster.calls("logs"))
    again = submit(cluster, "kubernetes.memory=1024Mi")
    wait_until(lambda: len(cluster.calls("logs")) == followed + 3)
    (cluster.folder / "go").touch()
    printed, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert re.search("fivefold-r-split .* done: skipped", said)
    assert re.search(f"{FOLDS} .* runs: .*follow", said)
    assert "the run is in /runs/r of the claim fivefold" in printed
    assert "[fold-" not in said, "what is in the log already is said no second time"
    assert {name: cluster.log(name) for name in ("fold-0", "fold-1")} == {
        "fold-0": ["a", "a", "b"],
        "fold-1": ["works"],
    }


def test_a_log_that_is_cut_off_again_and_again_has_each_line_once(cluster: Cluster) -> None:
    lines = [f"epoch {number}" for number in (1, 2, 2, 3)]
    cluster.script(train_folds={"1": [{"code": 0, "log": "\n".join(lines), "cut": True}]})
    assert launch(cluster) == 0
    assert len([call for call in cluster.calls("logs") if f"{FOLDS}-1-0" in call]) > 2
    assert cluster.log("fold-1") == lines


def test_why_a_pod_does_not_start_is_said_once_and_a_deleted_job_is_no_success(cluster: Cluster) -> None:
    reason = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    cluster.script(split={"0": [{"code": 0, "waits": reason}]})
    process = submit(cluster)
    wait_until(lambda: len(cluster.calls("jobs,pods")) > 5)
    (cluster.folder / "delete-jobs").touch()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert said.count(f"split waits: Unschedulable: {reason}") == 1
    assert "the Job fivefold-r-split was deleted" in said


NO_PODS = [
    'pods "POD" is forbidden: failed quota: limits: must specify limits.cpu for: fivefold',
    'Pod "POD" is invalid: spec.containers[0].resources.requests: Invalid value: "4Gi": must be less than or equal to memory limit of 2Gi',
    'pods "POD" is forbidden: exceeded quota: team, requested: requests.memory=4Gi, used: requests.memory=7Gi, limited: requests.memory=8Gi',
    'pods "POD" is forbidden: violates PodSecurity "restricted:latest": seccompProfile',
]


@pytest.mark.parametrize(
    ("job", "room", "words"),
    [
        ("split", 0, NO_PODS[1]),
        ("train_folds", 2, NO_PODS[2]),
        ("train_folds", 0, NO_PODS[3]),
    ],
)
def test_why_a_job_has_no_pod_is_said_once(cluster: Cluster, job: str, room: int, words: str) -> None:
    cluster.make_no_pods(**{job: (room, words)})
    process = submit(cluster, "stages=split,train-fold")
    wait_until(lambda: len(cluster.calls("events")) > 6)
    (cluster.folder / "no-pods.json").unlink()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    name = f"fivefold-r-{job.replace('_', '-')}"
    expected = re.escape(f"{name} waits: FailedCreate: Error creating: {words}").replace("POD", f"{name}-[0-9a-f]{{5}}")
    assert len(re.findall(f"(?m)^{expected}$", said)) == said.count(" waits: ") == 1, said


def test_who_may_see_no_events_is_told_that_pods_are_missing(cluster: Cluster) -> None:
    cluster.grant([rule for rule in ROLE if rule["resources"] != ["events"]])
    cluster.make_no_pods(split=(0, NO_PODS[0]))
    process = submit(cluster, "stages=split")
    wait_until(lambda: len(cluster.calls("events")) > 3)
    (cluster.folder / "no-pods.json").unlink()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert said.count('cannot list resource "events"') == 1


AWAY = [
    REFUSED,
    "Unable to connect to the server: dial tcp 10.0.0.1:6443: i/o timeout",
    "Unable to connect to the server: net/http: TLS handshake timeout",
    "Unable to connect to the server: dial tcp 10.0.0.1:6443: connect: network is unreachable",
    "Unable to connect to the server: dial tcp: lookup k8s.example.com: no such host",
    "Unable to connect to the server: context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
    "Unable to connect to the server: EOF",
    "error: http2: client connection lost",
    "error: stream error: stream ID 1; INTERNAL_ERROR; received from peer",
    'error: error validating "STDIN": error validating data: failed to download openapi: Get "https://10.0.0.1:6443/openapi'
    '/v2?timeout=32s": dial tcp 10.0.0.1:6443: connect: connection refused; if you choose to ignore these errors, turn '
    "validation off with --validate=false",
    'Error from server (InternalError): an error on the server ("") has prevented the request from succeeding (get jobs.batch)',
    'Error from server (InternalError): error when creating "STDIN": Internal error occurred: failed calling webhook "m.x": '
    'failed to call webhook: Post "https://m.x.svc:443/m?timeout=10s": context deadline exceeded',
    "Error from server (ServiceUnavailable): the server is currently unable to handle the request (get jobs.batch)",
    "Error from server (Timeout): the server was unable to return a response in the time allotted, but may still be "
    "processing the request (get jobs.batch)",
    "Error from server (TooManyRequests): the server has received too many requests and has asked us to try again later",
    "Error from server: etcdserver: leader changed",
    'Error from server (Conflict): error when applying patch: Operation cannot be fulfilled on jobs.batch "r": the object has been '
    "modified; please apply your changes to the latest version and try again",
    'Error from server (AlreadyExists): object is being deleted: jobs.batch "fivefold-r-split" already exists',
    'Error from server (Forbidden): error when creating "STDIN": jobs.batch "fivefold-r-split" is forbidden: exceeded quota: '
    "jobs, requested: count/jobs.batch=1, used: count/jobs.batch=9, limited: count/jobs.batch=9",
]


@pytest.mark.parametrize("words", AWAY)
def test_what_kubectl_says_of_a_cluster_that_is_away_is_worth_another_try(cluster: Cluster, words: str) -> None:
    cluster.be_away(1, 1, words)
    with pytest.raises(RetryableError, match=re.escape(words.removeprefix(LOG_OF_KUBECTL))):
        Kubectl(environ=cluster.environ).items("jobs", "a=b")


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5])
def test_a_cluster_that_is_away_for_a_while_is_asked_again(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], first: int
) -> None:
    """At the look at what is there, at the claim, when that or the Job is made, at the first look at pods."""
    cluster.be_away(first, first + 2)
    assert launch(cluster, select(plan_of(cluster), ["split"])) == 0
    said = capsys.readouterr().err
    assert said.count(" again\n") == said.count("fivefold-r-split: applied") == said.count("split: done") == 1


def test_a_cluster_that_stays_away_is_worth_another_try(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_FAILED_POLLS", 3)
    cluster.be_away(1, 999)
    with pytest.raises(RetryableError, match="did you specify the right host or port"):
        launch(cluster)
    said = capsys.readouterr().err
    assert "no longer follow" not in said, "nothing was applied"
    cluster.be_away(len(cluster.calls("get")) + 6, 999)
    with pytest.raises(RetryableError, match="did you specify the right host or port"):
        launch(cluster)
    assert set(cluster.jobs()) == {"split"}
    said = capsys.readouterr().err
    assert "no longer follow" in said
    assert "fivefold-r-split of r in the cluster" in said


def test_ctrl_c_is_heard_while_the_cluster_is_away(cluster: Cluster) -> None:
    cluster.be_away(1, 999)
    process = submit(cluster, "kubernetes.poll_seconds=5")
    wait_until(lambda: len(cluster.calls("get")) == 1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=4)
    assert process.returncode == 130, said


@pytest.mark.parametrize(
    "words",
    [
        'error: context "big" does not exist',
        "error: You must be logged in to the server (Unauthorized)",
        "The connection to the server localhost:8080 was refused - did you specify the right host or port?",
        "Unable to connect to the server: tls: failed to verify certificate: x509: certificate has expired or is not yet valid",
        'Error from server (NotFound): namespaces "eof" not found',
        'Error from server: error when creating "STDIN": admission webhook "v.kyverno.svc-fail" denied the request: no timeout',
        'The Job "fivefold-r-split" is invalid: spec.template.spec.containers[0].resources.requests: Invalid value: "4Gi": must '
        "be less than or equal to memory limit of 2Gi",
    ],
)
def test_what_the_cluster_refuses_is_a_matter_of_settings(cluster: Cluster, words: str) -> None:
    cluster.be_away(4, 4, words)
    with pytest.raises(SettingsError, match=re.escape(words)):
        launch(cluster)
    assert not cluster.jobs()


def test_what_the_cluster_forbids_is_a_matter_of_settings(cluster: Cluster) -> None:
    cluster.grant([{**rule, "verbs": [verb for verb in rule["verbs"] if verb != "create"]} for rule in ROLE])
    with pytest.raises(SettingsError, match=r"kubectl apply was refused.*cannot create resource"):
        launch(cluster)
    with pytest.raises(SettingsError, match=r"needs kubectl.*--dry-run"):
        kubernetes.launch(plan_of(cluster), 0, {**cluster.environ, "PATH": ""})


def test_the_role_of_who_submits_grants_nothing_that_is_not_used(cluster: Cluster) -> None:
    cluster.script(split={"0": [{"code": 75}]})
    cluster.make_no_pods(split=(0, NO_PODS[0]))
    process = submit(cluster, "stages=split")
    wait_until(lambda: cluster.calls("events"))
    (cluster.folder / "no-pods.json").unlink()
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert launch(cluster, select(plan_of(cluster), ["split"])) == 75  # the Job is replaced
    used = {tuple(line.split()) for line in (cluster.folder / "asked.txt").read_text().splitlines()}
    granted = {(verb, resource) for rule in ROLE for resource in rule["resources"] for verb in rule["verbs"]}
    at_times = {("patch", "jobs"), ("patch", "persistentvolumeclaims"), ("list", "pods/log")}
    assert granted - at_times == used


@pytest.mark.parametrize(
    "other",
    ["kubernetes.memory=2Gi", 'kubernetes.limits={"cpu": 4}', "kubernetes.service_account=me", "train.epochs=4"],
)
def test_a_job_that_has_not_started_is_replaced_where_other_resources_are_asked_for(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    cluster.script(split={"0": [{"code": 0, "waits": "0/3 nodes are available: 3 Insufficient memory."}]})
    process = submit(cluster, "stages=split,train-fold", "kubernetes.memory=900Gi")
    wait_until(lambda: len(cluster.calls("jobs,pods")) > 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    first = cluster.uids()
    assert set(first) == {"split"}
    cluster.script()
    plan = select(plan_of(cluster, *([] if "memory" in other else ["kubernetes.memory=900Gi"]), other), ["split"])
    assert launch(cluster, plan) == 0
    assert (cluster.uids() == first) == (other == "train.epochs=4"), "which split does not use"
    assert ("fivefold-r-split had not started" in capsys.readouterr().err) == (other != "train.epochs=4")


def test_the_scores_and_how_to_get_the_run_are_said_at_the_end(cluster: Cluster) -> None:
    scores = {"rows": "x", "n": 20, "accuracy": 0.75, "logloss": None, "f1_macro": 0.5, "ece": 0.1}
    printed = json.dumps({"test": scores, "oof": {**scores, "n": 50, "logloss": 0.5}})
    cluster.script(
        evaluate={"0": [{"code": 0, "log": f"10:00:00 INFO x\n{printed}\n10:00:01 INFO report"}]},
        evaluate_student={"0": [{"code": 0, "log": json.dumps({"holdout": {**scores, "n": 7, "logloss": 0.25}})}]},
    )
    process = submit(cluster, "eval=/data/eval", "kubernetes.namespace=a b", "kubernetes.context=big")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert [line.split() for line in said.splitlines()[:4]] == [
        ["accuracy", "logloss", "rows"],
        ["ensemble", "0.7500", "-", "test,", "20"],
        ["folds", "0.7500", "0.5000", "out-of-fold,", "50"],
        ["student", "0.7500", "0.2500", "holdout,", "7"],
    ]
    copy = f"kubectl --context big --namespace 'a b' cp fivefold-loader:/runs/r {cluster.runs}/r "
    assert copy in said


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
        launch(
            cluster, select(plan_of(cluster, "kubernetes.runs_path=s3://cars/r", train="s3://cars/train"), ["split"])
        )
        == 0
    )
    assert not claim.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train=photos"], r"docs/kubernetes\.md"),
        (["kubernetes.runs_path=here"], "kubernetes.runs_path=here"),
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
