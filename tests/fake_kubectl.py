"""A stand-in for kubectl and its cluster: it stores objects in a folder, and pods follow the script in that folder.

`script.json` holds a list of attempts for each Job and index: {"fivefold-r-train-folds": {"1": [{"code": 75}, {"code": 0}]}}.
An attempt has `code` (null: its container never started), `message` (the termination message), `reason`, `log`, `waits` (why it
stays pending), `creating` (for how many steps of time its container is created), `forever` (it runs until a file `go` exists),
`drained` (it is evicted), `cut` (its log stream breaks after each line) and `limit_range` (the memory limit that replaces its own).
Indexes without a script succeed at the first attempt.

`no-pods.json`: from which index on a Job cannot create pods, and why: {"fivefold-r-split": [0, "pods \\"POD\\" is forbidden: …"]}.
`outage.json`: the first and the last call, counted from 1, that fail with this message: [2, 4, "The connection to …"].
`role.json`: the rules of the user's role. `delete-jobs`: all Jobs are deleted. Each query for pods is one step of time.
Its messages are those of kubectl 1.33, for the calls that the driver makes.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

PERMANENT_RULE = 1
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
GROUPS = {"jobs": "batch"}
NORMALIZED_QUANTITIES = {"1024Mi": "1Gi", "0.5": "500m"}
"""Quantities as the cluster returns them."""


class RefusedError(Exception):
    """A message that kubectl prints on stderr before it exits with 1."""


def main(arguments: list[str]) -> int:
    folder = Path(os.environ["CLUSTER"])
    with (folder / "calls.txt").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    while arguments[:1] in (["--namespace"], ["--context"]):
        arguments = arguments[2:]
    try:
        simulate_outage(folder)
        VERBS[arguments[0]](folder, arguments[1:])
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def simulate_outage(folder: Path) -> None:
    file = folder / "outage.json"
    first, last, message = json.loads(file.read_text()) if file.exists() else (0, 0, "")
    if first <= len((folder / "calls.txt").read_text().splitlines()) <= last:
        raise RefusedError(message)


def require_permission(folder: Path, resource: str, *verbs: str, action: str = "") -> None:
    """Raise RefusedError unless the user's role has these verbs; record each request in asked.txt."""
    rules = json.loads((folder / "role.json").read_text())
    for verb in verbs:
        with (folder / "asked.txt").open("a") as log:
            log.write(f"{verb} {resource}\n")
        if not any(resource in rule["resources"] and verb in rule["verbs"] for rule in rules):
            group = GROUPS.get(resource, "")
            raise RefusedError(
                f"Error from server (Forbidden): {action}{resource}{group and '.'}{group} is forbidden: "
                f'User "ann" cannot {verb} resource "{resource}" in API group "{group}" in the namespace "default"'
            )


def get(folder: Path, arguments: list[str]) -> None:
    kinds, *rest = arguments
    if (folder / "delete-jobs").exists():
        for path in (*folder.glob("job-*"), *folder.glob("pod-*")):
            path.unlink()
    if rest[1:] == ["--ignore-not-found", "--output", "name"]:
        require_permission(folder, f"{kinds}s", "get")
        if (folder / f"{kinds}-{rest[0]}.json").exists():
            print(f"{kinds}/{rest[0]}")
        return
    for kind in kinds.split(","):
        require_permission(folder, kind, "list")
    if "pods" in kinds:
        for path in folder.glob("job-*.json"):
            advance_job(folder, path)
    paths = [path for kind in kinds.split(",") for path in sorted(folder.glob(f"{kind.removesuffix('s')}-*.json"))]
    manifests = [json.loads(path.read_text()) for path in paths]
    items = [manifest for manifest in manifests if is_selected(manifest, rest[0], rest[1])]
    print(json.dumps({"apiVersion": "v1", "items": items, "kind": "List", "metadata": {"resourceVersion": ""}}))


def is_selected(manifest: dict, option: str, text: str) -> bool:
    pairs = [pair.split("=") for pair in text.split(",")]
    if option == "--selector":
        return all(manifest["metadata"]["labels"].get(key) == value for key, value in pairs)
    assert option == "--field-selector"
    fields = {"reason": manifest["reason"], "involvedObject.uid": manifest["involvedObject"]["uid"]}
    return all(fields[key] == value for key, value in pairs)


def apply(folder: Path, arguments: list[str]) -> None:
    text = sys.stdin.read()
    manifest = json.loads(text)
    resource = f"{manifest['kind'].lower()}s"
    require_permission(folder, resource, "get")
    path = path_of(folder, manifest)
    if not path.exists():
        require_permission(folder, resource, "create", action='error when creating "STDIN": ')
        create(folder, manifest, text)
        return
    require_permission(folder, resource, "patch")
    if json.loads(json.loads(path.read_text())["metadata"]["annotations"][LAST_APPLIED])["spec"] != manifest["spec"]:
        name = manifest["metadata"]["name"]
        raise RefusedError(f'The Job "{name}" is invalid: spec.template: Invalid value: {{}}: field is immutable')


def replace(folder: Path, arguments: list[str]) -> None:
    assert "--force" in arguments
    text = sys.stdin.read()
    manifest = json.loads(text)
    require_permission(folder, f"{manifest['kind'].lower()}s", "get", "delete", "create")
    for pod in folder.glob(f"pod-{manifest['metadata']['name']}-*.json"):
        pod.unlink()
    create(folder, manifest, text if "--save-config" in arguments else "")


def create(folder: Path, manifest: dict, last_applied: str) -> None:
    manifest["metadata"]["uid"] = os.urandom(8).hex()
    manifest["status"] = {}
    if manifest["kind"] == "Job":
        for amounts in manifest["spec"]["template"]["spec"]["containers"][0]["resources"].values():
            amounts |= {name: NORMALIZED_QUANTITIES.get(amount, amount) for name, amount in amounts.items()}
    if last_applied:
        manifest["metadata"]["annotations"] = {LAST_APPLIED: last_applied}
    write(path_of(folder, manifest), manifest)


def advance_job(folder: Path, path: Path) -> None:
    """Advance a Job by one step of time: create and start pods, and end them as the script says."""
    job = json.loads(path.read_text())
    if job["status"].get("conditions"):
        return
    indexed = "completions" in job["spec"]
    count = job["spec"].get("completions", 1)
    file = folder / "no-pods.json"
    possible, message = (json.loads(file.read_text()) if file.exists() else {}).get(
        job["metadata"]["name"], (count, "")
    )
    if possible < count:
        write_event(folder, job, message)
    codes = [advance_index(folder, job, index, indexed) for index in range(possible)] + [None] * (count - possible)
    job["status"]["succeeded"] = codes.count(0)
    if None not in codes:
        reason = "FailedIndexes" if indexed else "BackoffLimitExceeded"
        condition = {"type": "Failed" if any(codes) else "Complete", "status": "True", "reason": reason}
        job["status"]["conditions"] = [condition]
    write(path, job)


def write_event(folder: Path, job: dict, message: str) -> None:
    """Write an event as the Job's controller does, for another pod each time."""
    metadata, number = job["metadata"], os.urandom(3).hex()
    event = {
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{number}"},
        "type": "Warning",
        "reason": "FailedCreate",
        "message": f"Error creating: {message.replace('POD', metadata['name'] + '-' + number[:5])}",
        "involvedObject": {"kind": "Job", "name": metadata["name"], "uid": metadata["uid"]},
        "lastTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write(path_of(folder, event), event)


def advance_index(folder: Path, job: dict, index: int, indexed: bool) -> int | None:
    """Return the exit code of an index's last attempt, None while it runs: until success, a permanent error or no attempts left."""
    name, spec = job["metadata"]["name"], job["spec"]
    permanent = spec["podFailurePolicy"]["rules"][PERMANENT_RULE]["onExitCodes"]["values"]
    script = json.loads((folder / "script.json").read_text()).get(name, {}).get(str(index), [{"code": 0}])
    retries = spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 0))
    for number in itertools.count():
        attempt = script[min(number, len(script) - 1)]
        path = folder / f"pod-{name}-{index}-{number}.json"
        pod = json.loads(path.read_text()) if path.exists() else make_pod(job, path.stem[4:], index, number, indexed)
        pod["age"] += "waits" not in attempt
        pod |= {"log": attempt.get("log", "works"), "cut": attempt.get("cut", False)}
        if limit := attempt.get("limit_range"):
            pod["spec"]["containers"][0]["resources"]["limits"]["memory"] = limit
            message = "LimitRanger plugin set: memory limit for container fivefold"
            pod["metadata"]["annotations"]["kubernetes.io/limit-ranger"] = message
        pod["status"], code = pod_status(attempt, pod["age"], (folder / "go").exists())
        write(path, pod)
        if code in (None, 0):
            return code
        if attempt.get("drained"):
            continue
        if code in permanent or retries == 0:
            return code
        retries -= 1
    raise AssertionError


def make_pod(job: dict, name: str, index: int, number: int, indexed: bool) -> dict:
    metadata = {
        "name": name,
        "labels": {
            **job["spec"]["template"]["metadata"]["labels"],
            "batch.kubernetes.io/controller-uid": job["metadata"]["uid"],
        },
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)} if indexed else {},
        "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
    }
    return {"kind": "Pod", "metadata": metadata, "spec": job["spec"]["template"]["spec"], "age": 0}


def pod_status(attempt: dict, age: int, go: bool) -> tuple[dict, int | None]:
    """Return a pod's status and its exit code if it has one (-1 if its container never started)."""
    if waits := attempt.get("waits"):
        unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": waits}
        return {"phase": "Pending", "conditions": [unscheduled]}, None
    if age <= attempt.get("creating", 0):
        waiting = {"name": "fivefold", "state": {"waiting": {"reason": "ContainerCreating"}}}
        return {"phase": "Pending", "containerStatuses": [waiting]}, None
    lines = len(attempt.get("log", "").splitlines()) if attempt.get("cut") else 0
    if age <= 1 + lines or (attempt.get("forever") and not go):
        return {"phase": "Running", "containerStatuses": [{"name": "fivefold", "state": {"running": {}}}]}, None
    code, message = attempt["code"], attempt.get("message", "")
    if code is None:
        return {"phase": "Failed", "reason": attempt.get("reason", "UnexpectedAdmissionError"), "message": message}, -1
    state = {"terminated": {"exitCode": code, "message": message, "reason": attempt.get("reason", "Error")}}
    status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"name": "fivefold", "state": state}]}
    if attempt.get("drained"):
        disruption = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        status["conditions"] = [{**disruption, "message": "Eviction API: evicting"}]
    return status, code


def logs(folder: Path, arguments: list[str]) -> None:
    """Print the log of a pod. A pod with `cut` has printed one line per step of time, and every second call fails."""
    require_permission(folder, "pods", "get")
    require_permission(folder, "pods/log", "get")
    pod = json.loads((folder / f"pod-{arguments[0]}.json").read_text())
    if pod["cut"] and pod["status"]["phase"] == "Running":
        print("\n".join(pod["log"].splitlines()[: pod["age"]]), flush=True)
        if pod["age"] % 2:
            raise RefusedError("error: http2: client connection lost")
    else:
        print(pod["log"], flush=True)


def path_of(folder: Path, manifest: dict) -> Path:
    return folder / f"{manifest['kind'].lower()}-{manifest['metadata']['name']}.json"


def write(path: Path, manifest: dict) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(manifest))
    temporary.replace(path)


VERBS = {"get": get, "apply": apply, "replace": replace, "logs": logs}
