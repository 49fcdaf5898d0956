"""Status and scores of a run's steps, from the files of the run.

A step's folder contains `state.json` (process, start, end, exit code; the launcher writes it),
`stage.json` (the stage writes it last), `failure` and `log.txt`; an evaluation's folder also `metrics.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fivefold.contract.files import read_json, write_json
from fivefold.contract.stage_specs import FAILURE, METRICS, RECORD, REPORT, STAGES, TRAIN_LOG
from fivefold.errors import DataError, MissingInputError
from fivefold.launchers.plan import PLAN, Plan, Step

STATE = "state.json"
LOG = "log.txt"
BY_SIGNAL = {130: "SIGINT", 137: "SIGKILL, as the system sends if memory runs out", 143: "SIGTERM"}
CLOCK_SLACK_S = 5.0
"""A process may be older than the start of its step by this much, because the two times are read one after another."""
EVALUATION = {"ensemble": "evaluate", "distill": "evaluate-student", "ensemble-student": "evaluate-student"}
"""The step whose metrics.json has the scores of a step's models."""
ROWS = {"oof": "out-of-fold", "test": "test", "holdout": "holdout"}


@dataclass(frozen=True)
class Status:
    """The status of a step: `state` is done, running, failed, stopped or waiting; `detail` is one line."""

    state: str
    detail: str = ""
    exit_code: int | None = None


def write_plan(plan: Plan) -> None:
    steps = [{**asdict(step), "folder": str(step.folder.relative_to(plan.folder))} for step in plan.steps]
    write_json(plan.folder / PLAN, {"run": plan.run, "folder": str(plan.folder), "notes": plan.notes, "steps": steps})


def read_plan(folder: Path) -> Plan:
    """Return the plan of the run in `folder`, also if the folder was moved."""
    path = folder / PLAN
    if not path.is_file():
        raise MissingInputError(f"{folder} contains no run: {path} does not exist")
    tree = read_json(path)
    try:
        for step in tree["steps"]:
            step |= {"folder": folder / step["folder"], **{key: tuple(step[key]) for key in ("arguments", "needs")}}
        return Plan(tree["run"], folder, tuple(Step(**step) for step in tree["steps"]), tuple(tree["notes"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a plan: {error}") from error


def newest_run(runs: Path) -> Path:
    """Return the folder below `runs` with the newest plan."""
    plans = sorted(runs.glob(f"*/{PLAN}"), key=lambda path: path.stat().st_mtime)
    if not plans:
        raise MissingInputError(f"no run below {runs}; start one with python -m jobs submit, or give runs=FOLDER")
    return plans[-1].parent


def record_start(step: Step, pid: int) -> None:
    write_json(step.folder / STATE, {"pid": pid, "started": _now(), "ended": None, "exit_code": None})


def record_end(step: Step, exit_code: int) -> None:
    state = read_json(step.folder / STATE)
    write_json(step.folder / STATE, {**state, "ended": _now(), "exit_code": exit_code})


def read_status(step: Step) -> Status:
    """Return the status of a step. It is `stopped` if its process ended without an exit code."""
    pid, state, record = running_pid(step), _state(step), read_step_record(step)
    if pid is not None:
        done = epochs_done(step, datetime.fromisoformat(state["started"]).timestamp() - CLOCK_SLACK_S)
        return Status("running", f"epoch {done} of {step.epochs}" if step.epochs and done else last_line(step))
    if state.get("exit_code"):
        word = "stopped" if state["exit_code"] in BY_SIGNAL else "failed"
        return Status(word, failure_message(step), state["exit_code"])
    if record is None and state and state["ended"] is None:
        return Status("stopped", f"process {state['pid']} ended without an exit code")
    if record is not None:
        finished = datetime.fromisoformat(record["finished"]).astimezone()
        return Status("done", f"{record['wall_seconds']:.0f} s, finished {finished:%Y-%m-%d %H:%M:%S}")
    return Status("waiting")


def read_step_record(step: Step) -> dict[str, Any] | None:
    """Return the step's `stage.json`, or None if the step has not succeeded."""
    path = step.folder / ("model" if STAGES[step.stage].writes_model else "output") / RECORD
    return read_json(path) if path.is_file() else None


def failure_message(step: Step) -> str:
    """Return the first line of the failure file, or the last line of the log."""
    path = step.folder / FAILURE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
    return last_line(step)


def describe_failure(step: Step) -> str:
    """Return the failure's message and the path of the step's log."""
    return f"{failure_message(step)}\n  log: {step.folder / LOG}"


def last_line(step: Step) -> str:
    path = step.folder / LOG
    return path.read_text("utf-8", "replace").strip().split("\n")[-1] if path.is_file() else ""


def epochs_done(step: Step, since: float = 0.0) -> int:
    """Return the number of epochs in the step's training log, 0 if it is older than `since` (seconds since 1970)."""
    path = step.folder / "model" / TRAIN_LOG
    if not path.is_file() or path.stat().st_mtime < since:
        return 0
    return len(path.read_text("utf-8").splitlines()[1:])


def running_pid(step: Step) -> int | None:
    """Return the id of the process that runs this step, or None. A later process may have the same id as one that ended."""
    import psutil

    state = _state(step)
    if not state or state["ended"] is not None:
        return None
    try:
        process = psutil.Process(state["pid"])
        same = process.create_time() <= datetime.fromisoformat(state["started"]).timestamp() + CLOCK_SLACK_S
        return process.pid if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _state(step: Step) -> dict[str, Any]:
    path = step.folder / STATE
    return read_json(path) if path.is_file() else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Scores:
    """Accuracy in 0..1 and logloss in nats on `rows`."""

    accuracy: float
    logloss: float
    rows: str

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, logloss {self.logloss:.4f} ({self.rows})"


def read_scores(plan: Plan, step: Step) -> Scores | None:
    """Return the scores of the models that a step trained or evaluated, or None if there are none."""
    record = read_step_record(step)
    if record is None:
        return None
    if step.stage == "train-fold":
        return _scores_in(record["metrics"], "oof", "oof_")
    if step.stage in ("split", "plan"):
        return None
    evaluation = plan.folder / EVALUATION.get(step.name, step.name) / "output"
    scored = read_json(evaluation / METRICS) if (evaluation / RECORD).is_file() else {}
    test = _scores_in(scored.get("test"), "test") or _scores_in(scored.get("holdout"), "holdout")
    if test is not None or step.stage == "ensemble":
        return test
    return _scores_in(record["metrics"], "holdout", "holdout_") or _scores_in(scored.get("oof"), "oof")


def read_results(plan: Plan) -> str:
    """Return a table of every fold, the ensemble and the student (accuracy, logloss, scored rows, seconds), and the report's path."""
    table = [("", "accuracy", "logloss", "rows", "seconds")]
    for step in plan.steps:
        record = read_step_record(step)
        if record is not None and (step.stage == "train-fold" or step.name in ("ensemble", "distill")):
            name = "student" if step.name == "distill" else step.name
            scores = read_scores(plan, step)
            figures = (
                (f"{scores.accuracy:.4f}", f"{scores.logloss:.4f}", scores.rows) if scores else ("-", "-", "not scored")
            )
            table.append((name, *figures, f"{record['wall_seconds']:.1f}"))
    report = plan.folder / "evaluate" / "output" / REPORT
    text = format_table(table, numbers=(1, 2, 4)) if len(table) > 1 else "no model is trained yet"
    return text + (f"\n\nreport: {report}" if report.is_file() else "")


def format_table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return rows as lines with aligned columns; align the columns in `numbers` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{'>' if index in numbers else '<'}{width}" for index, width in enumerate(widths)]
    return "\n".join("  ".join(map(format, row, formats)).rstrip() for row in rows)


def _scores_in(metrics: Mapping[str, Any] | None, rows: str, prefix: str = "") -> Scores | None:
    """Return the scores in `metrics`, whose names start with `prefix`, or None if they are missing."""
    metrics = metrics or {}
    accuracy, logloss = (metrics.get(f"{prefix}{name}") for name in ("accuracy", "logloss"))
    if accuracy is None or logloss is None:
        return None
    count = f", {metrics['n']}" if "n" in metrics else ""
    chose = ", which chose the epoch" if metrics.get("selected_on") == rows else ""
    return Scores(accuracy, logloss, ROWS[rows] + count + chose)
