"""The figures of a run, each with the rows that it speaks of, read from what its stages wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.contract.files import read_json
from fivefold.contract.stages import METRICS, REPORT
from fivefold.launchers.plan import Plan, Step
from fivefold.launchers.status import record_of

EVALUATION = {"ensemble": "evaluate", "distill": "evaluate-student", "ensemble-student": "evaluate-student"}
"""The step whose metrics.json scores what a step made."""
ROWS = {"oof": "out-of-fold", "test": "test", "holdout": "holdout"}


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
        return _figures(_unprefixed(record["metrics"], "oof_"), "oof")
    if step.stage == "split":
        return None
    scored = _metrics(plan, EVALUATION.get(step.name, step.name))
    test = _figures(scored.get("test"), "test") or _figures(scored.get("holdout"), "holdout")
    if test is not None or step.stage == "ensemble":
        return test
    return _figures(_unprefixed(record["metrics"], "holdout_"), "holdout") or _figures(scored.get("oof"), "oof")


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
    """The table of the run, and where its report lies."""
    report = report_path(plan)
    return results_table(plan) + (f"\n\nreport: {report}" if report else "")


def report_path(plan: Plan) -> Path | None:
    """The report of the run's folds and ensemble, where it is written."""
    paths = [step.folder / "output" / REPORT for step in plan.steps if step.name == "evaluate"]
    return next((path for path in paths if path.is_file()), None)


def in_columns(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows as lines with aligned columns; those in `numbers` to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]

    def cell(text: str, at: int) -> str:
        return text.rjust(widths[at]) if at in numbers else text.ljust(widths[at])

    return "\n".join("  ".join(cell(text, at) for at, text in enumerate(row)).rstrip() for row in rows)


def _metrics(plan: Plan, name: str) -> Mapping[str, Any]:
    """The `metrics.json` of a step, by rows; empty where the step has not ended well."""
    for step in plan.steps:
        path = step.folder / "output" / METRICS
        if step.name == name and record_of(step) is not None and path.is_file():
            return read_json(path)
    return {}


def _figures(found: Mapping[str, Any] | None, rows: str) -> Figures | None:
    if not found or "accuracy" not in found or "logloss" not in found:
        return None
    count = f", {found['n']}" if "n" in found else ""
    return Figures(found["accuracy"], found["logloss"], ROWS[rows] + count)


def _unprefixed(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
