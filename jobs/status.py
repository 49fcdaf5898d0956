"""`python -m jobs status [run=NAME] [runs=runs]`: show which steps of a run are done, running, failed, stopped or waiting."""

from collections.abc import Sequence
from pathlib import Path

from fivefold.config.loading import arguments_layer, normalize_key
from fivefold.errors import MissingInputError, SettingsError
from fivefold.launchers.plan import Plan
from fivefold.launchers.status import format_table, newest_run, read_plan, read_scores, read_status
from fivefold.lookup import did_you_mean

KEYS = {"run": "name of the run; default: the newest", "runs": "folder of all runs; default: runs"}


def main(arguments: Sequence[str]) -> int:
    """Print one line per step of the run; return 0 even if steps failed."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n\n" + "\n".join(f"  {key:6} {meaning}" for key, meaning in KEYS.items()))
        return 0
    plan = read_plan(run_folder(arguments))
    print(f"run {plan.run} in {plan.folder}\n\n{status_table(plan)}")
    return 0


def run_folder(arguments: Sequence[str]) -> Path:
    values = {normalize_key(name): value for name, value in arguments_layer(arguments).values.items()}
    for key in values:
        if key not in KEYS:
            raise SettingsError(f"unknown key {key!r}{did_you_mean(key, KEYS)}; known: {', '.join(KEYS)}")
    runs = Path(values.get("runs") or "runs")
    if not values.get("run"):
        return newest_run(runs)
    folder = runs / values["run"]
    if not folder.is_dir():
        names = sorted(path.name for path in runs.glob("*/")) if runs.is_dir() else []
        raise MissingInputError(f"no run {values['run']!r} in {runs}{did_you_mean(values['run'], names)}")
    return folder


def status_table(plan: Plan) -> str:
    rows = [("step", "state", "figures", "")]
    for step in plan.steps:
        status = read_status(step)
        word = f"{status.state} ({status.exit_code})" if status.exit_code else status.state
        figures = read_scores(plan, step) if status.state == "done" else None
        undone = ", ".join(name for name in step.needs if read_status(plan.step(name)).state != "done")
        rows.append((step.name, word, str(figures or ""), status.detail or (f"for {undone}" if undone else "")))
    return format_table(rows)
