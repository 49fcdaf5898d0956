"""What a cluster asks of manifests: the schemas of its versions, and the restricted pod security standard."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hera.workflows.models import Workflow
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob
from kubernetes_validate.utils import all_versions, validate

OLDEST = "1.33.0"
"""The first version that has all of an Indexed Job as these use it."""
VERSIONS = [OLDEST, all_versions()[-1]]
VOLUMES = {"emptyDir", "persistentVolumeClaim"}
"""The kinds of volumes that our pods have, of those that the restricted standard allows."""


def read(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def check(one: Mapping[str, Any], version: str) -> None:
    """Raises an error for what the API of this version does not know, or would not take."""
    {"Workflow": of_argo, "TrainJob": of_trainer, "TrainingRuntime": of_trainer}.get(one["kind"], of_kubernetes)(
        one, version
    )
    for spec in pod_specs(one) if "." in one["apiVersion"] else []:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": spec}
        of_kubernetes(pod, version)


def of_kubernetes(one: Mapping[str, Any], version: str) -> None:
    """Raises a ValidationError for a field that the schema of this kind does not have, or of another type."""
    validate(one, version, strict=True)


def of_argo(one: Mapping[str, Any], _: str) -> None:
    """The models know every field; what they do not give back, Argo would not know."""
    assert Workflow.model_validate(one).model_dump(mode="json", by_alias=True, exclude_none=True) == one


def of_trainer(one: Mapping[str, Any], _: str) -> None:
    models = {"TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}
    assert models[one["kind"]].from_dict(dict(one)).to_dict() == one


def pod_specs(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the pods of an object are made of; Argo's with the containers that its templates give them."""
    spec = one.get("spec", {})
    if one["kind"] == "Workflow":
        shared = {key: spec[key] for key in ("securityContext", "volumes")}
        return [
            {**shared, "containers": [{"name": "main", **template["container"]}], "restartPolicy": "Never"}
            for template in spec["templates"]
            if "container" in template
        ]
    if one["kind"] == "TrainingRuntime":
        return [each["template"]["spec"]["template"]["spec"] for each in spec["template"]["spec"]["replicatedJobs"]]
    if one["kind"] in ("Job", "Deployment"):
        return [spec["template"]["spec"]]
    return [spec] if one["kind"] == "Pod" else []


def against_restricted(spec: Mapping[str, Any]) -> Iterable[str]:
    """Each way in which a pod is not within the restricted standard, or not as we have all of ours."""
    whole = spec["securityContext"]
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC", "initContainers") if spec.get(key))
    yield from (f"volume {each}" for each in spec["volumes"] if not VOLUMES & each.keys())
    if whole.get("runAsNonRoot") is not True or not whole.get("runAsUser") or whole.get("sysctls"):
        yield "runAsNonRoot"
    if whole.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccompProfile"
    own = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    for container in spec["containers"]:
        if container.get("securityContext") != own or any("hostPort" in port for port in container.get("ports", [])):
            yield f"securityContext or ports of {container['name']}"


def expand(text: str, known: Mapping[str, str]) -> str:
    """Text as Kubernetes gives it to a container: $(NAME) is what is known by that name, $$ is $, all else stays."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda found: "$" if found[0] == "$$" else known.get(found[1], found[0]), text)


def against_the_server(one: Mapping[str, Any]) -> Iterable[str]:
    """Each way in which an API server would refuse an object that its schema takes: what fields ask of one another."""
    name, longest = one["metadata"]["name"], one["metadata"]["name"]
    if one["kind"] == "Job":
        spec = one["spec"]
        indexed = spec.get("completionMode") == "Indexed"
        longest = f"{name}-{spec['completions'] - 1}" if indexed else name
        rules = spec["podFailurePolicy"]["rules"]
        fails_index = any(rule["action"] == "FailIndex" for rule in rules)
        if ("backoffLimitPerIndex" in spec, fails_index) != (indexed, indexed):
            yield "FailIndex, backoffLimitPerIndex and indexes are not together"
        if spec["template"]["spec"]["restartPolicy"] != "Never" or spec["podReplacementPolicy"] != "Failed":
            yield "podFailurePolicy with restarts, or early replacement"
        owners = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
        if owners - {container["name"] for container in spec["template"]["spec"]["containers"]}:
            yield "a rule of no container"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", longest):
        yield f"{longest} is no name of a pod"
    for label in one["metadata"].get("labels", {}).values():
        if not re.fullmatch(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?", label):
            yield f"label {label}"
    for pod in pod_specs(one):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            yield from (
                f"no volume {each['name']}" for each in container["volumeMounts"] if each["name"] not in volumes
            )
