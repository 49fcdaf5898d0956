#!/usr/bin/env python3
"""A stand-in for kubectl and the cluster behind it: it keeps objects in a folder, and pods live by the script there.

`script.json` holds for each Job a list of tries by index: {"fivefold-r-train-folds": {"1": [{"code": 75}, {"code": 0}]}}.
A try: `code`, `message` (its last words), `log`, `waits` (a reason to stay pending), `forever` (it runs until there is a
file `go`). What is not named ends well at its first try. A file `delete-jobs` has the Jobs
deleted. Each look at pods is a step of time. It speaks as much of kubectl as the driver does.
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
    indexed = "completions" in job["spec"]
    codes = [index_lives(folder, job, index, indexed) for index in range(job["spec"].get("completions", 1))]
    if None not in codes:
        failed = [str(index) for index, code in enumerate(codes) if code]
        reason = "FailedIndexes" if indexed else "BackoffLimitExceeded"
        condition = {"type": "Failed" if failed else "Complete", "status": "True", "reason": reason}
        job["status"] = {"conditions": [condition], "failedIndexes": ",".join(failed) if indexed else ""}
    write(path, job)


def index_lives(folder: Path, job: dict, index: int, indexed: bool) -> int | None:
    """The exit code of an index's last try, None while it runs: until one ends well, comes again, or none is left."""
    name, spec = job["metadata"]["name"], job["spec"]
    permanent = spec["podFailurePolicy"]["rules"][PERMANENT_RULE]["onExitCodes"]["values"]
    script = json.loads((folder / "script.json").read_text()).get(name, {}).get(str(index), [{"code": 0}])
    code = None
    for number in range(1 + spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 0))):
        acted = script[min(number, len(script) - 1)]
        path = folder / f"pod-{name}-{index}-{number}.json"
        pod = json.loads(path.read_text()) if path.exists() else born(job, path.stem[4:], index, number, indexed)
        pod["age"] += 1
        pod["log"] = acted.get("log", "works")
        pod["status"], code = status_of(acted, pod["age"], (folder / "go").exists())
        write(path, pod)
        if code in (None, 0, *permanent):
            break
    return code


def born(job: dict, name: str, index: int, number: int, indexed: bool) -> dict:
    metadata = {
        "name": name,
        "labels": {
            **job["spec"]["template"]["metadata"]["labels"],
            "batch.kubernetes.io/controller-uid": job["metadata"]["uid"],
        },
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)} if indexed else {},
        "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
    }
    return {"kind": "Pod", "metadata": metadata, "age": 0}


def status_of(acted: dict, age: int, go: bool) -> tuple[dict, int | None]:
    """A pod's status, and its exit code once it has one (lost without one: 137)."""
    if waits := acted.get("waits"):
        unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": waits}
        return {"phase": "Pending", "conditions": [unplaced]}, None
    if age == 1:
        return {"phase": "Pending"}, None
    if age == 2 or (acted.get("forever") and not go):
        return {"phase": "Running", "containerStatuses": [{"name": "fivefold", "state": {"running": {}}}]}, None
    code, message = acted["code"], acted.get("message", "")
    if code is None:
        return {"phase": "Failed", "reason": "Evicted", "message": message}, 137
    state = {"terminated": {"exitCode": code, "message": message, "reason": acted.get("reason", "Error")}}
    phase = "Failed" if code else "Succeeded"
    return {"phase": phase, "containerStatuses": [{"name": "fivefold", "state": state}]}, code


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
