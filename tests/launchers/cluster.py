#!/usr/bin/env python3
"""A stand-in for kubectl and the cluster behind it: it keeps objects in a folder, and pods live by the script there.

`script.json` holds for each Job a list of tries by index: {"fivefold-r-train-folds": {"1": [{"code": 75}, {"code": 0}]}}.
A try: `code`, `message` (its last words), `log`, `waits` (a reason to stay pending), `looks` (how many it runs for),
`forever` (until there is a file `go`; a file `delete-jobs` has the Jobs deleted). What is not named ends well at its first try. Each look at pods is a step of time. It speaks as much of
kubectl as the driver does, and answers all else with exit code 2.
"""

import json
import os
import sys
import time
from pathlib import Path

PERMANENT_RULE = 1


def main(arguments: list[str]) -> int:
    folder = Path(os.environ["CLUSTER"])
    with (folder / "calls.txt").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if is_away(folder):
        return refuse("Unable to connect to the server: dial tcp 10.0.0.1:6443: i/o timeout")
    if (folder / "forbidden").exists() and arguments[0] in ("apply", "replace"):
        return refuse('Error from server (Forbidden): jobs.batch is forbidden: User "me" cannot create resource "jobs"')
    while arguments[:1] in (["--namespace"], ["--context"]):
        arguments = arguments[2:]
    return VERBS[arguments[0]](folder, arguments[1:])


def is_away(folder: Path) -> bool:
    """Whether this call, counted from 1, is one of those that `outage.json` says are not answered."""
    file = folder / "outage.json"
    first, last = json.loads(file.read_text()) if file.exists() else (0, 0)
    return first <= len((folder / "calls.txt").read_text().splitlines()) <= last


def get(folder: Path, arguments: list[str]) -> int:
    kinds, *rest = arguments
    if (folder / "delete-jobs").exists():
        for path in (*folder.glob("job-*"), *folder.glob("pod-*")):
            path.unlink()
    if rest[1:] == ["--ignore-not-found", "--output", "name"]:
        if (folder / f"{kinds}-{rest[0]}.json").exists():
            print(f"{kinds}/{rest[0]}")
        return 0
    selector, value = rest[rest.index("--selector") + 1].split("=")
    if "pods" in kinds:
        for path in folder.glob("job-*.json"):
            live(folder, path)
    paths = [path for kind in kinds.split(",") for path in sorted(folder.glob(f"{kind.removesuffix('s')}-*.json"))]
    found = [json.loads(path.read_text()) for path in paths]
    items = [one for one in found if one["metadata"]["labels"].get(selector) == value]
    print(json.dumps({"kind": "List", "items": items}))
    return 0


def apply(folder: Path, arguments: list[str]) -> int:
    one = json.load(sys.stdin)
    path = path_of(folder, one)
    if path.exists():
        return refuse("The Job is invalid: spec.template: field is immutable")
    return create(folder, one)


def replace(folder: Path, arguments: list[str]) -> int:
    assert "--force" in arguments
    one = json.load(sys.stdin)
    for pod in folder.glob(f"pod-{one['metadata']['name']}-*.json"):
        pod.unlink()
    return create(folder, one)


def create(folder: Path, one: dict) -> int:
    one["metadata"]["uid"] = os.urandom(8).hex()
    one["status"] = {}
    write(path_of(folder, one), one)
    print(f"{one['metadata']['name']} created")
    return 0


def live(folder: Path, path: Path) -> None:
    """One step of time for a Job: pods are made, start, and end as the script says."""
    job = json.loads(path.read_text())
    if job["status"].get("conditions"):
        return
    indexed = job["spec"].get("completionMode") == "Indexed"
    count = job["spec"].get("completions", 1)
    states = [index_lives(folder, job, index, indexed) for index in range(count)]
    failed = [str(index) for index, state in enumerate(states) if state == "failed"]
    if all(state in ("done", "failed") for state in states):
        reason = "FailedIndexes" if indexed else "BackoffLimitExceeded"
        job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
        if failed:
            job["status"] = {"conditions": [{"type": "Failed", "status": "True", "reason": reason}]}
            if indexed:
                job["status"]["failedIndexes"] = ",".join(failed)
    write(path, job)


def index_lives(folder: Path, job: dict, index: int, indexed: bool) -> str:
    """`running`, `done` or `failed`: an index has tries until one ends well, comes again, or none is left."""
    name = job["metadata"]["name"]
    script = json.loads((folder / "script.json").read_text()).get(name, {}).get(str(index), [{"code": 0}])
    for number in range(1 + job["spec"].get("backoffLimitPerIndex", job["spec"].get("backoffLimit", 0))):
        acted = script[min(number, len(script) - 1)]
        path = folder / f"pod-{name}-{index}-{number}.json"
        pod = json.loads(path.read_text()) if path.exists() else born(job, index, number, indexed)
        code = pod_lives(pod, acted, (folder / "go").exists())
        write(path, pod)
        if code is None:
            return "running"
        if code == 0:
            return "done"
        if code in job["spec"]["podFailurePolicy"]["rules"][PERMANENT_RULE]["onExitCodes"]["values"]:
            return "failed"
    return "failed"


def born(job: dict, index: int, number: int, indexed: bool) -> dict:
    annotations = {"batch.kubernetes.io/job-completion-index": str(index)} if indexed else {}
    labels = {
        **job["spec"]["template"]["metadata"]["labels"],
        "batch.kubernetes.io/controller-uid": job["metadata"]["uid"],
    }
    return {
        "kind": "Pod",
        "metadata": {
            "name": f"{job['metadata']['name']}-{index}-{number}",
            "labels": labels,
            "annotations": annotations,
            "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
        },
        "age": 0,
        "status": {},
    }


def pod_lives(pod: dict, acted: dict, go: bool) -> int | None:
    """One step of time for a pod; its exit code once it has one (lost without one: 137)."""
    status, pod["age"] = pod["status"], pod["age"] + 1
    if status.get("phase") in ("Succeeded", "Failed"):
        return acted["code"] if acted["code"] is not None else 137
    status["phase"] = "Pending"
    if acted.get("waits"):
        status["conditions"] = [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": acted["waits"]}
        ]
        return None
    if pod["age"] > 1:
        status["phase"] = "Running"
        status["containerStatuses"] = [{"name": "fivefold", "state": {"running": {}}}]
        pod["log"] = acted.get("log", "works")
    if (acted.get("forever") and not go) or pod["age"] < 2 + acted.get("looks", 1):
        return None
    ended = {"exitCode": acted["code"], "message": acted.get("message", ""), "reason": acted.get("reason", "Error")}
    status["phase"] = "Failed" if acted["code"] != 0 else "Succeeded"
    status["containerStatuses"] = [{"name": "fivefold", "state": {"terminated": ended}}]
    if acted["code"] is None:
        status.update(containerStatuses=[], reason="Evicted", message=acted.get("message", ""))
        return 137
    return acted["code"]


def logs(folder: Path, arguments: list[str]) -> int:
    assert "--follow" in arguments
    path = folder / f"pod-{arguments[1]}.json"
    print(json.loads(path.read_text())["log"], flush=True)
    while path.exists() and json.loads(path.read_text())["status"]["phase"] == "Running":
        time.sleep(0.05)
    return 0


def refuse(words: str) -> int:
    print(words, file=sys.stderr)
    return 1


def path_of(folder: Path, one: dict) -> Path:
    return folder / f"{one['kind'].lower()}-{one['metadata']['name']}.json"


def write(path: Path, one: dict) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(one))
    temporary.replace(path)


VERBS = {"get": get, "apply": apply, "replace": replace, "logs": logs}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
