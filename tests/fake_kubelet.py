"""Run a Job's pods on a Docker engine as a kubelet would: user, mounts, variables, termination message.

Unlike a kubelet, it does not schedule pods, assign GPUs or restart containers.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes_schemas import expand

INDEX = "batch.kubernetes.io/job-completion-index"
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class PodOutcome:
    """Outcome of a pod: exit code, log, and termination message."""

    code: int
    log: str
    message: str


@dataclass(frozen=True)
class Node:
    """A machine with one claim, which is a folder; `image` replaces the image that manifests name.

    `maps` holds ConfigMaps and Secrets by name. Without a `network` a container can reach only itself.
    """

    claim: Path
    image: str
    maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    network: str = "none"

    def run(self, job: Mapping[str, Any], index: int | None = None) -> PodOutcome:
        """Run a Job's pod to its end; `index` selects the pod of an Indexed Job."""
        spec = job["spec"]["template"]["spec"]
        assert (index is not None) == (job["spec"].get("completionMode") == "Indexed")
        container = spec["containers"][0]
        message_file = self.claim.parent / f"termination-log-{job['metadata']['name']}-{index}"
        message_file.write_text("")
        message_file.chmod(0o666)
        self._own_claim(spec["securityContext"]["fsGroup"])
        values = self.variables(container, index)
        command = [
            *("docker", "run", "--rm", "--network", self.network),
            *_security_options(spec, container),
            *self._mounts(spec, container),
            *("--volume", f"{message_file}:{container.get('terminationMessagePath', '/dev/termination-log')}"),
            *(text for name in values for text in ("--env", name)),
            *_command(container, self.image, values),
        ]
        environ = {**os.environ, **values}
        result = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        return PodOutcome(result.returncode, result.stdout + result.stderr, message_file.read_text("utf-8"))

    def variables(self, container: Mapping[str, Any], index: int | None) -> dict[str, str]:
        """Return the container's variables: those of its maps, its own (which may use earlier ones), and the index."""
        values: dict[str, str] = {}
        for source in container.get("envFrom", []):
            reference = source.get("configMapRef") or source["secretRef"]
            if reference["name"] not in self.maps and not reference.get("optional"):
                raise AssertionError(f"no {reference['name']}: the pod would not start")
            values |= self.maps.get(reference["name"], {})
        for entry in container.get("env", []):
            if "valueFrom" in entry:
                assert entry["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.annotations['{INDEX}']"
                values[entry["name"]] = str(index)
            else:
                values[entry["name"]] = expand(entry["value"], values)
        return values if index is None else {**values, "JOB_COMPLETION_INDEX": str(index)}

    def _own_claim(self, group: int) -> None:
        """Apply fsGroup as a kubelet does: the claim's files, and new ones, belong to the group."""
        for path in [self.claim, *self.claim.rglob("*")]:
            if path.stat().st_gid != group:
                os.chown(path, -1, group)
                path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))

    def _mounts(self, spec: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        options: list[str] = []
        for mount in container["volumeMounts"]:
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if "emptyDir" in volume:
                size = volume["emptyDir"].get("sizeLimit")
                options += ["--tmpfs", f"{path}:rw,exec,mode=1777{f',size={size[:-1].lower()}' if size else ''}"]
            else:
                assert volume["persistentVolumeClaim"]
                folder = self.claim / mount["subPath"]
                if not folder.is_dir():
                    folder.mkdir()
                    os.chown(folder, -1, spec["securityContext"]["fsGroup"])
                    folder.chmod(0o2775)
                options += ["--volume", f"{folder}:{path}:{'ro' if mount.get('readOnly') else 'rw'}"]
        return options


def _security_options(spec: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
    pod, context = spec["securityContext"], container["securityContext"]
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, "the engine's default profile replaces it"
    return [
        *("--user", f"{pod['runAsUser']}:{pod['runAsGroup']}", "--group-add", str(pod["fsGroup"])),
        *(text for name in context["capabilities"]["drop"] for text in ("--cap-drop", name)),
        *(["--read-only"] if context["readOnlyRootFilesystem"] else []),
        *([] if context["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]),
        *("--stop-timeout", str(spec["terminationGracePeriodSeconds"])),
    ]


def _command(container: Mapping[str, Any], image: str, values: Mapping[str, str]) -> list[str]:
    entrypoint, *first = container.get("command", [None])
    arguments = [expand(text, values) for text in (*first, *container.get("args", []))]
    return [*(["--entrypoint", entrypoint] if entrypoint else []), image, *arguments]
