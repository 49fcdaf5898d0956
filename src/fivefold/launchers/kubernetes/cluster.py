"""Run the user's kubectl, and read the state of Jobs and pods: phases, exit codes, last log lines."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers.kubernetes.manifests import CONTAINER, KILLED_EXIT_CODE, NON_RETRYABLE_CODES, Object

KUBECTL_TIMEOUT_S = 120
UNREACHABLE_PATTERN = re.compile(
    r"unable to connect|connection to the server .* was refused|connection (refused|reset|lost|force closed)"
    r"|closed network connection|time(d )?out|deadline exceeded|no route to host|network is unreachable|no such host"
    r"|name resolution|\beof\b|broken pipe|goaway|etcdserver|too ?many ?requests|unavailable|unable to handle"
    r"|internal[ _]?error|object (is being deleted|has been modified)|exceeded quota",
    re.IGNORECASE,
)
"""Messages of kubectl if the cluster, not the request, is at fault: another attempt may succeed."""
REJECTED_PATTERN = re.compile(
    r"x509|denied the request|\((Forbidden|Invalid|NotFound|BadRequest)\)(?!.*exceeded quota)| is invalid:|localhost:8080",
    re.IGNORECASE,
)
"""Messages of kubectl about an invalid request; these take precedence. localhost:8080 is its default without a configured cluster."""
LOG_LINE_PATTERN = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d")
"""Start of the lines in kubectl's own log. They repeat the message of the last line at greater length."""
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""The annotation with the object as it was applied, in JSON."""
LIMITS_SET = "kubernetes.io/limit-ranger"
"""The annotation of a pod that lists the limits that a LimitRange has set."""
POD_INDEX = "batch.kubernetes.io/job-completion-index"
OWNER = "batch.kubernetes.io/controller-uid"


def kubectl_options(namespace: str, context: str) -> list[str]:
    """Return the options of kubectl for a namespace and a context. Empty names use kubectl's configuration."""
    return [*(["--context", context] if context else []), *(["--namespace", namespace] if namespace else [])]


class Kubectl:
    """kubectl from PATH, for one namespace of one cluster. Raise a SettingsError if it is not installed."""

    def __init__(self, namespace: str = "", context: str = "", environ: Mapping[str, str] = os.environ) -> None:
        program = shutil.which("kubectl", path=environ.get("PATH"))
        if program is None:
            raise SettingsError(
                "platform=kubernetes needs kubectl, which is not in PATH: install it, or apply the output of --dry-run"
            )
        self.where = kubectl_options(namespace, context)
        self._program = program

    def run(self, *arguments: str, stdin: str = "") -> str:
        """Return the output of kubectl. Raise a RetryableError if the cluster is unavailable, a SettingsError if it rejects the request."""
        command = [self._program, *self.where, *arguments]
        # a new session: Ctrl-C in the terminal must not interrupt a request
        options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "start_new_session": True}
        try:
            result = subprocess.run(command, input=stdin, check=False, timeout=KUBECTL_TIMEOUT_S, **options)
        except subprocess.TimeoutExpired as error:
            raise RetryableError(f"kubectl {arguments[0]} did not respond within {KUBECTL_TIMEOUT_S} s") from error
        if not result.returncode:
            return result.stdout
        lines = result.stderr.splitlines()
        message = " ".join(" ".join([line for line in lines if not LOG_LINE_PATTERN.match(line)] or lines).split())
        if UNREACHABLE_PATTERN.search(message) and not REJECTED_PATTERN.search(message):
            raise RetryableError(f"the cluster is unavailable, the same command may succeed later: {message}")
        raise SettingsError(f"kubectl {arguments[0]} was refused: {message or 'without a message'}")

    def items(self, kinds: str, selector: str, option: str = "--selector") -> list[Object]:
        """Return the objects of these kinds (`jobs,pods`) with these labels, or with `--field-selector` these fields."""
        return json.loads(self.run("get", kinds, option, selector, "--output", "json"))["items"]

    def has(self, kind: str, name: str) -> bool:
        return bool(self.run("get", kind, name, "--ignore-not-found", "--output", "name").strip())

    def why_no_pod(self, uid: str) -> str:
        """Return why the Job with this uid could not create a pod, from its last event; an empty text without an event."""
        try:
            events = self.items("events", f"involvedObject.uid={uid},reason=FailedCreate", "--field-selector")
        except SettingsError as error:
            return f"it has no pod yet, for an unknown reason: {error}"
        last = max(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", default={})
        return join_reason(last)

    def apply(self, manifest: Mapping[str, Any]) -> None:
        self.run("apply", "--filename", "-", stdin=json.dumps(manifest))

    def replace(self, manifest: Mapping[str, Any]) -> None:
        """Delete the object of this name, which is immutable, and create it again as `apply` does."""
        self.run("replace", "--force", "--save-config", "--filename", "-", stdin=json.dumps(manifest))


@dataclass(frozen=True)
class PodExit:
    """How one pod failed: its exit code (None if its container never ended), and its last message.

    `drained`: the cluster evicted the pod, and creates a new one that does not count as a retry.
    """

    pod: str
    index: int | None
    code: int | None
    message: str
    drained: bool = False

    def __str__(self) -> str:
        how = "lost" if self.code is None else f"exit code {self.code}"
        return f"{how}: {self.message}" if self.message else how

    @property
    def verb(self) -> str:
        if self.drained:
            return "stopped, a new pod continues"
        return "stopped" if self.code in (130, 143) else "failed"


def condition(resource: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """Return the condition `kind` of an object if it is true, else None."""
    conditions = resource.get("status", {}).get("conditions") or []
    return next((item for item in conditions if item["type"] == kind and item["status"] == "True"), None)


def pods_of_job(pods: Iterable[Mapping[str, Any]], job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the pods of this Job, oldest first, without those of an earlier Job of the same name."""
    own_pods = [pod for pod in pods if pod["metadata"].get("labels", {}).get(OWNER) == job["metadata"]["uid"]]
    return sorted(own_pods, key=lambda pod: pod["metadata"].get("creationTimestamp", ""))


def read_pod_index(pod: Mapping[str, Any]) -> int | None:
    """Return a pod's index in an Indexed Job, or None in other Jobs."""
    index = pod["metadata"].get("annotations", {}).get(POD_INDEX)
    return None if index is None else int(index)


def has_started(pod: Mapping[str, Any]) -> bool:
    """Return whether the container runs or has run, i.e. whether there is a log."""
    return not {"running", "terminated"}.isdisjoint(_state(pod))


def has_ended(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def lacks_pods(job: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a Job that is not suspended has fewer live pods among its `pods` than it needs."""
    spec = job["spec"]
    remaining = (spec.get("completions") or 1) - (job.get("status", {}).get("succeeded") or 0)
    live = sum(not has_ended(pod) for pod in pods)
    return not spec.get("suspend") and live < min(spec.get("parallelism") or 1, remaining)


def normalize_event(text: str) -> str:
    """Return an event's text without its variable parts: names in quotes, and numbers."""
    return re.sub(r'"[^"]*"|\d\w*', "", text)


def pod_exit(pod: Mapping[str, Any]) -> PodExit | None:
    """Return how a pod failed, or None if it runs or succeeded."""
    status = pod.get("status", {})
    if status.get("phase") != "Failed":
        return None
    terminated = _state(pod).get("terminated", {})
    drained = condition(pod, "DisruptionTarget")
    lost = status.get("message") or status.get("reason") or (drained or {}).get("message") or ""
    message = extract_message(terminated.get("message") or "") or lost.strip() or terminated.get("reason") or ""
    code = terminated.get("exitCode")
    if terminated.get("reason") == "OOMKilled":
        code, message = KILLED_EXIT_CODE, out_of_memory(pod)
    return PodExit(pod["metadata"]["name"], read_pod_index(pod), code, message, drained is not None)


def extract_message(message: str) -> str:
    """Return the most informative line: the first line of a stage's message before a traceback, else the last line of a log.

    The end of a log may start in the middle of a line.
    """
    first, _, rest = message.strip().partition("\n\n")
    lines = first.splitlines() if rest.startswith("Traceback") else message.strip().splitlines()[::-1]
    return lines[0].strip() if lines else ""


def out_of_memory(pod: Mapping[str, Any]) -> str:
    """Return a message on a container that was killed at its memory limit: who set the limit, and the remedy."""
    limit = find_container(pod).get("resources", {}).get("limits", {}).get("memory")
    place = f" at its limit of {limit}" if limit else ""
    if limit and "memory limit" in pod["metadata"].get("annotations", {}).get(LIMITS_SET, ""):
        place += " (a LimitRange of the namespace sets it by default: kubectl describe limitrange)"
    return f"out of memory{place}: raise kubernetes.memory or kubernetes.limits, or lower train.batch_size or train.num_workers"


def pending_reason(pod: Mapping[str, Any]) -> str:
    """Return the cluster's reason why a pod does not start; an empty text if it has started or there is no reason."""
    if pod.get("status", {}).get("phase") != "Pending":
        return ""
    conditions = pod["status"].get("conditions") or []
    unplaced = [item for item in conditions if item["type"] == "PodScheduled" and item["status"] == "False"]
    reason = unplaced[0] if unplaced else _state(pod).get("waiting", {})
    if reason.get("reason") in ("ContainerCreating", "PodInitializing"):
        return ""
    return join_reason(reason)


def join_reason(item: Mapping[str, Any]) -> str:
    """Return the reason and the message of an event, a condition or a state."""
    return ": ".join(text for text in (item.get("reason"), item.get("message")) if text)


def final_exits(pods: Sequence[Mapping[str, Any]]) -> list[PodExit]:
    """Return how the last pod failed, or of an Indexed Job the last pod of each index without a pod that succeeded."""
    succeeded = {read_pod_index(pod) for pod in pods if pod["status"].get("phase") == "Succeeded"}
    exits = [item for pod in pods if (item := pod_exit(pod)) and not item.drained and item.index not in succeeded]
    return list({item.index: item for item in exits}.values())


def exit_code(exits: Sequence[PodExit]) -> int:
    """Return the exit code of a pod that another attempt would repeat (1: an internal error), else 75 (retry)."""
    codes = [item.code for item in exits]
    return next((code for code in codes if code in (*NON_RETRYABLE_CODES, 1)), RetryableError.exit_code)


def _state(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    return _own(pod.get("status", {}).get("containerStatuses")).get("state", {})


def _own(entries: Iterable[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """Return the entry of Fivefold's container, or an empty one."""
    return next((entry for entry in entries or () if entry["name"] == CONTAINER), {})


def find_container(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return Fivefold's container in a pod or a pod template."""
    return _own(pod.get("spec", {}).get("containers"))
