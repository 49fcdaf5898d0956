"""What every fold of a run would meet, found before the first one trains: settings that cannot work, and what this machine lacks.

Most of it needs torch, which `submit` does not load: it would hold it for as long as the run takes. So a process of its
own looks, and tells what it found.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fivefold.contract.s3.urls import is_url
from fivefold.errors import DataError, FivefoldError, MissingInputError, RetryableError, SettingsError
from fivefold.inference.blends import given_weights
from fivefold.launchers.plan import Inputs, Plan
from fivefold.recipe import Settings

log = logging.getLogger("fivefold")

TRAINING = ("train-fold", "distill")
MODULE = "fivefold.jobs.check"
ERRORS = {error.exit_code: error for error in (SettingsError, DataError, MissingInputError, RetryableError)}


def check_plan(plan: Plan, inputs: Inputs, here: bool) -> None:
    """Raises what a step of the plan would end with, as far as settings tell; `here`: it runs on this machine, with its files."""
    settings, stages = plan.settings, {step.stage for step in plan.steps}
    if any(step.name == "ensemble" for step in plan.steps):
        check_blend(settings, here)
    trained = [name for name in TRAINING if name in stages]
    if not trained:
        return
    if here and not is_url(inputs.weights or ""):
        check_weights([trained_by(settings, name) for name in trained], inputs.weights)
    check_apart(settings, trained, here)


def trained_by(settings: Settings, stage: str) -> Settings:
    return settings.student() if stage == "distill" else settings


def check_weights(recipes: Sequence[Settings], channel: str | None) -> None:
    """Raises a MissingInputError for weights to start from that are neither at their path nor in the channel."""
    for name in dict.fromkeys(recipe.model.weights for recipe in recipes if recipe.model.weights):
        if not any(path.is_file() for path in (Path(name), *([Path(channel) / name] if channel else []))):
            raise MissingInputError(
                f"model.weights={name}: no such file, nor one of that name in weights={channel or ''}"
            )


def check_blend(settings: Settings, here: bool) -> None:
    """Raises a SettingsError for weights of other systems than the run has, a MissingInputError for submission files that are not there."""
    from fivefold.inference.submitted import system_name

    options = settings.ensemble
    files = [Path(name) for name in options.submissions]
    if absent := [path for path in files if here and not path.is_file()]:
        raise MissingInputError(f"ensemble.submissions: no file {absent[0]}")
    if options.blend == "weighted" and not any(map(is_url, options.submissions)):
        given_weights([settings.system, *map(system_name, files)], options.weights)


def check_apart(settings: Settings, trained: Sequence[str], here: bool) -> None:
    """`check_training` in a process of its own, whose error is raised here; one that is killed tells nothing.

    A process that has loaded torch already checks by itself.
    """
    if "torch" in sys.modules:
        return check_training(settings, trained, here)
    given = json.dumps([settings.model_dump(mode="json"), list(trained), here])
    ended = subprocess.run([sys.executable, "-m", MODULE], input=given, capture_output=True, text=True, check=False)
    if ended.returncode in ERRORS:
        raise ERRORS[ended.returncode](ended.stdout.strip())
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        log.warning("the settings could not be tried before the run (exit code %d: %s)", ended.returncode, last)


def check_training(settings: Settings, trained: Sequence[str], here: bool) -> None:
    """Raises what these stages would end with before their first step, of settings alone, or `here` of this machine too."""
    from fivefold import assemble
    from fivefold.distillation import TEACHERS
    from fivefold.inference.tta import build_views

    from .distill import allowed_patience
    from .images import cache_folder

    cache_folder(settings)
    recipes = [trained_by(settings, stage) for stage in trained]
    for number, recipe in enumerate(recipes):
        if recipe in recipes[:number]:  # the student's may be the folds' own
            continue
        assemble.check_training(recipe)
        network = assemble.tried_network(recipe, shapes_alone=not here)
        if here:
            assemble.check_machine(network, recipe)
    if "distill" in trained:
        split, options = settings.split, settings.distill
        aside = split.parts[2] if split.parts else split.holdout
        allowed_patience(options.patience, int(aside > 0))
        build_views(options.views)
        if here and options.teacher not in TEACHERS and not Path(options.teacher).is_dir():
            raise MissingInputError(f"distill.teacher={options.teacher} is neither {', '.join(TEACHERS)} nor a folder")


def main() -> int:
    """Checks what stands on stdin; the exit code of the error, whose words go to stdout."""
    tree, trained, here = json.load(sys.stdin)
    try:
        check_training(Settings.model_validate(tree), trained, here)
    except FivefoldError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
