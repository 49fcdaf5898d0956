"""Checks before a run starts: settings that would fail in every fold, and requirements that this machine does not meet.

Most checks need torch, which would take memory of `submit` for the whole run. So they run in a subprocess.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fivefold.config.schema import Settings
from fivefold.contract.s3.urls import is_url
from fivefold.errors import DataError, FivefoldError, MissingInputError, RetryableError, SettingsError
from fivefold.inference.blending import weights_by_name
from fivefold.launchers.plan import Inputs, Plan
from fivefold.log import log

TRAINING = ("train-fold", "distill")
MODULE = "fivefold.stages.preflight"
ERRORS = {error.exit_code: error for error in (SettingsError, DataError, MissingInputError, RetryableError)}


def check_plan(plan: Plan, inputs: Inputs, local: bool) -> None:
    """Raise the error that a step of the plan would raise for its settings; `local`: the plan runs on this machine."""
    settings, stages = plan.settings, {step.stage for step in plan.steps}
    if any(step.name == "ensemble" for step in plan.steps):
        check_blend(settings, local)
    trained = [name for name in (*TRAINING, "plan") if name in stages]
    if trained:
        check_in_subprocess(settings, trained, local, inputs.weights)


def check_blend(settings: Settings, local: bool) -> None:
    """Raise a SettingsError for weights of unknown systems, a MissingInputError for missing submission files."""
    from fivefold.inference.submission_reader import system_name

    options = settings.ensemble
    files = [Path(name) for name in options.submissions]
    if missing := [path for path in files if local and not path.is_file()]:
        raise MissingInputError(f"ensemble.submissions: no file {missing[0]}")
    if options.blend == "weighted" and not any(map(is_url, options.submissions)):
        weights_by_name([settings.system, *map(system_name, files)], options.weights)


def check_in_subprocess(settings: Settings, trained: Sequence[str], local: bool, weights: str | None = None) -> None:
    """Run `check_stages` in a subprocess and raise its error; log a warning if the subprocess crashes.

    If this process has already loaded torch, it runs the check itself.
    """
    if "torch" in sys.modules:
        return check_stages(settings, trained, local, weights)
    request = json.dumps([settings.model_dump(mode="json", exclude_unset=True), list(trained), local, weights])
    ended = subprocess.run([sys.executable, "-m", MODULE], input=request, capture_output=True, text=True, check=False)
    if ended.returncode in ERRORS:
        raise ERRORS[ended.returncode](ended.stdout.strip())
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
        log.warning("could not check the settings before the run (exit code %d: %s)", ended.returncode, last)


def check_stages(settings: Settings, trained: Sequence[str], local: bool, weights: str | None = None) -> None:
    """Raise the error that these stages would raise before their first step: for the settings, and `local` for this machine.

    `weights`: the folder or URL of the weights channel.
    """
    from fivefold import build
    from fivefold.distillation import TEACHERS, check_patience
    from fivefold.inference.tta import build_views
    from fivefold.planning.recipe import find_backbones
    from fivefold.stages.image_source import cache_folder

    cache_folder(settings)
    if "plan" in trained:
        find_backbones(settings, Path(weights) if weights else None)
        return
    recipes = [settings.of_stage(stage) for stage in trained]
    for number, recipe in enumerate(recipes):
        if recipe in recipes[:number]:  # the student may have the folds' settings
            continue
        recipe = build.resolve_inputs(recipe)
        build.check_training(recipe)
        if local and not is_url(weights or ""):
            build.check_weights(recipe, Path(weights) if weights else None)
        network = build.build_trial_network(recipe, shapes_only=not local)
        if local:
            build.check_resources(network, recipe)
    if "distill" in trained:
        split, options = settings.split, settings.distill
        aside = split.ratios[2] if split.ratios else split.holdout
        check_patience(options.patience, int(aside > 0))
        build_views(options.teacher_tta)
        if local and options.teacher not in TEACHERS and not Path(options.teacher).is_dir():
            raise MissingInputError(f"distill.teacher={options.teacher} is not {' or '.join(TEACHERS)}, nor a folder")


def main() -> int:
    """Check the request on stdin; print an error to stdout and return its exit code."""
    tree, *request = json.load(sys.stdin)
    try:
        check_stages(Settings.model_validate(tree), *request)
    except FivefoldError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
