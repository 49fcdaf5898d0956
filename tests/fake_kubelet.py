"""A Job's pods on a Docker engine, as a kubelet would start them: user, mounts, variables, last words.

What a kubelet does and this does not: it places no pod, gives no GPU, and tries nothing again.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes_schemas import expand

INDEX = "batch.kubernetes.io/job-completion-index"
MEMORY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
SECONDS_AT_MOST = 900


@dataclass(frozen=True)
class Ended:
    """How a pod ended: its exit code, what it said, and its termination message."""

    code: int
    log: str
    words: str


@dataclass(frozen=True)
class Node:
    """A machine with one claim, which is a folder; `image` stands for the one that manifests name.

    `maps` are ConfigMaps and Secrets by name. Without a `network` a container reaches nothing but itself.
    """

    claim: Path
    image: str
    maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    network: str = "none"

    def run(self, job: Mapping[str, Any], index: int | None = None) -> Ended:
        """Runs the pod of a Job, of an Indexed Job the one with this index, to its end."""
        spec = job["spec"]["template"]["spec"]
        assert (index is not None) == (job["spec"].get("completionMode") == "Indexed")
        container = spec["containers"][0]
        words = self.claim.parent / f"termination-log-{job['metadata']['name']}-{index}"
        words.write_text("")
        words.chmod(0o666)
        self._own_claim(spec["securityContext"]["fsGroup"])
        known = self.variables(container, index)
        command = [
            *("docker", "run", "--rm", "--network", self.network),
            *_security(spec, container),
            *self._mounts(spec, container),
            *("--volume", f"{words}:{container.get('terminationMessagePath', '/dev/termination-log')}"),
            *(text for name in known for text in ("--env", name)),
            *_command(container, self.image, known),
        ]
        variables = {**os.environ, **known}
        ended = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=SECONDS_AT_MOST, check=False
        )
        return Ended(ended.returncode, ended.stdout + ended.stderr, words.read_text("utf-8"))

    def run_all(self, job: Mapping[str, Any]) -> list[Ended]:
        """Runs every index of a Job."""
        indexed = job["spec"].get("completionMode") == "Indexed"
        return [self.run(job, index) for index in range(job["spec"]["completions"])] if indexed else [self.run(job)]

    def variables(self, container: Mapping[str, Any], index: int | None) -> dict[str, str]:
        """The container's variables: those of its maps, then its own, each made of those before it, then the index."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            reference = source.get("configMapRef") or source["secretRef"]
            if reference["name"] not in self.maps and not reference.get("optional"):
                raise AssertionError(f"no {reference['name']}: the pod would not start")
            found |= self.maps.get(reference["name"], {})
        for entry in container.get("env", []):
            if "valueFrom" in entry:
                assert entry["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.annotations['{INDEX}']"
                found[entry["name"]] = str(index)
            else:
                found[entry["name"]] = expand(entry["value"], found)
        return found if index is None else {**found, "JOB_COMPLETION_INDEX": str(index)}

    def _own_claim(self, group: int) -> None:
        """What a kubelet does for fsGroup: the claim's files belong to the group, and so will new ones."""
        for path in [self.claim, *self.claim.rglob("*")]:
            if path.stat().st_gid != group:
                os.chown(path, -1, group)
                path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))

    def _mounts(self, spec: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        found: list[str] = []
        for mount in container["volumeMounts"]:
            volume, where = volumes[mount["name"]], mount["mountPath"]
            if "emptyDir" in volume:
                size = volume["emptyDir"].get("sizeLimit")
                found += ["--tmpfs", f"{where}:rw,exec,mode=1777{f',size={_bytes(size)}' if size else ''}"]
            else:
                assert volume["persistentVolumeClaim"]
                folder = self.claim / mount["subPath"]
                if not folder.is_dir():
                    folder.mkdir()
                    os.chown(folder, -1, spec["securityContext"]["fsGroup"])
                    folder.chmod(0o2775)
                found += ["--volume", f"{folder}:{where}:{'ro' if mount.get('readOnly') else 'rw'}"]
        return found


def _security(spec: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
    whole, own = spec["securityContext"], container["securityContext"]
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, "the engine's own profile stands for it"
    return [
        *("--user", f"{whole['runAsUser']}:{whole['runAsGroup']}", "--group-add", str(whole["fsGroup"])),
        *(text for name in own["capabilities"]["drop"] for text in ("--cap-drop", name)),
        *(["--read-only"] if own["readOnlyRootFilesystem"] else []),
        *([] if own["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]),
        *("--stop-timeout", str(spec["terminationGracePeriodSeconds"])),
    ]


def _command(container: Mapping[str, Any], image: str, known: Mapping[str, str]) -> list[str]:
    entrypoint, *first = container.get("command", [None])
    arguments = [expand(text, known) for text in (*first, *container.get("args", []))]
    return [*(["--entrypoint", entrypoint] if entrypoint else []), image, *arguments]


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]i)", text).groups()
    return int(number) * MEMORY[unit]
