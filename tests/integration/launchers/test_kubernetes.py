"""A plan on a cluster: real processes of a fake kubectl that stores its objects in a folder (`fake_kubectl.py`)."""

import json
import re
import sys
import time
from collections.abc import Sequence
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
from fivefold.launchers.terminal import read_lines
from jobs import submit as jobs_submit
from reference_run import REPOSITORY, act_when, interrupt

FOLDS_JOB = "fivefold-r-train-folds"
FAST_SETTINGS = ("split.folds=3", "kubernetes.poll_seconds=0.05")
TRAINING = ("split", "train-fold")
REQUEST_ARGUMENTS = ("platform=kubernetes", "recipe=demo", "run=r", "train=/data/train")
ROLE = yaml.safe_load((REPOSITORY / "k8s" / "contrib" / "submit-role.yaml").read_text())["rules"]
KUBECTL = f"""#!{sys.executable} -IS
import sys
sys.path.append({str(REPOSITORY / "tests")!r})
import fake_kubectl
sys.exit(fake_kubectl.main(sys.argv[1:]))
"""
KUBECTL_LOG = (
    'E1201 16:20:01.123456   12345 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API group list: '
    'Get \\"https://10.0.0.1:6443/api?timeout=32s\\": dial tcp 10.0.0.1:6443: connect: connection refused"\n'
)
CONNECTION_REFUSED = (
    f"{KUBECTL_LOG}The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
)


class FakeCluster:
    """The folder in which the fake kubectl stores its objects."""

    def __init__(self, root: Path) -> None:
        self.folder, self.runs, self.programs = root / "cluster", root / "runs", root / "bin"
        self.folder.mkdir()
        self.programs.mkdir()
        (self.programs / "kubectl").write_text(KUBECTL)
        (self.programs / "kubectl").chmod(0o755)
        self.script_pods()
        self.grant(ROLE)

    def write_by_job(self, file: str, values: dict[str, Any]) -> None:
        by_job_name = {f"fivefold-r-{name.replace('_', '-')}": value for name, value in values.items()}
        (self.folder / file).write_text(json.dumps(by_job_name))

    def script_pods(self, **tries: Any) -> None:
        """Set how the tries of pods end: `train_folds={"1": [{"code": 65}]}`."""
        self.write_by_job("script.json", tries)

    def grant(self, rules: list[dict[str, Any]]) -> None:
        """Set the permissions of the user of kubectl; the default is `submit-role.yaml`."""
        (self.folder / "role.json").write_text(json.dumps(rules))

    def set_outage(self, first: int, last: int, message: str = CONNECTION_REFUSED) -> None:
        (self.folder / "outage.json").write_text(json.dumps([first, last, message]))

    def block_pods(self, **jobs: tuple[int, str]) -> None:
        self.write_by_job("no-pods.json", jobs)

    def allow_pods(self) -> None:
        (self.folder / "no-pods.json").unlink()

    def calls(self, verb: str) -> list[list[str]]:
        file = self.folder / "calls.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for line in lines if verb in (call := json.loads(line))]

    def jobs(self) -> dict[str, dict[str, Any]]:
        loaded = [json.loads(path.read_text()) for path in sorted(self.folder.glob("job-*.json"))]
        return {job["metadata"]["name"].removeprefix("fivefold-r-"): job for job in loaded}

    def uids(self) -> dict[str, str]:
        return {name: job["metadata"]["uid"] for name, job in self.jobs().items()}

    def log(self, step: str) -> list[str]:
        return read_lines(self.runs / "r" / step / "log.txt")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake_cluster = FakeCluster(tmp_path)
    monkeypatch.setenv("PATH", f"{fake_cluster.programs}:/usr/bin:/bin")
    monkeypatch.setenv("CLUSTER", str(fake_cluster.folder))
    return fake_cluster


def make_demo_plan(cluster: FakeCluster, *overrides: str, stages: Sequence[str] = TRAINING, **inputs: Any) -> Plan:
    plan_inputs = Inputs(**{"train": "/data/train", **inputs})
    plan = make_plan(plan_inputs, [*FAST_SETTINGS, *overrides], run="r", runs=str(cluster.runs), recipe="demo")
    return select(plan, stages)


def launch(cluster: FakeCluster, *overrides: str, **options: Any) -> int:
    return kubernetes.launch(make_demo_plan(cluster, *overrides, **options))


def test_all_steps_run_in_order(cluster, capsys):
    pods = {"1": [{"code": 0, "log": "epoch 1 of 3\nepoch 2 of 3", "creating": 1}]}
    cluster.script_pods(train_folds=pods)
    plan = make_demo_plan(cluster, stages=(), eval="/data/eval", truth_unknown=True)
    assert kubernetes.launch(plan) == 0
    assert len(cluster.calls("apply")) == 1 + 7
    output = capsys.readouterr().err
    assert " waits: " not in output
    finished = re.findall(r"^fivefold-r-(\S+): done$", output, re.MULTILINE)
    assert finished[:2] == ["split", "train-folds"]
    assert finished.index("ensemble") < finished.index("evaluate")
    assert finished.index("distill") < finished.index("ensemble-student") < finished.index("evaluate-student")
    printed_manifests = list(yaml.safe_load_all(kubernetes.describe(plan)))
    claim = json.loads((cluster.folder / "persistentvolumeclaim-fivefold.json").read_text())
    assert claim["spec"] == manifests.claim_manifest(plan.settings.kubernetes)["spec"]
    assert {manifest["metadata"]["name"]: manifest["spec"] for manifest in printed_manifests} == {
        job["metadata"]["name"]: job["spec"] for job in cluster.jobs().values()
    }
    assert "[fold-1] epoch 1 of 3\n[fold-1] epoch 2 of 3\n" in output
    assert cluster.log("fold-1") == ["epoch 1 of 3", "epoch 2 of 3"]
    assert cluster.log("fold-2") == ["works"]


ERROR_MESSAGE = "train.lr=x\n\nTraceback (most recent call last):\n  File x"
CUT_MESSAGE = f"le 'x'\n{ERROR_MESSAGE[12:]}\nKeyError: 'x'"
LOG_TAIL = "s/s, 39 s left\n16:20:01 INFO    fold 1: epoch 3\n16:20:16 INFO    fold 1: epoch 4\n"


@pytest.mark.parametrize(
    ("job", "tries", "code", "message"),
    [
        ("train_folds", [{"code": 64, "message": ERROR_MESSAGE}], 64, "fold-1: exit code 64: train.lr=x\n"),
        ("train_folds", [{"code": 75, "message": "store away"}, {"code": 0}], 0, "failed: exit code 75: store away"),
        ("split", [{"code": None, "message": "Allocate failed"}], 75, "lost: Allocate failed"),
        ("split", [{"code": 1, "message": CUT_MESSAGE}], 1, "exit code 1: KeyError: 'x'"),
        ("split", [{"code": 143, "message": "39 s left\r\n SIGTERM: stops\n"}], 75, "0-0, stopped: exit code 143: SIG"),
    ],
)
def test_failed_pod_is_reported_with_its_last_message(cluster, capsys, job, tries, code, message):
    cluster.script_pods(**{job: {"1" if job == "train_folds" else "0": tries}})
    assert launch(cluster) == code
    assert message in capsys.readouterr().err
    if code:
        assert set(cluster.jobs()) == ({"split", "train-folds"} if job == "train_folds" else {"split"})


def test_drained_pod_is_replaced_and_not_reported_as_failed(cluster, capsys):
    drained = {"code": 137, "drained": True, "message": LOG_TAIL}
    cluster.script_pods(train_folds={"1": [drained] * 3 + [{"code": 0}]})
    assert launch(cluster) == 0
    output = capsys.readouterr().err
    assert len(re.findall("stopped, a new pod .*: exit code 137: 16:20:16 INFO    fold 1: epoch 4\n", output)) == 3
    assert "failed" not in output


@pytest.mark.parametrize(
    ("pod", "overrides", "limit"),
    [
        ({"code": 137}, ['kubernetes.limits={"memory": "9Gi"}'], "9Gi"),
        ({"code": 1, "limit_range": "2Gi"}, [], "2Gi (a LimitRange"),  # one of the main process's children was killed
    ],
)
def test_pod_out_of_memory_reports_its_limit_and_is_not_retried(cluster, capsys, pod, overrides, limit):
    cluster.script_pods(split={"0": [{**pod, "reason": "OOMKilled", "message": LOG_TAIL}]})
    assert launch(cluster, *overrides) == 137
    assert f"out of memory at its limit of {limit}" in capsys.readouterr().err
    assert (len(list(cluster.folder.glob("pod-*"))) == 1) == (pod["code"] == 137)


def test_same_command_reruns_only_failed_jobs_and_jobs_with_changed_settings(cluster):
    cluster.script_pods(train_folds={"0": [{"code": 65}]})
    assert launch(cluster) == 65
    first = cluster.uids()
    cluster.script_pods()
    assert launch(cluster, "kubernetes.memory=6Gi") == 0
    second = cluster.uids()
    assert {name for name in first if first[name] != second[name]} == {"train-folds"}
    assert launch(cluster, "train.epochs=4") == 0
    third = cluster.uids()
    assert {name for name in second if second[name] == third[name]} == {"split"}
    assert launch(cluster, "train.epochs=4") == 0
    assert cluster.uids() == third, "all jobs are done"


def test_signal_stops_following_the_jobs_but_not_the_jobs(cluster, capsys):
    endless_pod, memory = {"code": 0, "forever": True}, "kubernetes.memory=1024Mi"
    cluster.script_pods(train_folds={"0": [{"code": 0, "log": "a\na\nb"}], "1": [endless_pod], "2": [endless_pod]})
    logs = {"fold-0": ["a", "a", "b"], "fold-1": ["works"], "fold-2": ["works"]}
    with act_when(lambda: {name: cluster.log(name) for name in logs} == logs, interrupt):
        assert launch(cluster, memory) == 130
    output = capsys.readouterr().err
    assert f"no longer following {FOLDS_JOB} of r" in output
    assert "kubectl delete jobs --selector app.kubernetes.io/instance=r" in output
    assert cluster.calls("delete") == []

    applied = len(cluster.calls("apply"))
    for other in ("train.epochs=4", "kubernetes.memory=5Gi"):
        with pytest.raises(SettingsError, match="runs with other settings"):
            launch(cluster, other)
    assert len(cluster.calls("apply")) == applied

    followed = len(cluster.calls("logs"))
    let_pods_end = (cluster.folder / "go").touch
    with act_when(lambda: len(cluster.calls("logs")) >= followed + 3, let_pods_end):
        assert launch(cluster, memory) == 0
    output = capsys.readouterr().err
    assert re.search("fivefold-r-split .* done: skipped", output)
    assert re.search(f"{FOLDS_JOB} .* runs: .*follow", output)
    assert "[fold-" not in output, "lines that are already in the log are not printed again"
    assert {name: cluster.log(name) for name in logs} == logs


def test_repeatedly_cut_off_log_contains_each_line_once(cluster):
    lines = [f"epoch {number}" for number in (1, 2, 2, 3)]
    cluster.script_pods(train_folds={"1": [{"code": 0, "log": "\n".join(lines), "cut": True}]})
    assert launch(cluster) == 0
    assert len([call for call in cluster.calls("logs") if f"{FOLDS_JOB}-1-0" in call]) > 2
    assert cluster.log("fold-1") == lines


def test_pending_reason_is_logged_once_and_a_deleted_job_is_a_failure(cluster, capsys):
    reason = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    cluster.script_pods(split={"0": [{"code": 0, "waits": reason}]})
    delete_jobs = (cluster.folder / "delete-jobs").touch
    with act_when(lambda: len(cluster.calls("jobs,pods")) > 4, delete_jobs):
        assert launch(cluster) == 75
    output = capsys.readouterr().err
    assert output.count(f"split waits: Unschedulable: {reason}") == 1
    assert "the Job fivefold-r-split was deleted" in output


POD_CREATION_ERRORS = [
    'Pod "POD" is invalid: spec.containers[0].resources.requests: Invalid value: "4Gi": must be less than or equal to memory limit of 2Gi',
    'pods "POD" is forbidden: exceeded quota: team, requested: requests.memory=4Gi, used: requests.memory=7Gi, limited: requests.memory=8Gi',
]


@pytest.mark.parametrize(
    ("job", "max_pods", "message"),
    [("split", 0, POD_CREATION_ERRORS[0]), ("train_folds", 2, POD_CREATION_ERRORS[1])],
)
def test_reason_for_missing_pods_is_logged_once(cluster, capsys, job, max_pods, message):
    cluster.block_pods(**{job: (max_pods, message)})
    with act_when(lambda: len(cluster.calls("events")) > 3, cluster.allow_pods):
        assert launch(cluster) == 0
    output, name = capsys.readouterr().err, f"fivefold-r-{job.replace('_', '-')}"
    pod = f"{name}-[0-9a-f]{{5}}"
    expected = re.escape(f"{name} waits: FailedCreate: Error creating: {message}").replace("POD", pod)
    assert len(re.findall(f"(?m)^{expected}$", output)) == output.count(" waits: ") == 1, output


def test_missing_permission_to_list_events_is_logged_once(cluster, capsys):
    cluster.grant([rule for rule in ROLE if rule["resources"] != ["events"]])
    cluster.block_pods(split=(0, POD_CREATION_ERRORS[0]))
    with act_when(lambda: len(cluster.calls("events")) > 2, cluster.allow_pods):
        assert launch(cluster, stages=("split",)) == 0
    assert capsys.readouterr().err.count('cannot list resource "events"') == 1


UNREACHABLE_MESSAGES = [
    CONNECTION_REFUSED,
    "Unable to connect to the server: context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
    "error: http2: client connection lost",
    "error: stream error: stream ID 1; INTERNAL_ERROR; received from peer",
    'Error from server (InternalError): error when creating "STDIN": Internal error occurred: failed calling webhook "m.x": '
    'failed to call webhook: Post "https://m.x.svc:443/m?timeout=10s": context deadline exceeded',
    "Error from server (ServiceUnavailable): the server is currently unable to handle the request (get jobs.batch)",
    "Error from server (TooManyRequests): the server has received too many requests and has asked us to try again later",
    "Error from server: etcdserver: leader changed",
    'Error from server (Conflict): error when applying patch: Operation cannot be fulfilled on jobs.batch "r": the object has been '
    "modified; please apply your changes to the latest version and try again",
    'Error from server (AlreadyExists): object is being deleted: jobs.batch "fivefold-r-split" already exists',
    'Error from server (Forbidden): error when creating "STDIN": jobs.batch "fivefold-r-split" is forbidden: exceeded quota: '
    "jobs, requested: count/jobs.batch=1, used: count/jobs.batch=9, limited: count/jobs.batch=9",
]


@pytest.mark.parametrize("message", UNREACHABLE_MESSAGES)
def test_kubectl_errors_of_an_unreachable_cluster_are_retryable(cluster, message):
    cluster.set_outage(1, 1, message)
    with pytest.raises(RetryableError, match=re.escape(message.removeprefix(KUBECTL_LOG))):
        Kubectl().items("jobs", "a=b")


@pytest.mark.parametrize("first_call", [1, 3, 5])
def test_temporarily_unreachable_cluster_is_retried(cluster, capsys, first_call):
    """The outage starts when submit lists objects, creates the claim, or first lists pods."""
    cluster.set_outage(first_call, first_call + 2)
    assert launch(cluster, stages=("split",)) == 0
    output = capsys.readouterr().err
    assert output.count(" again\n") == output.count("fivefold-r-split: applied") == output.count("split: done") == 1


def test_cluster_that_stays_unreachable_raises_a_retryable_error(cluster, capsys, monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_FAILED_POLLS", 3)
    for first_call in (1, 9):
        cluster.set_outage(first_call, 999)
        with pytest.raises(RetryableError, match="did you specify the right host or port"):
            launch(cluster)
        output = capsys.readouterr().err
        assert ("no longer following fivefold-r-split of r in the cluster" in output) == (first_call > 1)
    assert set(cluster.jobs()) == {"split"}


def test_ctrl_c_interrupts_submit_while_the_cluster_is_unreachable(cluster):
    cluster.set_outage(1, 999)
    start = time.monotonic()
    with act_when(lambda: cluster.calls("get"), interrupt):
        assert launch(cluster, "kubernetes.poll_seconds=5") == 130
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    "message",
    [
        'error: context "big" does not exist',
        "The connection to the server localhost:8080 was refused - did you specify the right host or port?",
        "Unable to connect to the server: tls: failed to verify certificate: x509: certificate has expired or is not yet valid",
        'Error from server: error when creating "STDIN": admission webhook "v.kyverno.svc-fail" denied the request: no timeout',
        'The Job "fivefold-r-split" is invalid: spec.template.spec.containers[0].resources.requests: Invalid value: "4Gi": must '
        "be less than or equal to memory limit of 2Gi",
    ],
)
def test_requests_that_the_cluster_refuses_raise_settings_errors(cluster, message):
    cluster.set_outage(1, 1, message)
    with pytest.raises(SettingsError, match=re.escape(message)):
        Kubectl().apply({})


def test_forbidden_actions_and_a_missing_kubectl_raise_settings_errors(cluster, monkeypatch):
    cluster.grant([{**rule, "verbs": [verb for verb in rule["verbs"] if verb != "create"]} for rule in ROLE])
    with pytest.raises(SettingsError, match=r"kubectl apply was refused.*cannot create resource"):
        launch(cluster)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SettingsError, match=r"needs kubectl.*--dry-run"):
        launch(cluster)


def test_submit_role_grants_only_permissions_that_are_used(cluster):
    cluster.script_pods(split={"0": [{"code": 65}]})
    cluster.block_pods(split=(0, POD_CREATION_ERRORS[0]))
    with act_when(lambda: cluster.calls("events"), cluster.allow_pods):
        assert launch(cluster) == 65
    assert launch(cluster) == 65  # the Job is replaced
    used = {tuple(line.split()) for line in (cluster.folder / "asked.txt").read_text().splitlines()}
    granted = {(verb, resource) for rule in ROLE for resource in rule["resources"] for verb in rule["verbs"]}
    sometimes_used = {("patch", "jobs"), ("patch", "persistentvolumeclaims"), ("list", "pods/log")}
    assert granted - sometimes_used == used


@pytest.mark.parametrize(
    "override",
    ["kubernetes.memory=2Gi", "kubernetes.service_account=me", "train.epochs=4"],
)
def test_job_that_has_not_started_is_replaced_if_its_resources_change(cluster, capsys, override):
    cluster.script_pods(split={"0": [{"code": 0, "waits": "0/3 nodes are available: 3 Insufficient memory."}]})
    memory = "kubernetes.memory=900Gi"
    with act_when(lambda: len(cluster.calls("jobs,pods")) > 1, interrupt):
        assert launch(cluster, memory) == 130
    first = cluster.uids()
    assert set(first) == {"split"}
    cluster.script_pods(split={"0": [{"code": 0, "creating": 12}]})
    assert launch(cluster, *([] if "memory" in override else [memory]), override, stages=("split",)) == 0
    assert (cluster.uids() == first) == (override == "train.epochs=4"), "split does not use train.epochs"
    assert ("fivefold-r-split had not started" in capsys.readouterr().err) == (override != "train.epochs=4")


def test_submit_prints_the_scores_and_the_command_that_copies_the_run(cluster, capsys):
    scores = {"rows": "x", "n": 20, "accuracy": 0.75, "logloss": None, "f1_macro": 0.5, "ece": 0.1}
    printed = json.dumps({"test": scores, "oof": {**scores, "n": 50, "logloss": 0.5}})
    cluster.script_pods(
        evaluate={"0": [{"code": 0, "log": f"10:00:00 INFO x\n{printed}\n10:00:01 INFO report"}]},
        evaluate_student={"0": [{"code": 0, "log": json.dumps({"holdout": {**scores, "n": 7, "logloss": 0.25}})}]},
    )
    arguments = ["check=false", "stages=evaluate,evaluate-student", "eval=/data/eval"]
    arguments += ["kubernetes.namespace=a b", "kubernetes.context=big"]
    assert jobs_submit.main([f"runs={cluster.runs}", *REQUEST_ARGUMENTS, *FAST_SETTINGS, *arguments]) == 0
    output = capsys.readouterr().out
    assert [line.split() for line in output.splitlines()[:4]] == [
        ["accuracy", "logloss", "rows"],
        ["ensemble", "0.7500", "-", "test,", "20"],
        ["folds", "0.7500", "0.5000", "out-of-fold,", "50"],
        ["student", "0.7500", "0.2500", "holdout,", "7"],
    ]
    assert "the run is in /runs/r of the claim fivefold" in output
    copy = f"kubectl --context big --namespace 'a b' cp fivefold-loader:/runs/r {cluster.runs}/r"
    assert copy in output


def test_calls_name_namespace_and_context_and_a_claim_is_kept_and_not_needed_for_a_bucket(cluster):
    claim = cluster.folder / "persistentvolumeclaim-fivefold.json"
    claim.write_text("{}")
    assert launch(cluster, "kubernetes.namespace=teams", "kubernetes.context=big", stages=("split",)) == 0
    assert claim.read_text() == "{}"
    for call in cluster.calls("--filename") + cluster.calls("get") + cluster.calls("logs"):
        assert call[:4] == ["--context", "big", "--namespace", "teams"]
    claim.unlink()
    (cluster.folder / "job-fivefold-r-split.json").unlink()
    assert launch(cluster, "kubernetes.runs_path=s3://cars/r", stages=("split",), train="s3://cars/train") == 0
    assert not claim.exists()


def test_invalid_requests_raise_errors_before_anything_is_written(cluster):
    for argument in ("train=photos", "kubernetes.runs_path=here", "kubernetes.memory=much", f"run={'a' * 60}"):
        with pytest.raises(SettingsError):
            jobs_submit.main([f"runs={cluster.runs}", *REQUEST_ARGUMENTS, argument])
    assert not cluster.runs.exists()
    assert not (cluster.folder / "calls.txt").exists()
