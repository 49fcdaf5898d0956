"""`python -m jobs submit KEY=VALUE...`: a recipe's stages, in order, on a platform."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fivefold.choose import choose, did_you_mean
from fivefold.contract.files import probe_writable
from fivefold.errors import SettingsError
from fivefold.launchers import kubernetes, local, manifests
from fivefold.launchers.plan import Inputs, Plan, describe, make_plan, new_run_name, next_run_name, select
from fivefold.launchers.sagemaker import launch as sagemaker
from fivefold.launchers.sagemaker import local as sagemaker_local
from fivefold.launchers.status import results_of, write_plan
from fivefold.recipe import SECTIONS, Settings
from fivefold.settings import arguments_layer, flatten, normal_key
from fivefold.values import value_of

log = logging.getLogger("fivefold")

KEYS = {
    "platform": ("local", "where the stages run"),
    "recipe": ("", "a shipped recipe's name, or the path of a .toml or .json file"),
    "train": ("", "the training images: a folder or a .zip (needed)"),
    "eval": ("", "the test images with test.csv and sample_submission.csv: a folder or a .zip"),
    "ground_truth": ("", "the classes of eval's images; empty: gt.csv or ground_truth.csv beside eval's test.csv"),
    "unlabeled": ("", "images without classes, which the ensemble teaches to the student"),
    "weights": ("", "a folder of pretrained weights that model.weights names"),
    "run": ("", "the run's name; empty: run_YYYYMMDD_HHMMSS_<id8>. The same name goes on where it stopped"),
    "increment": ("false", "a new run each time: NAME of run=NAME, then NAME2, NAME3, … where that one is there"),
    "runs": ("runs", "the folder of all runs"),
    "stages": ("", "only these, e.g. split,train-fold; empty: all"),
    "folds": ("", "only these, e.g. 2,4; empty: all. Alone it means their training, and no later stage"),
    "seeds": ("", "train every fold with each of these, e.g. 42,43; the first one teaches the student"),
    "parallel": ("", "folds side by side; empty: one a GPU, or one a CPU core as far as memory goes round"),
}


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


@dataclass(frozen=True)
class Request:
    """What the command line asks for, as text; `overrides` are the settings among it."""

    given: Mapping[str, str]
    overrides: tuple[str, ...]
    dry_run: bool
    pipeline: bool

    def __getitem__(self, key: str) -> str:
        return self.given.get(key, KEYS[key][0])

    def numbers(self, key: str) -> list[int]:
        try:
            return [whole_number(text) for text in self.names(key)]
        except ValueError as error:
            raise SettingsError(f"{key}={self[key]}: whole numbers are wanted, as in {key}=2,4") from error

    def names(self, key: str) -> list[str]:
        return [name.strip() for name in self[key].split(",") if name.strip()]


def main(arguments: Sequence[str]) -> int:
    """Plans the run, checks it, and hands it to its platform; the exit code of the first step that failed."""
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    request = read_request(arguments)
    platform = choose(PLATFORMS, "platform", request["platform"])
    run = run_name(request)
    inputs = platform.check_inputs(inputs_of(request), Path(request["runs"]) / run)
    everything = make_plan(inputs, request.overrides, run, request["runs"], request["recipe"], request.numbers("seeds"))
    plan = select(everything, request.names("stages"), request.numbers("folds"))
    parallel = parallel_of(request)
    for note in plan.notes:
        log.info("%s", note)
    if request.pipeline:
        return pipeline(request, plan, parallel)
    if request.dry_run:
        print(platform.describe(plan, parallel))
        return 0
    platform.check(plan)
    say_what_is_ignored()
    probe_writable(plan.folder)
    local.unpack_ground_truth(inputs, plan.folder)
    local.refuse_strangers(everything)
    write_plan(everything)
    code = platform.launch(plan, parallel)
    print(platform.results(everything))
    return code


def pipeline(request: Request, plan: Plan, parallel: int) -> int:
    """Prints the definition of the plan's Pipeline (--dry-run), or creates or updates it; nothing runs."""
    if request["platform"] != "sagemaker":
        raise SettingsError(f"--pipeline is of platform=sagemaker, and platform={request['platform']} has none")
    if request.dry_run:
        print(sagemaker.describe_pipeline(plan))
        return 0
    return sagemaker.upsert_pipeline(plan, parallel)


def read_request(arguments: Sequence[str]) -> Request:
    """The arguments, parted into submit's own keys and settings; a SettingsError for what is neither."""
    values = arguments_layer([text for text in arguments if text not in FLAGS]).values
    given, overrides = {}, []
    for name, value in values.items():
        key = normal_key(name)
        if key in KEYS:
            given[key] = value
        elif "." not in key and (key not in Settings.model_fields or key in SECTIONS):
            known = [*KEYS, *flatten(Settings())]
            raise SettingsError(f"unknown key {name!r}{did_you_mean(key, known)}; submit --help lists the keys")
        else:
            overrides.append(f"{name}={value}")
    return Request(given, tuple(overrides), *(flag in arguments for flag in FLAGS))


def inputs_of(request: Request) -> Inputs:
    if not request["train"]:
        raise SettingsError("submit needs train=PATH: a folder or a .zip of images")
    if request["ground_truth"] and not request["eval"]:
        log.warning(
            "ground_truth=%s is not used: without eval= no test images are predicted; give eval= too",
            request["ground_truth"],
        )
    return Inputs(
        train=request["train"],
        eval=request["eval"] or None,
        ground_truth=request["ground_truth"] or None,
        unlabeled=request["unlabeled"] or None,
        weights=request["weights"] or None,
    )


def run_name(request: Request) -> str:
    """The run that is asked for, its next number with increment=true, or a name of this second."""
    try:
        increment = value_of(bool, request["increment"])
    except ValueError as error:
        raise SettingsError(f"increment={request['increment']}: {error}") from error
    if increment and not request["run"]:
        raise SettingsError("increment=true needs run=NAME, as in run=exp, for exp, exp2, exp3 and so on")
    return next_run_name(request["run"], Path(request["runs"])) if increment else request["run"] or new_run_name()


def parallel_of(request: Request) -> int:
    """How many steps may run side by side, 0 where the platform chooses."""
    numbers = request.numbers("parallel")
    if request["parallel"] and (len(numbers) != 1 or numbers[0] < 1):
        raise SettingsError(f"parallel={request['parallel']}: a whole number from 1 on is wanted")
    return numbers[0] if numbers else 0


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def say_what_is_ignored() -> None:
    ignored = local.settings_variables(os.environ)
    if ignored:
        log.warning("submit takes settings as arguments; its steps do not see the variables %s", ", ".join(ignored))


def usage() -> str:
    keys = "\n".join(f"  {key:13} {default or '-':6} {meaning}" for key, (default, meaning) in KEYS.items())
    flags = "\n".join(f"  {flag:20} {meaning}" for flag, meaning in FLAGS.items())
    return (
        f"{__doc__}\n\n{keys}\n{flags}\n\n"
        f"platforms: {', '.join(PLATFORMS)}\n\nAny setting (python -m jobs --help lists them) goes on to the stages "
        "that use it, e.g. train.epochs=3 split.folds=4."
    )


def commands(plan: Plan, parallel: int) -> str:
    return describe(plan, shlex.quote(sys.executable))


PLATFORMS = {
    "local": Platform(local.launch, commands, local.check_inputs, results_of),
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
