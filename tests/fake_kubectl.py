#!/usr/bin/env python3
"""A stand-in for kubectl and the cluster behind it: it keeps objects in a folder, and pods live by the script there.

`script.json` holds for each Job a list of tries by index: {"fivefold-r-train-folds": {"1": [{"code": 75}, {"code": 0}]}}.
A try: `code` (null: its container never started), `message` (its last words), `reason`, `log`, `waits` (a reason to stay
pending), `forever` (it runs until there is a file `go`), `drained` (its place is taken away), `cut` (its log is cut off
after each line), `limit_range` (the limit of memory that is set in its place). What is not named ends well at its first try.

`no-pods.json`: why a Job can make no pod from an index on: {"fivefold-r-split": [0, "pods \\"POD\\" is forbidden: …"]}.
`outage.json`: the first and the last call, counted from 1, that end with these words: [2, 4, "The connection to …"].
`role.json`: the rules of the user's role. `delete-jobs`: the Jobs are deleted. Each look at pods is a step of time.
It says what kubectl 1.33 says, as far as the driver asks it anything.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

PERMANENT_RULE = 1
AS_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
GROUPS = {"jobs": "batch"}
OWN_FORM = {"1024Mi": "1Gi", "0.5": "500m"}
"""Quantities as the cluster gives them back."""


class RefusedError(Exception):
    """What kubectl says on stderr where it ends with 1."""


def main(arguments: list[str]) -> int:
    folder = Path(os.environ["CLUSTER"])
    with (folder / "calls.txt").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    while arguments[:1] in (["--namespace"], ["--context"]):
        arguments = arguments[2:]
    try:
        be_away(folder)
        VERBS[arguments[0]](folder, arguments[1:])
    except RefusedError as words:
        print(words, file=sys.stderr)
        return 1
    return 0


def be_away(folder: Path) -> None:
    file = folder / "outage.json"
    first, last, words = json.loads(file.read_text()) if file.exists() else (0, 0, "")
    if first <= len((folder / "calls.txt").read_text().splitlines()) <= last:
        raise RefusedError(words)


def may(folder: Path, resource: str, *verbs: str, doing: str = "") -> None:
    """Raises RefusedError unless the user's role has these verbs; what is asked is noted."""
    rules = json.loads((folder / "role.json").read_text())
    for verb in verbs:
        with (folder / "asked.txt").open("a") as asked:
            asked.write(f"{verb} {resource}\n")
        if not any(resource in rule["resources"] and verb in rule["verbs"] for rule in rules):
            group = GROUPS.get(resource, "")
            raise RefusedError(
                f"Error from server (Forbidden): {doing}{resource}{group and '.'}{group} is forbidden: "
                f'User "ann" cannot {verb} resource "{resource}" in API group "{group}" in the namespace "default"'
            )


def get(folder: Path, arguments: list[str]) -> None:
    kinds, *rest = arguments
    if (folder / "delete-jobs").exists():
        for path in (*folder.glob("job-*"), *folder.glob("pod-*")):
            path.unlink()
    if rest[1:] == ["--ignore-not-found", "--output", "name"]:
        may(folder, f"{kinds}s", "get")
        if (folder / f"{kinds}-{rest[0]}.json").exists():
            print(f"{kinds}/{rest[0]}")
        return
    for kind in kinds.split(","):
        may(folder, kind, "list")
    if "pods" in kinds:
        for path in folder.glob("job-*.json"):
            live(folder, path)
    paths = [path for kind in kinds.split(",") for path in sorted(folder.glob(f"{kind.removesuffix('s')}-*.json"))]
    found = [json.loads(path.read_text()) for path in paths]
    items = [one for one in found if is_selected(one, rest[0], rest[1])]
    print(json.dumps({"apiVersion": "v1", "items": items, "kind": "List", "metadata": {"resourceVersion": ""}}))


def is_selected(one: dict, option: str, text: str) -> bool:
    pairs = [pair.split("=") for pair in text.split(",")]
    if option == "--selector":
        return all(one["metadata"]["labels"].get(key) == value for key, value in pairs)
    assert option == "--field-selector"
    found = {"reason": one["reason"], "involvedObject.uid": one["involvedObject"]["uid"]}
    return all(found[key] == value for key, value in pairs)


def apply(folder: Path, arguments: list[str]) -> None:
    text = sys.stdin.read()
    one = json.loads(text)
    resource = f"{one['kind'].lower()}s"
    may(folder, resource, "get")
    path = path_of(folder, one)
    if not path.exists():
        may(folder, resource, "create", doing='error when creating "STDIN": ')
        create(folder, one, text, "created")
        return
    may(folder, resource, "patch")
    if json.loads(json.loads(path.read_text())["metadata"]["annotations"][AS_APPLIED])["spec"] != one["spec"]:
        name = one["metadata"]["name"]
        raise RefusedError(f'The Job "{name}" is invalid: spec.template: Invalid value: {{}}: field is immutable')
    print(f"{resource_of(one)} unchanged")


def replace(folder: Path, arguments: list[str]) -> None:
    assert "--force" in arguments
    text = sys.stdin.read()
    one = json.loads(text)
    may(folder, f"{one['kind'].lower()}s", "get", "delete", "create")
    for pod in folder.glob(f"pod-{one['metadata']['name']}-*.json"):
        pod.unlink()
    print(f'{one["kind"].lower()}.batch "{one["metadata"]["name"]}" deleted')
    create(folder, one, text if "--save-config" in arguments else "", "replaced")


def create(folder: Path, one: dict, as_applied: str, verb: str) -> None:
    one["metadata"]["uid"] = os.urandom(8).hex()
    one["status"] = {}
    if one["kind"] == "Job":
        for amounts in one["spec"]["template"]["spec"]["containers"][0]["resources"].values():
            amounts |= {name: OWN_FORM.get(amount, amount) for name, amount in amounts.items()}
    if as_applied:
        one["metadata"]["annotations"] = {AS_APPLIED: as_applied}
    write(path_of(folder, one), one)
    print(f"{resource_of(one)} {verb}")


def live(folder: Path, path: Path) -> None:
    """One step of time for a Job: pods are made, start, and end as the script says."""
    job = json.loads(path.read_text())
    if job["status"].get("conditions"):
        return
    indexed = "completions" in job["spec"]
    count = job["spec"].get("completions", 1)
    file = folder / "no-pods.json"
    room, words = (json.loads(file.read_text()) if file.exists() else {}).get(job["metadata"]["name"], (count, ""))
    if room < count:
        write_event(folder, job, words)
    codes = [index_lives(folder, job, index, indexed) for index in range(room)] + [None] * (count - room)
    job["status"]["succeeded"] = codes.count(0)
    if None not in codes:
        failed = [str(index) for index, code in enumerate(codes) if code]
        reason = "FailedIndexes" if indexed else "BackoffLimitExceeded"
        condition = {"type": "Failed" if failed else "Complete", "status": "True", "reason": reason}
        job["status"] |= {"conditions": [condition], "failedIndexes": ",".join(failed) if indexed else ""}
    write(path, job)


def write_event(folder: Path, job: dict, words: str) -> None:
    """An event as the Job's controller writes them, of another pod each time."""
    metadata, number = job["metadata"], os.urandom(3).hex()
    event = {
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{number}"},
        "type": "Warning",
        "reason": "FailedCreate",
        "message": f"Error creating: {words.replace('POD', metadata['name'] + '-' + number[:5])}",
        "involvedObject": {"kind": "Job", "name": metadata["name"], "uid": metadata["uid"]},
        "lastTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write(path_of(folder, event), event)


def index_lives(folder: Path, job: dict, index: int, indexed: bool) -> int | None:
    """The exit code of an index's last try, None while it runs: until one ends well, comes again, or none is left."""
    name, spec = job["metadata"]["name"], job["spec"]
    permanent = spec["podFailurePolicy"]["rules"][PERMANENT_RULE]["onExitCodes"]["values"]
    script = json.loads((folder / "script.json").read_text()).get(name, {}).get(str(index), [{"code": 0}])
    tries = spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 0))
    for number in itertools.count():
        acted = script[min(number, len(script) - 1)]
        path = folder / f"pod-{name}-{index}-{number}.json"
        pod = json.loads(path.read_text()) if path.exists() else born(job, path.stem[4:], index, number, indexed)
        pod["age"] += "waits" not in acted
        pod |= {"log": acted.get("log", "works"), "cut": acted.get("cut", False)}
        if limit := acted.get("limit_range"):
            pod["spec"]["containers"][0]["resources"]["limits"]["memory"] = limit
            words = "LimitRanger plugin set: memory limit for container fivefold"
            pod["metadata"]["annotations"]["kubernetes.io/limit-ranger"] = words
        pod["status"], code = status_of(acted, pod["age"], (folder / "go").exists())
        write(path, pod)
        if code in (None, 0):
            return code
        if acted.get("drained"):
            continue
        if code in permanent or tries == 0:
            return code
        tries -= 1
    raise AssertionError


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
    return {"kind": "Pod", "metadata": metadata, "spec": job["spec"]["template"]["spec"], "age": 0}


def status_of(acted: dict, age: int, go: bool) -> tuple[dict, int | None]:
    """A pod's status, and its exit code once it has one (-1 where its container never started)."""
    if waits := acted.get("waits"):
        unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": waits}
        return {"phase": "Pending", "conditions": [unplaced]}, None
    if age <= 1:
        return {"phase": "Pending"}, None
    lines = len(acted.get("log", "").splitlines()) if acted.get("cut") else 0
    if age <= 2 + lines or (acted.get("forever") and not go):
        return {"phase": "Running", "containerStatuses": [{"name": "fivefold", "state": {"running": {}}}]}, None
    code, message = acted["code"], acted.get("message", "")
    if code is None:
        return {"phase": "Failed", "reason": acted.get("reason", "UnexpectedAdmissionError"), "message": message}, -1
    state = {"terminated": {"exitCode": code, "message": message, "reason": acted.get("reason", "Error")}}
    status = {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"name": "fivefold", "state": state}]}
    if acted.get("drained"):
        drained = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        status["conditions"] = [{**drained, "message": "Eviction API: evicting"}]
    return status, code


def logs(folder: Path, arguments: list[str]) -> None:
    may(folder, "pods", "get")
    may(folder, "pods/log", "get")
    assert "--follow" in arguments
    path = folder / f"pod-{arguments[1]}.json"
    pod = json.loads(path.read_text())
    if pod["cut"] and pod["status"]["phase"] == "Running":
        print("\n".join(pod["log"].splitlines()[: pod["age"] - 1]), flush=True)
        raise RefusedError("error: http2: client connection lost")
    print(pod["log"], flush=True)
    while path.exists() and json.loads(path.read_text())["status"]["phase"] == "Running":
        time.sleep(0.05)


def resource_of(one: dict) -> str:
    kind, group = one["kind"].lower(), GROUPS.get(f"{one['kind'].lower()}s", "")
    return f"{kind}{group and '.'}{group}/{one['metadata']['name']}"


def path_of(folder: Path, one: dict) -> Path:
    return folder / f"{one['kind'].lower()}-{one['metadata']['name']}.json"


def write(path: Path, one: dict) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(one))
    temporary.replace(path)


VERBS = {"get": get, "apply": apply, "replace": replace, "logs": logs}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
