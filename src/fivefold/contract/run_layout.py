"""Folder layout of a run: `<runs>/<run>/<step>/{model,output,checkpoints}`.

    split  fold-0 … fold-K  ensemble  evaluate  distill  ensemble-student  evaluate-student

Plans use this layout. If RUN=first is set, a stage takes its unset SM_* variables from it.
"""

import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path

from fivefold.contract.filenames import pick_ground_truth_file
from fivefold.contract.job import channels_from_env, has_sagemaker_dirs
from fivefold.contract.s3.sync import S3Sync
from fivefold.contract.s3.urls import is_url, parse
from fivefold.contract.stage_specs import MODEL, RECORD, STAGES, Stage
from fivefold.errors import MissingInputError, SettingsError

GROUND_TRUTH = "gt.csv"
EVAL_TABLE = "test.csv"
PREPARED = "prepare/output"
CACHES = ".cache"
"""The folder of image caches that all runs in a folder share. No run can have this name."""
MODEL_FILES = (MODEL, "model.tar.gz")
"""What a folder `model` holds after a stage that trains, the second as SageMaker packs it."""


def run_path(runs: str, run: str) -> str:
    """Return the folder or URL of a run in `runs`. Raise a SettingsError if the name would lead elsewhere."""
    if run in (".", "..") or "/" in run:
        raise SettingsError(
            f"run={run!r} must be the name of a folder in {runs}, without '/'; to change that folder set RUNS="
        )
    return f"{runs.rstrip('/')}/{run}"


def channel_paths(stage: str, run: str) -> dict[str, str]:
    """Return the paths of the channels that a stage reads from the run at `run` (a folder or a URL), by channel name."""
    return {name: f"{run}/{place}" if place else run for name, place in CHANNELS[stage].items()}


def output_variables(stage: str, step: str) -> dict[str, str]:
    """Return the SM_* variables for the outputs of a stage in the step folder `step` (a folder or a URL)."""
    variables = {"SM_OUTPUT_DATA_DIR": f"{step}/output"}
    if STAGES[stage].writes_model:
        variables |= {"SM_MODEL_DIR": f"{step}/model", "SM_CHECKPOINT_DIR": f"{step}/checkpoints"}
    return variables if is_url(step) else {**variables, "SM_OUTPUT_DIR": step}


def env_for_run(stage: Stage, environ: Mapping[str, str], run: str, fold: int | None) -> Mapping[str, str]:
    """Return `environ` with the stage's unset channels and folders filled from the run at `run`.

    Optional channels are filled only if they exist. `environ` stays unchanged for stages that are not part of a run,
    and on platforms with their own folders (`/opt/ml`), where the run is only a label.
    """
    if stage.name not in CHANNELS or has_sagemaker_dirs(environ):
        return environ
    if stage.name == "train-fold" and fold is None:
        raise SettingsError("FOLD is not set: give FOLD=0, 1 etc. (as an argument or in the environment)")
    step = f"fold-{fold}" if stage.name == "train-fold" else stage.name
    variables = output_variables(stage.name, f"{run}/{step}")
    channels = channels_from_env(environ)
    for name, place in channel_paths(stage.name, run).items():
        if name not in channels and (name in stage.channels or _exists(place)):
            variables[f"SM_CHANNEL_{name.upper()}"] = place
    if stage.name == "audit" and "model" not in channels and not _has_models(run):
        del variables["SM_CHANNEL_MODEL"]  # an audit before any training
    prepared = f"{run}/{PREPARED}"
    if "cache" in stage.optional and "cache" not in channels:
        # at a URL only finished stages are visible
        exists = _exists(prepared if is_url(run) else f"{prepared}/{RECORD}")
        variables |= {"SM_CHANNEL_CACHE": prepared} if exists else {}
    if stage.name == "evaluate" and "ground_truth" not in channels and "eval" in channels:
        variables["SM_CHANNEL_GROUND_TRUTH"] = find_ground_truth(str(channels["eval"])) or ""
    return {**environ, **{name: value for name, value in variables.items() if not environ.get(name)}}


def find_ground_truth(eval_: str) -> str | None:
    """Return the ground truth beside the test.csv in a folder or at a URL, or one folder below; None if there is none."""
    if is_url(eval_):
        truth = pick_ground_truth(S3Sync(Path()).names(parse(eval_, "eval")))
        return f"{eval_.rstrip('/')}/{truth}" if truth else None
    folders = [Path(eval_), *sorted(path for path in Path(eval_).glob("*") if path.is_dir())]
    # lazily: a folder of images may contain many files
    files = ([str(path) for path in folder.glob("*.[cC][sS][vV]") if path.is_file()] for folder in folders)
    return next((truth for names in files if (truth := pick_ground_truth(names))), None)


def pick_ground_truth(names: Sequence[str]) -> str | None:
    """Return the name of the ground truth beside a test.csv, the one with the shortest path; None if there is none."""
    folders = {posixpath.dirname(name) for name in names if posixpath.basename(name).lower() == EVAL_TABLE}
    beside = [pick_ground_truth_file(n for n in names if posixpath.dirname(n) == folder) for folder in sorted(folders)]
    return min((name for name in beside if name), key=len, default=None)


def _has_models(run: str) -> bool:
    """Return whether a step of the run at `run` has finished a model."""
    if is_url(run):
        return any(posixpath.basename(name) in MODEL_FILES for name in S3Sync(Path()).names(parse(run, "RUNS")))
    patterns = (f"{folders}/model/{name}" for folders in ("*", "*/*") for name in MODEL_FILES)
    return any(path.is_file() for pattern in patterns for path in Path(run).glob(pattern))


def _exists(place: str) -> bool:
    if not is_url(place):
        return Path(place).exists()
    try:
        return bool(S3Sync(Path()).names(parse(place, "RUNS")))
    except MissingInputError:
        return False


CHANNELS: dict[str, dict[str, str]] = {
    "split": {},
    "plan": {"folds": "split/output"},
    "prepare": {"folds": "split/output"},
    "train-fold": {"folds": "split/output"},
    "ensemble": {"model": "", "folds": "split/output"},
    "audit": {"model": "", "folds": "split/output"},
    "evaluate": {"predictions": "ensemble/output", "model": "", "folds": "split/output"},
    "distill": {"folds": "split/output", "model": ""},
}
"""The channels that each stage reads from its run: a path in the run. An empty path is the run itself, with all its models."""
