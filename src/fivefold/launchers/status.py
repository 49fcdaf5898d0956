"""What of a run is done, running, failed, stopped or waiting, and its figures, read from the files that it leaves.

A step's folder holds `state.json` (process, start, end, exit code: written by the launcher),
`stage.json` (written last by the stage itself), `failure` and `log.txt`; that of an evaluation `metrics.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fivefold.contract.files import read_json, write_json
from fivefold.contract.stages import FAILURE, METRICS, RECORD, REPORT, STAGES, TRAIN_LOG
from fivefold.errors import DataError, MissingInputError
from fivefold.launchers.plan import PLAN, Plan, Step

STATE = "state.json"
LOG = "log.txt"
BY_SIGNAL = {130: "SIGINT", 137: "SIGKILL, as the system does where memory runs out", 143: "SIGTERM"}
SECONDS_OF_DOUBT = 5.0
"""A process older than its step by less than this is the step's: clocks are read a moment apart."""
EVALUATION = {"ensemble": "evaluate", "distill": "evaluate-student", "ensemble-student": "evaluate-student"}
"""The step whose metrics.json scores what a step made."""
ROWS = {"oof": "out-of-fold", "test": "test", "holdout": "holdout"}


@dataclass(frozen=True)
class Status:
    """`word` is done, running, failed, stopped or waiting; `detail` says more in a line."""

    word: str
    detail: str = ""
    exit_code: int | None = None


def write_plan(plan: Plan) -> None:
    steps = [{**asdict(step), "folder": str(step.folder)} for step in plan.steps]
    write_json(plan.folder / PLAN, {"run": plan.run, "folder": str(plan.folder), "notes": plan.notes, "steps": steps})


def read_plan(folder: Path) -> Plan:
    """The plan of the run in `folder`, wherever the run was started from."""
    path = folder / PLAN
    if not path.is_file():
        raise MissingInputError(f"{folder} holds no run: {path} is not there")
    tree = read_json(path)
    try:
        for step in tree["steps"]:
            step |= {"folder": folder / step["name"], **{key: tuple(step[key]) for key in ("arguments", "needs")}}
        return Plan(tree["run"], folder, tuple(Step(**step) for step in tree["steps"]), tuple(tree["notes"]))
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
            done = epochs_done(step, datetime.fromisoformat(state["started"]).timestamp() - SECONDS_OF_DOUBT)
            return Status("running", f"epoch {done} of {step.epochs}" if step.epochs and done else last_line(step))
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
    return path.read_text("utf-8", "replace").rstrip().rpartition("\n")[2].strip()


def epochs_done(step: Step, since: float = 0.0) -> int:
    """How many epochs the step's training log holds, 0 if it was last written before `since` (seconds)."""
    path = step.folder / "model" / TRAIN_LOG
    if not path.is_file() or path.stat().st_mtime < since:
        return 0
    return len(path.read_text("utf-8").splitlines()[1:])


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


@dataclass(frozen=True)
class Figures:
    """Accuracy in 0..1 and logloss in nats, of `rows`."""

    accuracy: float
    logloss: float
    rows: str

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, logloss {self.logloss:.4f} ({self.rows})"


def figures_of(plan: Plan, step: Step) -> Figures | None:
    """What is known of the models that a step made or scored; None where nothing is."""
    record = record_of(step)
    if record is None:
        return None
    if step.stage == "train-fold":
        return _figures(record["metrics"], "oof", "oof_")
    if step.stage == "split":
        return None
    evaluation = plan.folder / EVALUATION.get(step.name, step.name) / "output"
    done = (evaluation / RECORD).is_file() and (evaluation / METRICS).is_file()
    scored = read_json(evaluation / METRICS) if done else {}
    test = _figures(scored.get("test"), "test") or _figures(scored.get("holdout"), "holdout")
    if test is not None or step.stage == "ensemble":
        return test
    return _figures(record["metrics"], "holdout", "holdout_") or _figures(scored.get("oof"), "oof")


def results_table(plan: Plan) -> str:
    """Every fold, the ensemble and the student: accuracy, logloss, the rows they speak of, seconds."""
    table = [("", "accuracy", "logloss", "rows", "seconds")]
    for step in plan.steps:
        name = {"distill": "student", "ensemble": "ensemble"}.get(step.name, step.name)
        record = record_of(step)
        if record is None or not (step.stage == "train-fold" or step.name in ("ensemble", "distill")):
            continue
        found = figures_of(plan, step)
        scores = (f"{found.accuracy:.4f}", f"{found.logloss:.4f}", found.rows) if found else ("-", "-", "not scored")
        table.append((name, *scores, f"{record['wall_seconds']:.1f}"))
    return in_columns(table, numbers=(1, 2, 4)) if len(table) > 1 else "no model is trained yet"


def results_of(plan: Plan) -> str:
    """The table of the run, and where the report of its folds and ensemble lies."""
    report = plan.folder / "evaluate" / "output" / REPORT
    return results_table(plan) + (f"\n\nreport: {report}" if report.is_file() else "")


def in_columns(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows as lines with aligned columns; those in `numbers` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{'>' if at in numbers else '<'}{width}" for at, width in enumerate(widths)]
    return "\n".join("  ".join(map(format, row, formats)).rstrip() for row in rows)


def _figures(metrics: Mapping[str, Any] | None, rows: str, prefix: str = "") -> Figures | None:
    """The figures among `metrics`, whose names begin with `prefix`; None where they are not there."""
    accuracy, logloss = ((metrics or {}).get(f"{prefix}{name}") for name in ("accuracy", "logloss"))
    if not metrics or accuracy is None or logloss is None:
        return None
    count = f", {metrics['n']}" if "n" in metrics else ""
    chose = ", which chose the epoch" if metrics.get("selected_on") == rows else ""
    return Figures(accuracy, logloss, ROWS[rows] + count + chose)
