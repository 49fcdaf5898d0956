"""The user's own kubectl, as a process, and what the cluster says by it of Jobs and pods: phases, exit codes, last words."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers.manifests import CONTAINER, KILLED, PERMANENT, Object

SECONDS_FOR_AN_ANSWER = 120
AWAY = re.compile(
    r"unable to connect|connection to the server .* was refused|connection (refused|reset|lost|force closed)"
    r"|closed network connection|time(d )?out|deadline exceeded|no route to host|network is unreachable|no such host"
    r"|name resolution|\beof\b|broken pipe|goaway|etcdserver|too ?many ?requests|unavailable|unable to handle"
    r"|internal[ _]?error|object (is being deleted|has been modified)|exceeded quota",
    re.IGNORECASE,
)
"""What kubectl says where the cluster, and not the request, is at fault: another try may succeed."""
REFUSED = re.compile(
    r"x509|denied the request|\((Forbidden|Invalid|NotFound|BadRequest)\)(?!.*exceeded quota)| is invalid:|localhost:8080",
    re.IGNORECASE,
)
"""What it says of the request, whatever follows; localhost:8080 is where it looks for a cluster that nobody has named."""
OF_ITS_LOG = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d")
"""How the lines of kubectl's own log begin, each of which says at more length what its last line says."""
AS_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""The annotation in which kubectl keeps an object as it was applied, in JSON."""
LIMITS_SET = "kubernetes.io/limit-ranger"
"""The annotation of a pod that says which of its limits a LimitRange has set."""
INDEX_OF_POD = "batch.kubernetes.io/job-completion-index"
OWNER = "batch.kubernetes.io/controller-uid"
OURS = 1
"""The exit code of an error of ours, which another try would meet again."""


def where(namespace: str, context: str) -> list[str]:
    """The options of kubectl that name a namespace of a cluster; empty names leave them to its own configuration."""
    return [*(["--context", context] if context else []), *(["--namespace", namespace] if namespace else [])]


class Kubectl:
    """kubectl of PATH, in one namespace of one cluster. Raises SettingsError where there is none."""

    def __init__(self, namespace: str = "", context: str = "", environ: Mapping[str, str] = os.environ) -> None:
        program = shutil.which("kubectl", path=environ.get("PATH"))
        if program is None:
            raise SettingsError(
                "platform=kubernetes needs kubectl, and there is none in PATH: install it, or apply what --dry-run prints"
            )
        self.where = where(namespace, context)
        self._program = program

    def command(self, *arguments: str) -> list[str]:
        return [self._program, *self.where, *arguments]

    def ask(self, *arguments: str, stdin: str = "") -> str:
        """What kubectl prints; a RetryableError where the cluster is away, a SettingsError for what it refuses."""
        try:
            # a session of its own: Ctrl-C of the terminal stops no request half-way
            ended = subprocess.run(
                self.command(*arguments),
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS_FOR_AN_ANSWER,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise RetryableError(f"kubectl {arguments[0]} gave no answer in {SECONDS_FOR_AN_ANSWER} s") from error
        if not ended.returncode:
            return ended.stdout
        lines = ended.stderr.splitlines()
        words = " ".join(" ".join([line for line in lines if not OF_ITS_LOG.match(line)] or lines).split())
        if AWAY.search(words) and not REFUSED.search(words):
            raise RetryableError(f"the cluster cannot do it now, the same command may succeed later: {words}")
        raise SettingsError(f"kubectl {arguments[0]} was refused: {words or 'it said nothing'}")

    def items(self, kinds: str, selector: str) -> list[Object]:
        """The objects of these kinds (`jobs,pods`) that have these labels."""
        return json.loads(self.ask("get", kinds, "--selector", selector, "--output", "json"))["items"]

    def has(self, kind: str, name: str) -> bool:
        return bool(self.ask("get", kind, name, "--ignore-not-found", "--output", "name").strip())

    def why_no_pod(self, uid: str) -> str:
        """What the last event says of why the Job of this uid could not make a pod; empty where there is none."""
        of_job = f"involvedObject.uid={uid},reason=FailedCreate"
        try:
            events = json.loads(self.ask("get", "events", "--field-selector", of_job, "--output", "json"))["items"]
        except SettingsError as error:
            return f"it has no pod yet, and why is not known: {error}"
        last = max(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", default={})
        return ": ".join(text for text in (last.get("reason"), last.get("message")) if text)

    def apply(self, one: Mapping[str, Any]) -> None:
        self.ask("apply", "--filename", "-", stdin=json.dumps(one))

    def replace(self, one: Mapping[str, Any]) -> None:
        """Deletes what has this name, which cannot be changed any more, and makes it anew, as `apply` does."""
        self.ask("replace", "--force", "--save-config", "--filename", "-", stdin=json.dumps(one))


@dataclass(frozen=True)
class Ending:
    """How one pod ended in vain: its exit code (None where its container never ended), and what was said last.

    `drained`: the cluster took its place away, and makes a new one that costs no try.
    """

    pod: str
    index: int | None
    code: int | None
    words: str
    drained: bool = False

    def __str__(self) -> str:
        how = "lost" if self.code is None else f"exit code {self.code}"
        return f"{how}: {self.words}" if self.words else how

    @property
    def verb(self) -> str:
        if self.drained:
            return "stopped, a new pod goes on"
        return "stopped" if self.code in (130, 143) else "failed"


def condition(one: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The condition of an object that is true now, None where it is not."""
    found = one.get("status", {}).get("conditions") or []
    return next((each for each in found if each["type"] == kind and each["status"] == "True"), None)


def pods_of_job(pods: Iterable[Mapping[str, Any]], job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pods of this Job, oldest first, and of none that had its name before."""
    own = [pod for pod in pods if pod["metadata"].get("labels", {}).get(OWNER) == job["metadata"]["uid"]]
    return sorted(own, key=lambda pod: pod["metadata"].get("creationTimestamp", ""))


def index_of(pod: Mapping[str, Any]) -> int | None:
    """A pod's index in an Indexed Job, None in another."""
    index = pod["metadata"].get("annotations", {}).get(INDEX_OF_POD)
    return None if index is None else int(index)


def has_started(pod: Mapping[str, Any]) -> bool:
    """Whether the container runs, or has run: whether there is a log."""
    return not {"running", "terminated"}.isdisjoint(_state(pod))


def is_over(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def lacks_pods(job: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a Job that is not suspended has fewer live ones among `pods`, which are its own, than it wants."""
    spec = job["spec"]
    left = (spec.get("completions") or 1) - (job.get("status", {}).get("succeeded") or 0)
    live = sum(not is_over(pod) for pod in pods)
    return not spec.get("suspend") and live < min(spec.get("parallelism") or 1, left)


def without_names(text: str) -> str:
    """An event's text without what is otherwise each time: names in quotes, and numbers."""
    return re.sub(r'"[^"]*"|\d\w*', "", text)


def ending(pod: Mapping[str, Any]) -> Ending | None:
    """How a pod failed; None where it runs, or ended well."""
    status = pod.get("status", {})
    if status.get("phase") != "Failed":
        return None
    ended = _state(pod).get("terminated", {})
    drained = condition(pod, "DisruptionTarget")
    lost = status.get("message") or status.get("reason") or (drained or {}).get("message") or ""
    words = last_words(ended.get("message") or "") or lost.strip() or ended.get("reason") or ""
    code = ended.get("exitCode")
    if ended.get("reason") == "OOMKilled":
        code, words = KILLED, out_of_memory(pod)
    return Ending(pod["metadata"]["name"], index_of(pod), code, words, drained is not None)


def last_words(message: str) -> str:
    """The line that says most: the first of a stage's own message, which stands above a traceback; else the last of a log.

    A log's end begins in the middle of a line.
    """
    first, _, rest = message.strip().partition("\n\n")
    lines = first.splitlines() if rest.startswith("Traceback") else message.strip().splitlines()[::-1]
    return lines[0].strip() if lines else ""


def out_of_memory(pod: Mapping[str, Any]) -> str:
    """What to do about a container that was killed at its limit of memory, and who has set that."""
    limit = container_of(pod).get("resources", {}).get("limits", {}).get("memory")
    at = f" at its limit of {limit}" if limit else ""
    if limit and "memory limit" in pod["metadata"].get("annotations", {}).get(LIMITS_SET, ""):
        at += " (a LimitRange of the namespace sets it where none is given: kubectl describe limitrange)"
    return f"out of memory{at}: give more by kubernetes.memory or kubernetes.limits, or lower train.batch_size or train.workers"


def waits_for(pod: Mapping[str, Any]) -> str:
    """Why a pod does not start, as the cluster says it; empty where it has started or says nothing."""
    if pod.get("status", {}).get("phase") != "Pending":
        return ""
    conditions = pod["status"].get("conditions") or []
    unplaced = [each for each in conditions if each["type"] == "PodScheduled" and each["status"] == "False"]
    reason = unplaced[0] if unplaced else _state(pod).get("waiting", {})
    if reason.get("reason") in ("ContainerCreating", "PodInitializing"):
        return ""
    return ": ".join(text for text in (reason.get("reason"), reason.get("message")) if text)


def last_endings(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> list[Ending]:
    """The last ending of each index that the Job has given up, or of the Job's last pod."""
    endings = [each for pod in pods if (each := ending(pod)) and not each.drained]
    last = {each.index: each for each in endings}
    # of the status `1,3-5` are 1, 3, 4 and 5
    spans = [text.split("-") for text in (job["status"].get("failedIndexes") or "").split(",") if text]
    given_up = [index for span in spans for index in range(int(span[0]), int(span[-1]) + 1)]
    return [last[index] for index in given_up if index in last] if given_up else list(last.values())[-1:]


def exit_code(endings: Sequence[Ending]) -> int:
    """A code that comes again, if a pod ended with one; 1 for an unexpected error; else 75: try again."""
    codes = [each.code for each in endings]
    return next((code for code in codes if code in (*PERMANENT, OURS)), RetryableError.exit_code)


def _state(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return next((each.get("state", {}) for each in statuses if each["name"] == CONTAINER), {})


def container_of(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our container among those that a pod, or a pod's template, names."""
    containers = pod.get("spec", {}).get("containers", [])
    return next((each for each in containers if each["name"] == CONTAINER), {})
