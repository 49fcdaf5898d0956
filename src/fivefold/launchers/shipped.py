"""The files of `k8s/` that are rendered: the run `first` of the recipe `small_images`, each file with all that it needs.

`make manifests` writes them, and a test holds that they are up to date. The kustomizations beside them are written by hand.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fivefold.contract.files import write_text
from fivefold.launchers.engines import train_job, workflow
from fivefold.launchers.manifests import (
    CONTAINER,
    NAME,
    STORE,
    TASK,
    Object,
    Pods,
    claim,
    container_security,
    environment,
    job,
    mounts,
    pod_security,
    variables_of_store,
    volumes,
)
from fivefold.launchers.plan import Inputs, Plan, make_plan
from fivefold.launchers.tasks import DATA, RUNS, tasks_of
from fivefold.launchers.yaml_text import as_yaml

RECIPE = "small_images"
PODS = Pods()
ON_ITS_OWN = ("split", "train-folds", "ensemble", "evaluate", "distill")
LOADER = "fivefold-loader"
SECONDS_TO_LOAD = 4 * 3600
FOLD_OF_NODES = 0
KUSTOMIZATION = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


def plan() -> Plan:
    """The plan that the files are rendered from."""
    return make_plan(Inputs(f"{DATA}/train", f"{DATA}/eval"), run="first", runs=RUNS, recipe=RECIPE)


def files() -> dict[str, str]:
    """The text of each rendered file by its path below `k8s/`."""
    made, shared = plan(), claim(PODS)
    jobs = {task.name: job(made, task, PODS) for task in tasks_of(made)}
    found = {f"{name}-job.yaml": [shared, jobs[name]] for name in ON_ITS_OWN}
    found |= {
        "pvc.yaml": [shared],
        "loader-pod.yaml": [shared, loader(PODS)],
        "base/run.yaml": [shared, *jobs.values()],
        "overlays/s3/kustomization.yaml": [store_overlay(made)],
        "argo/workflow.yaml": [shared, *workflow(made, PODS, RECIPE)],
        "trainer/trainjob.yaml": [shared, *train_job(made, PODS, FOLD_OF_NODES)],
    }
    return {name: as_yaml(objects, COMMENTS[name]) for name, objects in found.items()}


def loader(pods: Pods) -> Object:
    """A pod that does nothing for some hours, for `kubectl cp` to put data into the claim through it."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": LOADER, "labels": {NAME: "fivefold"}},
        "spec": {
            **pod_security(),
            "restartPolicy": "Never",
            "activeDeadlineSeconds": SECONDS_TO_LOAD,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": CONTAINER,
                    "image": pods.image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sleep", str(SECONDS_TO_LOAD)],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
                    **container_security(),
                    "volumeMounts": mounts([DATA, RUNS], read_only=()),
                }
            ],
            "volumes": volumes(pods),
        },
    }


def store_overlay(made: Plan) -> Object:
    """A kustomization that puts what the Jobs read and write below $(STORE), and takes the claim from them."""
    removed = {"$patch": "delete", **_name_alone(claim(PODS))}
    patches = [
        {
            "target": {"kind": "Job", "labelSelector": f"{TASK}={task.name}"},
            "patch": as_yaml([_in_store(environment(task, PODS))]),
        }
        for task in tasks_of(made)
    ]
    return {
        **KUSTOMIZATION,
        "resources": ["../../base"],
        "configMapGenerator": [
            {
                "name": STORE,
                "literals": ["STORE=s3://my-bucket/fivefold", "AWS_REGION=eu-central-1"],
                "options": {"disableNameSuffixHash": True},
            }
        ],
        "patches": [{"patch": as_yaml([removed])}, *patches],
    }


def _in_store(env: Sequence[Mapping[str, Any]]) -> Object:
    """The patch of one Job."""
    values = {entry["name"]: entry["value"] for entry in env if "value" in entry}
    moved = {name: f"$(STORE){value}" for name, value in values.items() if value.startswith((DATA, RUNS))}
    no_folder = [{"$patch": "delete", "name": "SM_OUTPUT_DIR"}] if "SM_OUTPUT_DIR" in values else []
    container = {
        "name": CONTAINER,
        "env": [*({"name": name, "value": value} for name, value in moved.items()), *no_folder],
        "envFrom": variables_of_store(),
        "volumeMounts": [{"$patch": "delete", "mountPath": path} for path in (DATA, RUNS)],
    }
    pod = {"containers": [container], "volumes": [{"$patch": "delete", "name": "storage"}]}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "any"}, "spec": {"template": {"spec": pod}}}


def _name_alone(one: Mapping[str, Any]) -> Object:
    return {"apiVersion": one["apiVersion"], "kind": one["kind"], "metadata": {"name": one["metadata"]["name"]}}


def write(folder: Path) -> None:
    """Writes every rendered file below `folder`."""
    for name, text in files().items():
        write_text(folder / name, text)


_RENDERED = "Rendered from the plan by `make manifests`."
_STAGE = (
    "{what}\n\n    kubectl apply -f k8s/{name}-job.yaml\n    kubectl wait --for=condition=complete --timeout=24h "
    "job/fivefold-first-{name}\n\nThe claim `fivefold` holds /data and /runs; the run is `first`. Without GPUs: the overlay cpu.\n"
    + _RENDERED
)
COMMENTS = {
    "split-job.yaml": _STAGE.format(name="split", what="Images in /data/train to folds, in /runs/first/split."),
    "train-folds-job.yaml": _STAGE.format(
        name="train-folds", what="Every fold in a pod of its own, side by side: FOLD is the pod's index. After split."
    ),
    "ensemble-job.yaml": _STAGE.format(
        name="ensemble", what="The fold models predict /data/eval; the submission is in /runs/first/ensemble/output."
    ),
    "evaluate-job.yaml": _STAGE.format(
        name="evaluate",
        what="Scores and the report: of test rows, if there is a gt.csv beside the test.csv of /data/eval. After ensemble.",
    ),
    "distill-job.yaml": _STAGE.format(name="distill", what="The fold models teach one student. After train-folds."),
    "pvc.yaml": "The claim that holds the data and the runs. Folds side by side on several machines need ReadWriteMany.\n"
    + _RENDERED,
    "loader-pod.yaml": "A pod to copy data into the claim through; it ends by itself after four hours.\n\n"
    "    kubectl apply -f k8s/loader-pod.yaml && kubectl wait --for=condition=ready pod/fivefold-loader\n"
    "    kubectl cp photos/train fivefold-loader:/data/train && kubectl cp photos/test fivefold-loader:/data/eval\n"
    "    kubectl delete pod fivefold-loader\n\n" + _RENDERED,
    "base/run.yaml": "The whole graph, the student's prediction and scores too: what kustomizations are made of.\n"
    + _RENDERED,
    "overlays/s3/kustomization.yaml": "Data and runs at s3://, below STORE (which is yours to set), and no claim.\n\n"
    "    kubectl apply -k k8s/overlays/s3 -l app.kubernetes.io/component=split\n\n"
    "The keys come from the Secret fivefold-s3, if there is one, or from the role of the pods' service account.\n"
    "Another store than AWS: AWS_ENDPOINT_URL_S3 beside AWS_REGION. " + _RENDERED,
    "argo/workflow.yaml": "All stages in order by Argo Workflows, the student and its scores too.\n\n"
    "    kubectl apply -f k8s/argo/workflow.yaml\n\nFor another run change its name and the parameters below `arguments`.\n"
    + _RENDERED,
    "trainer/trainjob.yaml": "Fold 0 on two machines by Kubeflow Trainer (2.0 or later), after split. More: numNodes.\n\n"
    "    kubectl apply -f k8s/trainer/trainjob.yaml\n\n" + _RENDERED,
}
"""What stands at the head of each file."""


if __name__ == "__main__":
    write(Path(sys.argv[1]))
