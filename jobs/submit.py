"""`python -m jobs submit KEY=VALUE...`: a recipe's stages, in order, on a platform."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError

from fivefold.choose import choose, did_you_mean
from fivefold.contract.files import probe_writable
from fivefold.errors import SettingsError
from fivefold.launchers import kubernetes, local, manifests
from fivefold.launchers.plan import Inputs, Plan, describe, make_plan, new_run_name, next_run_name, select
from fivefold.launchers.sagemaker import launch as sagemaker
from fivefold.launchers.sagemaker import local as sagemaker_local
from fivefold.launchers.status import results_of, write_plan
from fivefold.recipe import SECTIONS, Settings
from fivefold.settings import arguments_layer, flatten

from .check import check_plan

log = logging.getLogger("fivefold")

split_at_commas = BeforeValidator(lambda text: [part.strip() for part in text.split(",") if part.strip()])
Names = Annotated[list[str], split_at_commas]
Numbers = Annotated[list[NonNegativeInt], split_at_commas]
Seeds = Annotated[list[Annotated[int, Field(ge=0, le=2**32 - 1)]], split_at_commas]


class Keys(BaseModel):
    """The keys of submit's own; all else on its command line are settings."""

    platform: str = Field("local", description="where the stages run")
    recipe: str = Field("", description="a shipped recipe's name, or the path of a .toml or .json file")
    train: str = Field("", description="the training images: a folder or a .zip (needed)")
    eval: str = Field("", description="the test images with test.csv and sample_submission.csv: a folder or a .zip")
    ground_truth: str = Field(
        "",
        description="the classes of eval's images; empty: gt.csv or ground_truth.csv beside eval's test.csv",
    )
    unlabeled: str = Field("", description="images without classes, which the ensemble teaches to the student")
    weights: str = Field("", description="a folder of pretrained weights that model.weights names")
    run: str = Field(
        "",
        description="the run's name; empty: run_YYYYMMDD_HHMMSS_<id8>. The same name goes on where it stopped",
    )
    increment: bool = Field(
        False, description="a new run each time: NAME of run=NAME, then NAME2, NAME3, … where that one is there"
    )
    runs: str = Field("runs", description="the folder of all runs")
    stages: Names = Field([], description="only these, e.g. split,train-fold; empty: all")
    folds: Numbers = Field(
        [], description="only these, e.g. 2,4; empty: all. Alone it means their training, and no later stage"
    )
    seeds: Seeds = Field(
        [], description="train every fold with each of these, e.g. 42,43; the first one teaches the student"
    )
    check: bool = Field(
        True, description="try the settings that every fold would meet before anything runs; false: start at once"
    )
    parallel: PositiveInt | None = Field(
        None, description="folds side by side; empty: one a GPU, or one a CPU core as far as memory goes round"
    )


FLAGS = {
    "--dry-run": "print the plan, as commands, requests or manifests; run nothing",
    "--pipeline": "sagemaker: create or update a Pipeline of the plan, instead of running it",
}


@dataclass(frozen=True)
class Platform:
    """Where a plan can run: what runs it, the plan in the platform's own words, its inputs checked, what came of it.

    `check` raises an error for a plan that the platform cannot run, before anything is written.
    """

    launch: Callable[[Plan, int], int]
    describe: Callable[[Plan, int], str]
    check_inputs: Callable[[Inputs, Path], Inputs]
    results: Callable[[Plan], str]
    check: Callable[[Plan], object] = lambda plan: None


def main(arguments: Sequence[str]) -> int:
    """Plans the run, checks it, and hands it to its platform; the exit code of the first step that failed."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    keys, overrides = read_arguments([text for text in arguments if text not in FLAGS])
    dry_run = "--dry-run" in arguments
    platform = choose(PLATFORMS, "platform", keys.platform)
    run = run_name(keys)
    inputs = platform.check_inputs(inputs_of(keys), Path(keys.runs) / run)
    everything = make_plan(inputs, overrides, run, keys.runs, keys.recipe, keys.seeds)
    plan = select(everything, keys.stages, keys.folds)
    parallel = keys.parallel or 0
    for note in plan.notes:
        log.info("%s", note)
    if "--pipeline" in arguments:
        if keys.platform != "sagemaker":
            raise SettingsError(f"--pipeline is of platform=sagemaker, and platform={keys.platform} has none")
        if not dry_run:
            try_settings(keys, plan, inputs)
            return sagemaker.upsert_pipeline(plan, parallel)
    if dry_run:
        text = sagemaker.describe_pipeline(plan) if "--pipeline" in arguments else platform.describe(plan, parallel)
        try_settings(keys, plan, inputs)
        print(text)
        return 0
    platform.check(plan)
    try_settings(keys, plan, inputs)
    if ignored := local.settings_variables(os.environ):
        log.warning("submit takes settings as arguments; its steps do not see the variables %s", ", ".join(ignored))
    probe_writable(plan.folder)
    local.unpack_ground_truth(inputs, plan.folder)
    local.refuse_strangers(everything)
    write_plan(everything)
    code = platform.launch(plan, parallel)
    print(platform.results(everything))
    return code


def try_settings(keys: Keys, plan: Plan, inputs: Inputs) -> None:
    """Raises what every fold would meet, unless the user wants to start at once."""
    if keys.check:
        check_plan(plan, inputs, here=keys.platform == "local")


def read_arguments(arguments: Sequence[str]) -> tuple[Keys, list[str]]:
    """The arguments, parted into submit's own keys and settings; a SettingsError for what is neither."""
    own: dict[str, Any] = {}
    overrides = []
    for key, value in arguments_layer(arguments).values.items():
        if key in Keys.model_fields:
            own |= {key: value} if value else {}
        elif "." not in key and (key not in Settings.model_fields or key in SECTIONS):
            known = [*Keys.model_fields, *flatten(Settings())]
            raise SettingsError(f"unknown key {key!r}{did_you_mean(key, known)}; submit --help lists the keys")
        else:
            overrides.append(f"{key}={value}")
    try:
        return Keys.model_validate(own), overrides
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise SettingsError(f"{key}={own[key]}: {error.errors()[0]['msg']}; submit --help lists the keys") from error


def inputs_of(keys: Keys) -> Inputs:
    if not keys.train:
        raise SettingsError("submit needs train=PATH: a folder or a .zip of images")
    if keys.ground_truth and not keys.eval:
        log.warning(
            "ground_truth=%s is not used: without eval= no test images are predicted; give eval= too",
            keys.ground_truth,
        )
    others = ("eval", "ground_truth", "unlabeled", "weights")
    return Inputs(keys.train, **{name: getattr(keys, name) or None for name in others})


def run_name(keys: Keys) -> str:
    """The run that is asked for, its next number with increment=true, or a name of this second."""
    if keys.increment and not keys.run:
        raise SettingsError("increment=true needs run=NAME, as in run=exp, for exp, exp2, exp3 and so on")
    return next_run_name(keys.run, Path(keys.runs)) if keys.increment else keys.run or new_run_name()


def usage() -> str:
    defaults = {name: str(value).lower() if value not in ("", [], None) else "-" for name, value in Keys()}
    keys = "\n".join(f"  {n:13} {defaults[n]:6} {field.description}" for n, field in Keys.model_fields.items())
    flags = "\n".join(f"  {flag:20} {meaning}" for flag, meaning in FLAGS.items())
    return (
        f"{__doc__}\n\n{keys}\n{flags}\n\n"
        f"platforms: {', '.join(PLATFORMS)}\n\nAny setting (python -m jobs --help lists them) goes on to the stages "
        "that use it, e.g. train.epochs=3 split.folds=4."
    )


PLATFORMS = {
    "local": Platform(
        local.launch, lambda plan, _: describe(plan, shlex.quote(sys.executable)), local.check_inputs, results_of
    ),
    "sagemaker": Platform(
        sagemaker.launch, sagemaker.describe, sagemaker.check_inputs, sagemaker.results, sagemaker.check
    ),
    "sagemaker-local": Platform(
        sagemaker_local.launch,
        sagemaker_local.describe,
        sagemaker_local.check_inputs,
        results_of,
        sagemaker_local.check,
    ),
    "kubernetes": Platform(
        kubernetes.launch, kubernetes.describe, manifests.check_inputs, kubernetes.results, kubernetes.check
    ),
}
