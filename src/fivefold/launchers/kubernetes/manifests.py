"""Render a plan as Kubernetes objects: one Job per step, one Indexed Job for the folds of a seed, and the shared claim.

Paths are the same in every pod: data in `/data` and runs in `/runs`, two folders of one claim, or either at s3://.
Objects are plain dicts. As a program, this module writes the Jobs of `k8s/`: `make manifests`.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from fivefold.config.schema import Kubernetes
from fivefold.contract.files import write_text
from fivefold.contract.run_layout import channel_paths, output_variables
from fivefold.contract.s3.urls import is_url, parse
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import DataError, MissingInputError, SettingsError
from fivefold.launchers.plan import Inputs, Plan, Step, make_plan

Object = dict[str, Any]

DATA, RUNS = "/data", "/runs"
"""The paths of the data and of the runs in every pod: two folders of one claim."""
MAX_NAME_LENGTH = 63
CONTAINER = "fivefold"
STORE = "fivefold-s3"
"""The ConfigMap and the Secret with variables for pods that use s3://. Both may be absent."""
UID = 10001
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": UID,
    "runAsGroup": UID,
    "fsGroup": UID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""A user without root rights; the group may access the claim's files."""
READ_ONLY = {DATA: {"readOnly": True}}
GPU = "nvidia.com/gpu"
GPU_STAGES = ("train-fold", "distill", "ensemble")
KILLED_EXIT_CODE = 137
NON_RETRYABLE_CODES = sorted(
    {SettingsError.exit_code, DataError.exit_code, MissingInputError.exit_code, KILLED_EXIT_CODE}
)
"""Exit codes that a retry would repeat. 137: killed, e.g. at the memory limit."""
MAX_RETRIES = 2
GRACE_PERIOD_S = 120
TTL_S = 7 * 24 * 3600
QUEUE = "kueue.x-k8s.io/queue-name"
NAME, RUN, TASK = (f"app.kubernetes.io/{key}" for key in ("name", "instance", "component"))
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
CACHES = {"HOME": "/tmp", "TORCH_HOME": "/tmp/torch", "HF_HOME": "/tmp/huggingface", "MPLCONFIGDIR": "/tmp/matplotlib"}


@dataclass(frozen=True)
class Task:
    """The work of one Job: a step, or the folds of one seed from 0 on as an Indexed Job. It runs after the tasks it needs."""

    name: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...]
    indexed: bool = False

    @property
    def stage(self) -> str:
        return self.steps[0].stage


def plan_tasks(plan: Plan) -> list[Task]:
    """Return the plan's Jobs in order. Folds that do not start at 0 or are not consecutive get one Job each."""
    names = {step.name: _task_name(plan, step) for step in plan.steps}
    tasks = []
    for name in dict.fromkeys(names.values()):
        steps = tuple(step for step in plan.steps if names[step.name] == name)
        needs = dict.fromkeys(names[need] for step in steps for need in step.needs)
        tasks.append(Task(name, steps, tuple(needs), indexed=name != steps[0].name))
    return tasks


def job_name(run: str, task: str) -> str:
    """Return the name of a task's Job. Kubernetes allows only lower-case letters, digits and hyphens."""
    return re.sub(r"[._]", "-", f"fivefold-{run}-{task}").lower()


def check_names(plan: Plan) -> None:
    """Raise a SettingsError if the run's name cannot be part of the names of its pods."""
    suffixes = [f"{task.name}-{len(task.steps) - 1}" if task.indexed else task.name for task in plan_tasks(plan)]
    available = MAX_NAME_LENGTH - len(job_name("", max(suffixes, key=len)))
    if not plan.run[-1].isalnum() or len(plan.run) > available:
        raise SettingsError(
            f"run={plan.run!r}: on Kubernetes a name must end in a letter or a digit, and may have {available} characters"
        )


def check_inputs(inputs: Inputs, run_folder: Path) -> Inputs:
    """Return the inputs. Only pods can find out whether a ground truth exists beside eval's test.csv.

    Raise a SettingsError if pods cannot read a path: it must be in /data of the claim, or at s3://.
    """
    for name, path in inputs.paths():
        if not is_url(path) and (not PurePosixPath(path).is_relative_to(DATA) or ".." in PurePosixPath(path).parts):
            raise SettingsError(
                f"{name}={path}: pods can read {DATA} of the claim, and s3://; copy it to the claim as docs/kubernetes.md "
                f"shows, and set {name}={DATA}/…"
            )
    return replace(inputs, truth_unknown=bool(inputs.eval and not inputs.ground_truth))


def check_runs(runs: str) -> None:
    """Raise a SettingsError if pods cannot write to the location of runs."""
    if is_url(runs):
        parse(runs, "kubernetes.runs_path")
    elif runs != RUNS:
        raise SettingsError(
            f"kubernetes.runs_path={runs}: runs must be in {RUNS} of the claim, or at s3://bucket/prefix"
        )


def _task_name(plan: Plan, step: Step) -> str:
    """Return the step's name; for consecutive folds of a seed from 0 on `train-folds` or `train-folds-seed-43`."""
    if step.fold is None:
        return step.name
    folds = [other.fold for other in plan.steps if other.fold is not None and other.seed == step.seed]
    return name_without_fold(step, "train-folds") if folds == list(range(len(folds))) else step.name


def name_without_fold(step: Step, text: str) -> str:
    """Return the name of a step that trains a fold, with `text` in place of `fold-2`; a seed suffix stays."""
    return step.name.replace(f"fold-{step.fold}", text, 1)


def claim_manifest(pods: Kubernetes) -> Object:
    """Return the claim for data and runs. Folds on several machines need ReadWriteMany."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": pods.pvc, "labels": {NAME: "fivefold"}},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "50Gi"}}},
    }


def job_manifest(plan: Plan, task: Task, parallel: int = 0) -> Object:
    """Return the Job of a task, with at most `parallel` folds at the same time (0: all)."""
    pods = plan.settings.kubernetes
    labels = {NAME: "fivefold", RUN: plan.run, TASK: task.name}
    queue = {QUEUE: pods.queue} if pods.queue else {}
    count = len(task.steps)
    indexed = {"completionMode": "Indexed", "completions": count, "parallelism": min(parallel, count) or count}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(plan.run, task.name), "labels": {**labels, **queue}},
        "spec": {
            **({"suspend": True} if pods.queue else {}),
            **({**indexed, "backoffLimitPerIndex": MAX_RETRIES} if task.indexed else {"backoffLimit": MAX_RETRIES}),
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailIndex" if task.indexed else "FailJob",
                        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": NON_RETRYABLE_CODES},
                    },
                ]
            },
            "ttlSecondsAfterFinished": TTL_S,
            "template": {"metadata": {"labels": labels}, "spec": pod_template(task, pods)},
        },
    }


def pod_template(task: Task, pods: Kubernetes) -> Object:
    """Return the pod of a task. It complies with the restricted pod security standard.

    The pod gets no token of its service account and no variables of the cluster's services.
    """
    on_gpu = pods.gpus > 0 and task.stage in GPU_STAGES
    step = task.steps[0]
    command = (step.stage, *step.arguments) if task.indexed else step.command
    env = environment(task, pods)
    from_store = [{kind: {"name": STORE, "optional": True}} for kind in ("configMapRef", "secretRef")]
    # twice the request, 8Gi for 4Gi, unless the user sets another limit
    double_memory = re.sub(r"[\d.]+", lambda number: f"{2 * float(number[0]):g}", pods.memory, count=1)
    limits = {"memory": double_memory, **{name: str(value) for name, value in pods.limits.items()}}
    at_store = any(is_url(entry.get("value", "")) for entry in env)
    from_claim = [path for path in (DATA, RUNS) if any(entry.get("value", "").startswith(path) for entry in env)]
    claim_mounts = [
        {"name": "storage", "mountPath": path, "subPath": path.strip("/"), **READ_ONLY.get(path, {})}
        for path in from_claim
    ]
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_PERIOD_S,
        **({"serviceAccountName": pods.service_account} if pods.service_account else {}),
        **({"tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]} if on_gpu else {}),
        "containers": [
            {
                "name": CONTAINER,
                "image": pods.image,
                "imagePullPolicy": "IfNotPresent",
                "args": [escape_dollar(text) for text in command],
                "env": env,
                **({"envFrom": from_store} if at_store else {}),
                "resources": {
                    "requests": {"cpu": str(pods.cpus), "memory": pods.memory},
                    "limits": {**limits, **({GPU: str(pods.gpus)} if on_gpu else {})},
                },
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                },
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [
                    *claim_mounts,
                    {"name": "tmp", "mountPath": "/tmp"},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            *([{"name": "storage", "persistentVolumeClaim": {"claimName": pods.pvc}}] if from_claim else []),
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }


def environment(task: Task, pods: Kubernetes) -> list[Object]:
    """Return the container's variables: RUNS and RUN, and the variables that a stage cannot derive from these."""
    step = task.steps[0]
    run, usual = str(step.folder.parent), task.stage if step.fold is None else f"fold-{step.fold}"
    derived = {f"SM_CHANNEL_{name.upper()}": path for name, path in channel_paths(task.stage, run).items()}
    derived |= output_variables(task.stage, f"{run}/{usual}")
    values = {"RUNS": pods.runs_path.rstrip("/"), "RUN": step.folder.parent.name}
    for name, value in step.environment.items():
        # SM_OUTPUT_DIR must not be a URL; pods also have the termination log
        if derived.get(name) != value and not (name == "SM_OUTPUT_DIR" and is_url(pods.runs_path)):
            values[name] = _map_path(value, task)
    needs_fold = any("$(FOLD)" in value for value in values.values())
    values |= CACHES
    if task.stage in GPU_STAGES and not pods.gpus:
        values |= {"OMP_NUM_THREADS": str(pods.cpus), "GOMP_SPINCOUNT": "20000"}
    fold = [{"name": "FOLD", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}] if needs_fold else []
    return fold + [{"name": name, "value": value} for name, value in values.items()]


def escape_dollar(text: str) -> str:
    """Escape text so that Kubernetes does not substitute $(NAME)."""
    return text.replace("$", "$$")


def _map_path(value: str, task: Task) -> str:
    """Return a path or URL for the pod: relative to $(RUNS)/$(RUN) if it is in the run's folder, with the pod's fold."""
    step, run = task.steps[0], str(task.steps[0].folder.parent)
    if not f"{value}/".startswith(f"{run}/"):
        return escape_dollar(value)
    path = value.removeprefix(run)
    if task.indexed:
        path = path.replace(f"/{step.name}", f"/{name_without_fold(step, 'fold-$(FOLD)')}")
    return f"$(RUNS)/$(RUN){path}"


def to_yaml(objects: Sequence[Object]) -> str:
    """Return the objects as one YAML file."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


class _Dumper(yaml.SafeDumper):
    """Write no aliases, and quote texts that YAML readers other than PyYAML take for a number or a bool."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("float", re.compile(r"([yYnN]|[-+.0-9][-+.0-9a-fA-FxXoO_]*)$"), list("yYnN-+.0123456789"))


def render_files() -> dict[str, str]:
    """Return the text of each rendered file by its path in `k8s/`: the Jobs of the run `first` with the recipe `small_images`."""
    inputs = Inputs(f"{DATA}/train", f"{DATA}/eval", truth_unknown=True)
    plan = make_plan(inputs, run="first", runs=RUNS, recipe="small_images")
    files = {"pvc.yaml": (CLAIM_COMMENT, claim_manifest(plan.settings.kubernetes))}
    for task in plan_tasks(plan):
        after = f"After {', '.join(task.needs)}. " if task.needs else ""
        comment = f"{task.name}: {STAGES[task.stage].summary}. {after}The claim of pvc.yaml must exist."
        files[f"{task.name}-job.yaml"] = (comment, job_manifest(plan, task))
    return {name: HEADER.format(comment, name) + to_yaml([manifest]) for name, (comment, manifest) in files.items()}


HEADER = "# {}\n#\n#     kubectl apply -f k8s/{}\n#\n# Rendered from the plan by `make manifests`.\n"
CLAIM_COMMENT = (
    "The claim for the data and the runs. Apply it once. Deleting it deletes the data and the runs (docs/kubernetes.md\n"
    "# describes how to keep them). Folds on several machines need ReadWriteMany."
)


if __name__ == "__main__":
    for path, text in render_files().items():
        write_text(Path(sys.argv[1]) / path, text)
