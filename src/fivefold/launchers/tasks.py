"""A plan as the Jobs of a cluster: one a step, and one for the folds of a seed, whose pods are told their fold by index."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fivefold.contract.s3.urls import is_url, parse
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, Plan, Step

DATA, RUNS = "/data", "/runs"
"""Where every pod sees the data and the runs, two folders of one claim."""
MOST_CHARACTERS = 63


@dataclass(frozen=True)
class Task:
    """What one Job does: a step, or the folds of one seed, 0 to the last, as an Indexed Job; after the tasks it needs."""

    name: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...]
    indexed: bool = False

    @property
    def stage(self) -> str:
        return self.steps[0].stage


def tasks_of(plan: Plan) -> list[Task]:
    """The plan's Jobs in order. Folds that do not start at 0, or leave one out, are a Job each."""
    names = {step.name: _task_name(plan, step) for step in plan.steps}
    tasks = []
    for name in dict.fromkeys(names.values()):
        steps = tuple(step for step in plan.steps if names[step.name] == name)
        needs = dict.fromkeys(names[need] for step in steps for need in step.needs)
        tasks.append(Task(name, steps, tuple(needs), indexed=name != steps[0].name))
    return tasks


def job_name(run: str, task: str) -> str:
    """The name of a task's Job. In names of a cluster only small letters, digits and hyphens stand."""
    return re.sub(r"[._]", "-", f"fivefold-{run}-{task}").lower()


def check_names(plan: Plan) -> None:
    """Raises a SettingsError where the run's name cannot be a part of the names of its pods."""
    names = [(job_name(plan.run, task.name), task) for task in tasks_of(plan)]
    longest = max((f"{name}-{len(task.steps) - 1}" if task.indexed else name for name, task in names), key=len)
    if not plan.run[-1].isalnum():
        raise SettingsError(f"run={plan.run!r}: on Kubernetes a name ends in a letter or a digit")
    if len(longest) > MOST_CHARACTERS:
        most = len(plan.run) - len(longest) + MOST_CHARACTERS
        raise SettingsError(
            f"run={plan.run!r} is too long for Kubernetes: {longest} has {len(longest)} of {MOST_CHARACTERS} characters; "
            f"{most} are left for the run"
        )


def check_inputs(inputs: Inputs, run_folder: Path) -> Inputs:
    """The inputs as they are; a SettingsError for a path that no pod would see: it lies in /data of the claim, or at s3://."""
    for name, path in vars(inputs).items():
        if path and is_url(path):
            parse(path, name)
        elif path and (not PurePosixPath(path).is_relative_to(DATA) or ".." in PurePosixPath(path).parts):
            raise SettingsError(
                f"{name}={path}: pods see {DATA} of the claim, and s3://; copy it to the claim as docs/kubernetes.md "
                f"shows, and give {name}={DATA}/…"
            )
    return inputs


def check_runs(runs: str) -> None:
    """Raises a SettingsError for a place of runs that no pod could write to."""
    if is_url(runs):
        parse(runs, "kubernetes.runs")
    elif runs != RUNS:
        raise SettingsError(f"kubernetes.runs={runs}: runs lie in {RUNS} of the claim, or at s3://bucket/prefix")


def _task_name(plan: Plan, step: Step) -> str:
    """A step's own name, or of folds that are 0, 1, 2 and so on for their seed, `train-folds` or `train-folds-seed-43`."""
    if step.fold is None:
        return step.name
    folds = [other.fold for other in plan.steps if other.fold is not None and other.seed == step.seed]
    return name_with(step, "train-folds") if folds == list(range(len(folds))) else step.name


def name_with(step: Step, text: str) -> str:
    """The name of a step that trains a fold, with `text` for its `fold-2`, and the seed behind it as it is."""
    return step.name.replace(f"fold-{step.fold}", text, 1)
