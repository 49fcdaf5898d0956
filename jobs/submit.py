"""`python -m jobs submit KEY=VALUE...`: run a recipe's stages in order on a platform."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError

from fivefold.config.loading import arguments_layer, flatten
from fivefold.config.schema import SECTIONS, Settings
from fivefold.contract.files import check_writable
from fivefold.contract.s3.urls import is_url
from fivefold.errors import SettingsError
from fivefold.launchers import local
from fivefold.launchers.kubernetes import launch as kubernetes
from fivefold.launchers.plan import (
    Inputs,
    Plan,
    make_plan,
    make_planning,
    new_run_name,
    next_run_name,
    select,
    without,
)
from fivefold.launchers.run_clock import RunClock
from fivefold.launchers.sagemaker import launch as sagemaker
from fivefold.launchers.sagemaker import local_mode
from fivefold.launchers.status import read_status, read_step_record, write_plan
from fivefold.log import log
from fivefold.lookup import choose, did_you_mean
from fivefold.planning.rules import DATA_CHOICES, RECIPE
from fivefold.stages.preflight import check_plan

split_at_commas = BeforeValidator(lambda text: [part.strip() for part in text.split(",") if part.strip()])
Names = Annotated[list[str], split_at_commas]
Numbers = Annotated[list[NonNegativeInt], split_at_commas]
Seeds = Annotated[list[Annotated[int, Field(ge=0, le=2**32 - 1)]], split_at_commas]


class Keys(BaseModel):
    """The keys that submit itself uses; all other keys on its command line are settings."""

    platform: str = Field("local", description="where the stages run")
    recipe: str = Field("", description="shipped recipe, or a .toml or .json file; auto (default here): a planned one")
    train: str = Field("", description="training images: a folder or a .zip (required)")
    eval: str = Field("", description="test images with test.csv and sample_submission.csv: a folder or a .zip")
    ground_truth: str = Field("", description="true classes of eval; empty: gt.csv or ground_truth.csv beside test.csv")
    unlabeled: str = Field("", description="unlabelled images for distillation; the ensemble is their teacher")
    weights: str = Field("", description="folder of pretrained weights for model.weights")
    run: str = Field("", description="name of the run, new or to resume; empty: run_YYYYMMDD_HHMMSS_<id8>")
    increment: bool = Field(False, description="start a new run: NAME of run=NAME, or the next free of NAME2, NAME3, …")
    runs: str = Field("runs", description="folder of all runs")
    stages: Names = Field([], description="run only these stages, e.g. split,train-fold; empty: all")
    folds: Numbers = Field([], description="run only these folds, e.g. 2,4, and by default no stage after training")
    seeds: Seeds = Field(
        [], description="train every fold with each seed, e.g. 42,43; the first seed's are the teachers"
    )
    check: bool = Field(True, description="check the settings of all folds before anything runs")
    parallel: PositiveInt | None = Field(
        None, description="folds in parallel; empty: one per GPU, or on CPU one per core as far as memory allows"
    )


PLATFORMS: dict[str, Any] = {
    "local": local,
    "sagemaker": sagemaker,
    "sagemaker-local": local_mode,
    "kubernetes": kubernetes,
}
"""The module of each platform. `check_inputs`, `describe` (which returns the plan in the platform's format) and
`check_machine` raise errors before anything is written; `launch` runs the plan; `results` describes its results."""
AUTO = "auto"
"""The recipe= that is planned."""
FLAGS = {
    "--dry-run": "print the plan, as commands, requests or manifests; run nothing",
    "--pipeline": "sagemaker: print the plan as the definition of a Pipeline; run nothing",
}


def main(arguments: Sequence[str]) -> int:
    """Plan the run, check it, and run it on its platform; return the exit code of the first failed step."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    keys, overrides = read_arguments([text for text in arguments if text not in FLAGS])
    platform = choose(PLATFORMS, "platform", keys.platform)
    run = run_name(keys)
    inputs, here = platform.check_inputs(make_inputs(keys), Path(keys.runs) / run), keys.platform == "local"
    recipe = keys.recipe or (default_recipe(overrides) if here else "")
    planning, parallel = None, 0
    if recipe == AUTO:
        planning = make_planning(inputs, planning_overrides(overrides, here), run, keys.runs)
        nothing_else = bool(keys.stages) and {*keys.stages} <= {step.name for step in planning.steps}
        chosen = select(planning, keys.stages) if nothing_else else planning
        if "--dry-run" in arguments:
            print(local.describe(chosen) if nothing_else else preview(planning, inputs, overrides, keys))
            return 0
        code = run_planning(chosen, inputs, keys.check)
        if code or nothing_else:
            return code
        recipe = str(planning.step("plan").folder / "output" / RECIPE)
    everything = make_plan(inputs, overrides, run, keys.runs, recipe, keys.seeds, here)
    plan = select(everything, keys.stages, keys.folds)
    if planning is not None:  # these steps have ended
        everything = replace(everything, steps=(*planning.steps, *everything.steps[1:]))
        plan = without(plan, ["split"])
        plan, text, parallel = forecast(plan, Path(recipe).parent)
        print(f"{text}\n", flush=True)
    parallel = keys.parallel or parallel
    for note in plan.notes:
        log.info("%s", note)
    pipeline = "--pipeline" in arguments
    if pipeline and keys.platform != "sagemaker":
        raise SettingsError(f"--pipeline needs platform=sagemaker, but platform={keys.platform} is set")
    text = sagemaker.describe_pipeline(plan) if pipeline else platform.describe(plan, parallel)
    dry_run = pipeline or "--dry-run" in arguments
    if not dry_run:
        platform.check_machine(plan)
    if keys.check:
        check_plan(plan, inputs, local=here)
    if dry_run:
        print(text)
        return 0
    if ignored := local.settings_variables(os.environ):
        log.warning("submit takes settings only as arguments; ignored variables: %s", ", ".join(ignored))
    check_writable(plan.folder)
    local.unpack_ground_truth(inputs, plan.folder)
    local.check_no_foreign_models(everything)
    write_plan(everything)
    code = platform.launch(plan, parallel)
    print(platform.results(everything))
    return code


def read_arguments(arguments: Sequence[str]) -> tuple[Keys, list[str]]:
    """Split the arguments into submit's keys and settings; raise a SettingsError for an unknown key."""
    values: dict[str, Any] = {}
    overrides = []
    for key, value in arguments_layer(arguments).values.items():
        if key in Keys.model_fields:
            values |= {key: value} if value else {}
        elif "." not in key and (key not in Settings.model_fields or key in SECTIONS):
            known = [*Keys.model_fields, *flatten(Settings())]
            raise SettingsError(f"unknown key {key!r}{did_you_mean(key, known)}; submit --help lists the keys")
        else:
            overrides.append(f"{key}={value}")
    try:
        return Keys.model_validate(values), overrides
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise SettingsError(f"{key}={values[key]}: {error.errors()[0]['msg']}; submit --help lists the keys") from error


def default_recipe(overrides: Sequence[str]) -> str:
    """Return the recipe without recipe=: a planned one. If [model], [augment] or [train] is set, none."""
    keys = arguments_layer(overrides).values
    if any(key.split(".")[0] in ("model", "augment", "train") for key in keys):
        return ""
    log.info("no recipe= is set: planning one, as with recipe=%s", AUTO)
    return AUTO


def planning_overrides(overrides: Sequence[str], here: bool) -> list[str]:
    """Return the settings of the steps that plan; raise a SettingsError if the plan is not for this machine."""
    if not here:
        raise SettingsError(
            f"recipe={AUTO} plans for this machine: run split and plan on a machine like those of the run, and set "
            f"recipe= to their {RECIPE}"
        )
    return [*(f"{choice.key}={choice.value}" for choice in DATA_CHOICES), *overrides]


def run_planning(planning: Plan, inputs: Inputs, check: bool) -> int:
    """Run split and plan; return the exit code of the first failed step. Raise a SettingsError if the time ends before."""
    if check:
        check_plan(planning, inputs, local=True)
    check_writable(planning.folder)
    write_plan(planning)
    code = local.launch(planning, 1)
    unfinished = [step for step in planning.steps if read_step_record(step) is None]
    if any(read_status(step).exit_code == SettingsError.exit_code for step in unfinished):
        return SettingsError.exit_code  # the step's message names the least time that would do
    if code == 0 and unfinished:
        raise SettingsError(
            f"{planning.settings.limit_words} is too short to read the images and to measure this machine; set a longer "
            f"time= with run={planning.run} to go on"
        )
    return code


def preview(planning: Plan, inputs: Inputs, overrides: Sequence[str], keys: Keys) -> str:
    """Return the recipe that a plan would write now, and the forecast of its run; write nothing."""
    from fivefold.data.readers.eval_images import read_eval
    from fivefold.data.readers.stores import open_store
    from fivefold.planning.facts import read_facts, sample_rows
    from fivefold.planning.recipe import plan_recipe, to_toml, write_plan
    from jobs.split import labelled_rows

    settings, data = planning.settings, planning.settings.data
    if urls := [f"{name}={path}" for name, path in inputs.paths() if is_url(path)]:
        raise SettingsError(
            f"--dry-run plans from files of this machine, but {urls[0]} is a URL; give a recipe=, or a local copy"
        )
    store = open_store(Path(inputs.train), data.max_unpacked_gib)
    rows, folds = labelled_rows(store, settings), 1 if settings.split.ratios else settings.split.folds
    tested = len(read_eval(open_store(Path(inputs.eval)), data.id_column, data.path_column)) if inputs.eval else 0
    paths = rows.paths.to_pylist()
    facts = read_facts(store, paths, rows.codes, len(rows.classes), rows.groups, folds, tested, data)
    sample = [paths[row] for row in sample_rows(len(rows))]
    weights = Path(inputs.weights) if inputs.weights else None
    planned = plan_recipe(settings, facts, Path(inputs.train), sample, os.environ, weights)
    with tempfile.TemporaryDirectory() as folder:
        recipe, _ = write_plan(Path(folder), planned)
        plan = make_plan(inputs, overrides, planning.run, keys.runs, str(recipe), keys.seeds, local=True)
        steps = [replace(step, needs=(*step.needs, "plan")) for step in select(plan, keys.stages, keys.folds).steps]
        _, text, _ = forecast(replace(plan, steps=(*planning.steps, *steps[1:])), Path(folder))
    return f"{to_toml(planned)}\n" + "".join(f"# {line}\n" for line in text.splitlines())


def forecast(plan: Plan, folder: Path) -> tuple[Plan, str, int]:
    """Forecast a planned recipe, whose measurements are in `folder`.

    Return the plan with the expected seconds of each step, a table, and the number of parallel folds that was measured.
    """
    from fivefold.planning.forecast import MEASUREMENTS, describe, forecast_steps, read_measurements

    facts, speed, rates = read_measurements(folder / MEASUREMENTS)
    used = RunClock(plan).used
    left = without(plan, [step.name for step in plan.steps if read_step_record(step) is not None]).steps
    if not left:
        return plan, "forecast: all steps have ended", rates.parallel
    steps = forecast_steps(left, plan.settings, facts, speed, rates, plan.settings.time_limit - used)
    plan = replace(plan, expected={step.name: step.end - step.start for step in steps})
    return plan, describe(steps, plan.settings.hourly_price, used), rates.parallel


def make_inputs(keys: Keys) -> Inputs:
    if not keys.train:
        raise SettingsError("submit needs train=PATH: a folder or a .zip of images")
    if keys.ground_truth and not keys.eval:
        log.warning(
            "ignored: ground_truth=%s, because without eval= there are no test images; set eval= too",
            keys.ground_truth,
        )
    optional = ("eval", "ground_truth", "unlabeled", "weights")
    return Inputs(keys.train, **{name: getattr(keys, name) or None for name in optional})


def run_name(keys: Keys) -> str:
    """Return the name from run=, with increment=true its next free number, or a name with the current time."""
    if keys.increment and not keys.run:
        raise SettingsError("increment=true needs run=NAME, e.g. run=exp for exp, exp2, exp3 and so on")
    return next_run_name(keys.run, Path(keys.runs)) if keys.increment else keys.run or new_run_name()


def usage() -> str:
    defaults = {name: str(value).lower() if value not in ("", [], None) else "-" for name, value in Keys()}
    keys = "\n".join(f"  {n:13} {defaults[n]:6} {field.description}" for n, field in Keys.model_fields.items())
    flags = "\n".join(f"  {flag:20} {meaning}" for flag, meaning in FLAGS.items())
    return (
        f"{__doc__}\n\n{keys}\n{flags}\n\n"
        f"Platforms: {', '.join(PLATFORMS)}\n\nAny setting (see python -m jobs --help) is passed to the stages "
        "that use it, e.g. train.epochs=3 split.folds=4."
    )
