"""A plan as Kubernetes objects: one Job a step, one Indexed Job for the folds of a seed, and the claim that they share.

Paths are the same in every pod: data in `/data`, runs in `/runs`, two folders of one claim, or either at s3://.
Objects are plain dicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fivefold.contract.layout import channels_of, outputs_of
from fivefold.contract.s3.urls import is_url
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.launchers.plan import Plan
from fivefold.launchers.tasks import DATA, RUNS, Task, job_name, name_with

Object = dict[str, Any]

CONTAINER = "fivefold"
STORE = "fivefold-s3"
"""The ConfigMap and the Secret that a pod takes variables from where anything lies at s3://; both may be absent."""
UID = 10001
GPU = "nvidia.com/gpu"
ON_GPU = ("train-fold", "distill", "ensemble")
PERMANENT = sorted({SettingsError.exit_code, DataError.exit_code, MissingInputError.exit_code})
"""Exit codes that come again with the same command."""
RETRIES = 2
SECONDS_OF_GRACE = 120
SECONDS_KEPT = 7 * 24 * 3600
QUEUE = "kueue.x-k8s.io/queue-name"
NAME, RUN, TASK = (f"app.kubernetes.io/{key}" for key in ("name", "instance", "component"))
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
CACHES = {"HOME": "/tmp", "TORCH_HOME": "/tmp/torch", "HF_HOME": "/tmp/huggingface", "MPLCONFIGDIR": "/tmp/matplotlib"}


@dataclass(frozen=True)
class Pods:
    """What a run's pods are made of and ask for; `runs` is `/runs`, a folder of the claim, or an s3:// URL.

    `cpus` are requested, and without a GPU they are the threads of a process that trains or predicts. In a `queue`
    Jobs wait, suspended, for Kueue. `parallel` is how many folds run at once, 0 for all.
    """

    image: str = "fivefold:latest"
    claim: str = "fivefold"
    runs: str = RUNS
    gpus: int = 1
    cpus: int = 2
    memory: str = "4Gi"
    service_account: str = ""
    queue: str = ""
    parallel: int = 0


def claim(pods: Pods) -> Object:
    """The claim that data and runs share. Folds on several machines need ReadWriteMany."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": pods.claim, "labels": {NAME: "fivefold"}},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "50Gi"}}},
    }


def job(plan: Plan, task: Task, pods: Pods) -> Object:
    """The Job of a task. Exit codes that come again end it (or its index) at once; a drained machine costs no try."""
    labels = {NAME: "fivefold", RUN: plan.run, TASK: task.name}
    queue = {QUEUE: pods.queue} if pods.queue else {}
    count = len(task.steps)
    indexed: Object = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": min(pods.parallel, count) or count,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(plan.run, task.name), "labels": labels | queue},
        "spec": {
            **({"suspend": True} if pods.queue else {}),
            **({**indexed, "backoffLimitPerIndex": RETRIES} if task.indexed else {"backoffLimit": RETRIES}),
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailIndex" if task.indexed else "FailJob",
                        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": PERMANENT},
                    },
                ]
            },
            "ttlSecondsAfterFinished": SECONDS_KEPT,
            "template": {"metadata": {"labels": labels}, "spec": pod(task, pods)},
        },
    }


def pod(task: Task, pods: Pods) -> Object:
    """The pod of a task, within the restricted pod security standard."""
    on_gpu = pods.gpus > 0 and task.stage in ON_GPU
    step = task.steps[0]
    command = (step.stage, *step.arguments) if task.indexed else step.command
    env = environment(task, pods)
    at_store = any(is_url(entry.get("value", "")) for entry in env)
    from_claim = [path for path in (DATA, RUNS) if any(entry.get("value", "").startswith(path) for entry in env)]
    return {
        **pod_security(),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_OF_GRACE,
        **({"serviceAccountName": pods.service_account} if pods.service_account else {}),
        **({"tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]} if on_gpu else {}),
        "containers": [
            {
                "name": CONTAINER,
                "image": pods.image,
                "imagePullPolicy": "IfNotPresent",
                "args": [literal(text) for text in command],
                "env": env,
                **({"envFrom": variables_of_store()} if at_store else {}),
                "resources": _resources(pods, pods.gpus if on_gpu else 0),
                **container_security(),
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": mounts(from_claim),
            }
        ],
        "volumes": volumes(pods, bool(from_claim)),
    }


def pod_security() -> Object:
    """A user that is not root, who owns the claim's files as a group; nothing of the cluster's own inside."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def container_security() -> Object:
    context = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    return {"securityContext": context}


def environment(task: Task, pods: Pods) -> list[Object]:
    """The container's variables: the run, and what a stage that knows its run does not find there by itself."""
    own = {name: _placed(value, task) for name, value in _not_found(task).items()}
    if is_url(pods.runs):  # where a platform looks for a failure file is no URL; pods have the termination log besides
        own.pop("SM_OUTPUT_DIR", None)
    threads = {"OMP_NUM_THREADS": str(pods.cpus), "GOMP_SPINCOUNT": "20000"}
    on_cores = threads if task.stage in ON_GPU and not pods.gpus else {}
    index = {"name": "FOLD", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    fold = [index] if any("$(FOLD)" in value for value in own.values()) else []
    named = {"RUNS": pods.runs.rstrip("/"), "RUN": task.steps[0].folder.parent.name, **own, **CACHES, **on_cores}
    return fold + [{"name": name, "value": value} for name, value in named.items()]


def _not_found(task: Task) -> dict[str, str]:
    """The step's variables, but for those that are where the layout of runs has them."""
    step = task.steps[0]
    run, usual = str(step.folder.parent), task.stage if step.fold is None else f"fold-{step.fold}"
    known = {f"SM_CHANNEL_{name.upper()}": path for name, path in channels_of(task.stage, run).items()}
    known |= outputs_of(task.stage, f"{run}/{usual}")
    return {name: value for name, value in step.environment.items() if known.get(name) != value}


def literal(text: str) -> str:
    """Text in which Kubernetes puts no variable in place of $(NAME)."""
    return text.replace("$", "$$")


def _placed(value: str, task: Task) -> str:
    """A path or URL as the pod sees it: in the run's folder, wherever runs are; there in that of the pod's fold."""
    step = task.steps[0]
    if not PurePosixPath(value).is_relative_to(step.folder.parent):
        return literal(value)
    parts = PurePosixPath(value).relative_to(step.folder.parent).parts
    if task.indexed and parts[:1] == (step.name,):
        parts = (name_with(step, "fold-$(FOLD)"), *parts[1:])
    return "/".join(["$(RUNS)", "$(RUN)", *parts])


def variables_of_store() -> list[Object]:
    """Where credentials and the address of a store come from, if they are there."""
    return [{kind: {"name": STORE, "optional": True}} for kind in ("configMapRef", "secretRef")]


def _resources(pods: Pods, gpus: int) -> Object:
    limits = {"limits": {GPU: str(gpus)}} if gpus else {}
    return {"requests": {"cpu": str(pods.cpus), "memory": pods.memory}, **limits}


def mounts(paths: Sequence[str], read_only: Sequence[str] = (DATA,)) -> list[Object]:
    """Where a container sees these folders of the claim, and what it may write to besides: /tmp, and /dev/shm in memory."""
    found: list[Object] = [{"name": "storage", "mountPath": path, "subPath": path.strip("/")} for path in paths]
    for mount in found:
        mount |= {"readOnly": True} if mount["mountPath"] in read_only else {}
    return [*found, {"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]


def volumes(pods: Pods, with_claim: bool = True) -> list[Object]:
    storage = {"name": "storage", "persistentVolumeClaim": {"claimName": pods.claim}}
    return [
        *([storage] if with_claim else []),
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
