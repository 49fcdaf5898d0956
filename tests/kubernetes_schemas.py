"""Checks that a cluster makes on manifests: API schemas by version, and the restricted pod security standard."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from kubernetes_validate import utils

OLDEST = "1.33.0"
"""The first version with every field of an Indexed Job that these manifests use."""
VERSIONS = [OLDEST, utils.all_versions()[-1]]
VOLUMES = {"emptyDir", "persistentVolumeClaim"}
"""The volume types that these pods use; the restricted standard allows them."""
utils.schema_contents = cache(utils.schema_contents)  # otherwise each check parses all definitions of its version


def parse(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


def read(path: Path) -> list[dict[str, Any]]:
    return parse(path.read_text("utf-8"))


def check(manifest: Mapping[str, Any], version: str) -> None:
    """Raise an error for fields that the API of this version does not know or does not accept."""
    kind = manifest["kind"]
    if kind == "Workflow":  # the models accept every field, but return only those that Argo knows
        from hera.workflows.models import Workflow

        assert Workflow.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_none=True) == manifest
    elif kind in ("TrainJob", "TrainingRuntime"):
        from kubeflow_trainer_api import models

        assert getattr(models, f"TrainerV1alpha1{kind}").from_dict(dict(manifest)).to_dict() == manifest
    else:
        utils.validate(manifest, version, strict=True)
    for spec in pod_specs(manifest) if "." in manifest["apiVersion"] else []:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": spec}
        utils.validate(pod, version, strict=True)


def pod_specs(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pod specs of an object; for Argo with the containers that its templates define."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Workflow":
        shared = {key: spec[key] for key in ("securityContext", "volumes")}
        return [
            {**shared, "containers": [{"name": "main", **template["container"]}], "restartPolicy": "Never"}
            for template in spec["templates"]
            if "container" in template
        ]
    if manifest["kind"] == "TrainingRuntime":
        return [job["template"]["spec"]["template"]["spec"] for job in spec["template"]["spec"]["replicatedJobs"]]
    if manifest["kind"] in ("Job", "Deployment"):
        return [spec["template"]["spec"]]
    return [spec] if manifest["kind"] == "Pod" else []


def against_restricted(spec: Mapping[str, Any]) -> Iterable[str]:
    """Yield each violation of the restricted standard, and of the stricter rules of this project."""
    pod = spec["securityContext"]
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC", "initContainers") if spec.get(key))
    yield from (f"volume {volume}" for volume in spec["volumes"] if not VOLUMES & volume.keys())
    if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser") or pod.get("sysctls"):
        yield "runAsNonRoot"
    if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "seccompProfile"
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    for container in spec["containers"]:
        if container.get("securityContext") != context or "hostPort" in str(container.get("ports")):
            yield f"securityContext or ports of {container['name']}"


def expand(text: str, known: Mapping[str, str]) -> str:
    """Expand text as Kubernetes does for a container: $(NAME) is the value of a known NAME, $$ is $, the rest stays."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda match: "$" if match[0] == "$$" else known.get(match[1], match[0]), text)


def against_the_server(manifest: Mapping[str, Any]) -> Iterable[str]:
    """Yield each reason for which an API server would reject an object with a valid schema: rules between fields."""
    longest = manifest["metadata"]["name"]
    if manifest["kind"] == "Job":
        spec = manifest["spec"]
        indexed = spec.get("completionMode") == "Indexed"
        longest += f"-{spec['completions'] - 1}" if indexed else ""
        rules = spec["podFailurePolicy"]["rules"]
        if ("backoffLimitPerIndex" in spec, "FailIndex" in str(rules)) != (indexed, indexed):
            yield "FailIndex, backoffLimitPerIndex and indexes are not together"
        names = {container["name"] for container in spec["template"]["spec"]["containers"]}
        if {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} - names:
            yield "a rule of no container"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", longest):
        yield f"{longest} is no name of a pod"
    for label in manifest["metadata"].get("labels", {}).values():
        if not re.fullmatch(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?", label):
            yield f"label {label}"
    for pod in pod_specs(manifest):
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        yield from (f"no volume {name}" for name in mounts - {volume["name"] for volume in pod["volumes"]})
