"""What of a run is done, running, failed, stopped or waiting, read from the files that it leaves.

A step's folder holds `state.json` (process, start, end, exit code: written by the launcher),
`stage.json` (written last by the stage itself), `failure` and `log.txt`.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fivefold.contract.files import read_json, write_json
from fivefold.contract.stages import FAILURE, RECORD, STAGES, TRAIN_LOG
from fivefold.errors import DataError, MissingInputError
from fivefold.launchers.plan import PLAN, Plan, Step

STATE = "state.json"
LOG = "log.txt"
BY_SIGNAL = {130: "SIGINT", 137: "SIGKILL, as the system does where memory runs out", 143: "SIGTERM"}
SECONDS_OF_DOUBT = 5.0
"""A process older than its step by less than this is the step's: clocks are read a moment apart."""


@dataclass(frozen=True)
class Status:
    """`word` is done, running, failed, stopped or waiting; `detail` says more in a line."""

    word: str
    detail: str = ""
    exit_code: int | None = None


def write_plan(plan: Plan) -> None:
    steps = [step.as_json() for step in plan.steps]
    write_json(plan.folder / PLAN, {"run": plan.run, "folder": str(plan.folder), "notes": plan.notes, "steps": steps})


def read_plan(folder: Path) -> Plan:
    """The plan of the run in `folder`, wherever the run was started from."""
    path = folder / PLAN
    if not path.is_file():
        raise MissingInputError(f"{folder} holds no run: {path} is not there")
    tree = read_json(path)
    try:
        steps = [
            Step(
                **{
                    **step,
                    "folder": folder / step["name"],
                    "arguments": tuple(step["arguments"]),
                    "needs": tuple(step["needs"]),
                }
            )
            for step in tree["steps"]
        ]
        return Plan(tree["run"], folder, tuple(steps), tuple(tree["notes"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a plan: {error}") from error


def newest_run(runs: Path) -> Path:
    """The folder below `runs` whose plan was written last."""
    plans = sorted(runs.glob(f"*/{PLAN}"), key=lambda path: path.stat().st_mtime)
    if not plans:
        raise MissingInputError(f"no run below {runs}; start one with python -m jobs submit, or give runs=FOLDER")
    return plans[-1].parent


def write_started(step: Step, pid: int) -> None:
    write_json(step.folder / STATE, {"pid": pid, "started": _now(), "ended": None, "exit_code": None})


def write_ended(step: Step, exit_code: int) -> None:
    state = read_json(step.folder / STATE)
    write_json(step.folder / STATE, {**state, "ended": _now(), "exit_code": exit_code})


def status_of(step: Step) -> Status:
    """Where a step stands; a process that died without a word is `stopped`."""
    state = _state(step)
    record = record_of(step)
    if state is not None and state["ended"] is None:
        if _alive(state):
            return Status("running", running_detail(step, state))
        if record is None:
            return Status("stopped", f"process {state['pid']} is gone without an exit code")
    if state is not None and state["exit_code"]:
        word = "stopped" if state["exit_code"] in BY_SIGNAL else "failed"
        return Status(word, failure_of(step), state["exit_code"])
    if record is not None:
        return Status("done", f"{record['wall_seconds']:.0f} s, finished {_local(record['finished'])}")
    return Status("waiting")


def record_of(step: Step) -> dict[str, Any] | None:
    """The step's `stage.json`, or None where it has not ended well."""
    path = step.folder / ("model" if STAGES[step.stage].writes_model else "output") / RECORD
    return read_json(path) if path.is_file() else None


def failure_of(step: Step) -> str:
    """The first line of the failure file, else the log's last line."""
    path = step.folder / FAILURE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
    return last_line(step)


def last_line(step: Step) -> str:
    path = step.folder / LOG
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def epochs_done(step: Step, since: float = 0.0) -> int:
    """How many epochs the step's training log holds, 0 if it was last written before `since` (seconds)."""
    path = step.folder / "model" / TRAIN_LOG
    if not path.is_file() or path.stat().st_mtime < since:
        return 0
    with open(path, encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


def running_detail(step: Step, state: Mapping[str, Any]) -> str:
    started = datetime.fromisoformat(state["started"]).timestamp()
    done = epochs_done(step, started - SECONDS_OF_DOUBT)
    return f"epoch {done} of {step.epochs}" if step.epochs and done else last_line(step)


def running_pid(step: Step) -> int | None:
    """The process that runs this step now, None if there is none."""
    state = _state(step)
    return state["pid"] if state is not None and state["ended"] is None and _alive(state) else None


def _state(step: Step) -> dict[str, Any] | None:
    path = step.folder / STATE
    return read_json(path) if path.is_file() else None


def _alive(state: Mapping[str, Any]) -> bool:
    """Whether the process lives, and is no later one that was given the same number."""
    import psutil

    started = datetime.fromisoformat(state["started"]).timestamp()
    try:
        process = psutil.Process(state["pid"])
        return process.create_time() <= started + SECONDS_OF_DOUBT and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _local(finished: str) -> str:
    return datetime.fromisoformat(finished).astimezone().strftime("%Y-%m-%d %H:%M:%S")
