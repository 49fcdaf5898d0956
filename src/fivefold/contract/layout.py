"""Where the stages of one run read and write: `<runs>/<run>/<step>/{model,output,checkpoints}`.

    split  fold-0 … fold-K  ensemble  evaluate  distill  ensemble-student  evaluate-student

Plans are made of it. A stage that is told its run (RUN=first) finds by it what no SM_* variable says.
"""

import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path

from fivefold.contract.job import given_channels, has_base
from fivefold.contract.s3.urls import is_url, parse
from fivefold.contract.spelling import truth_among
from fivefold.contract.stages import RECORD, STAGES, Stage
from fivefold.contract.storage import Remote
from fivefold.errors import MissingInputError, SettingsError

GROUND_TRUTH = "gt.csv"
EVAL_TABLE = "test.csv"
PREPARED = "prepare/output"
CACHES = ".cache"
"""Where runs that lie side by side share image caches: no run can be called so."""


def run_at(runs: str, run: str) -> str:
    """The folder or URL of a run among `runs`; a SettingsError for a name that would lead elsewhere."""
    if run in (".", "..") or "/" in run:
        raise SettingsError(f"run={run!r} names a folder in {runs}: a name alone, without '/'; another place is RUNS=")
    return f"{runs.rstrip('/')}/{run}"


def channels_of(stage: str, run: str) -> dict[str, str]:
    """The channels that a stage reads of the run at `run` (a folder, or a URL), by their names."""
    return {name: f"{run}/{place}" if place else run for name, place in CHANNELS[stage].items()}


def outputs_of(stage: str, step: str) -> dict[str, str]:
    """The SM_* variables of what a stage writes as the step at `step` (a folder, or a URL)."""
    found = {"SM_OUTPUT_DATA_DIR": f"{step}/output"}
    if STAGES[stage].writes_model:
        found |= {"SM_MODEL_DIR": f"{step}/model", "SM_CHECKPOINT_DIR": f"{step}/checkpoints"}
    return found if is_url(step) else {**found, "SM_OUTPUT_DIR": step}


def in_run(stage: Stage, environ: Mapping[str, str], run: str, fold: int | None) -> Mapping[str, str]:
    """`environ` with what it does not say of the stage's channels and folders, as the run at `run` has them.

    A channel that the stage can do without is taken where it is there. Other stages than the run's keep theirs, and
    so do all where the platform has folders of its own (`/opt/ml`): there a run is but a title.
    """
    if stage.name not in CHANNELS or has_base(environ):
        return environ
    found = outputs_of(stage.name, f"{run}/{_step_of(stage, fold)}")
    given = given_channels(environ)
    for name, place in channels_of(stage.name, run).items():
        if name not in given and (name in stage.channels or _is_there(place)):
            found[f"SM_CHANNEL_{name.upper()}"] = place
    prepared = f"{run}/{PREPARED}"
    if "cache" in stage.optional and "cache" not in given:
        # At a URL only what is finished is found at all.
        there = _is_there(prepared if is_url(run) else f"{prepared}/{RECORD}")
        found |= {"SM_CHANNEL_CACHE": prepared} if there else {}
    if stage.name == "evaluate" and "ground_truth" not in given and "eval" in given:
        found["SM_CHANNEL_GROUND_TRUTH"] = truth_of(str(given["eval"])) or ""
    return {**environ, **{name: value for name, value in found.items() if not environ.get(name)}}


def truth_of(eval_: str) -> str | None:
    """The ground truth beside the test.csv of test images at a folder or a URL, or one folder below; None where there is none."""
    if is_url(eval_):
        found = truth_beside_table(Remote(Path()).names(parse(eval_, "eval")))
        return f"{eval_.rstrip('/')}/{found}" if found else None
    folders = [Path(eval_), *sorted(path for path in Path(eval_).glob("*") if path.is_dir())]
    # one by one: a folder of images may hold very many
    files = ([str(path) for path in folder.glob("*.[cC][sS][vV]") if path.is_file()] for folder in folders)
    return next((found for names in files if (found := truth_beside_table(names))), None)


def truth_beside_table(names: Sequence[str]) -> str | None:
    """Of the names of files the ground truth beside a test.csv, in the folder with the shortest path."""
    folders = {posixpath.dirname(name) for name in names if posixpath.basename(name).lower() == EVAL_TABLE}
    beside = [truth_among(n for n in names if posixpath.dirname(n) == folder) for folder in sorted(folders)]
    return min((name for name in beside if name), key=len, default=None)


def _step_of(stage: Stage, fold: int | None) -> str:
    if stage.name != "train-fold":
        return stage.name
    if fold is None:
        raise SettingsError("which fold? give FOLD=0, 1 and so on (an argument, or the environment)")
    return f"fold-{fold}"


def _is_there(place: str) -> bool:
    if not is_url(place):
        return Path(place).exists()
    try:
        return bool(Remote(Path()).names(parse(place, "RUNS")))
    except MissingInputError:
        return False


CHANNELS: dict[str, dict[str, str]] = {
    "split": {},
    "prepare": {"folds": "split/output"},
    "train-fold": {"folds": "split/output"},
    "ensemble": {"model": "", "folds": "split/output"},
    "evaluate": {"predictions": "ensemble/output", "model": "", "folds": "split/output"},
    "distill": {"folds": "split/output", "model": ""},
}
"""What each stage reads of its run, by channel: a place in it; the empty one is the run itself, with all its models."""
