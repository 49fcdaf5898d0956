"""The plan of a run: its steps in order. A step is a stage with arguments and SM_* variables.

    split ─► fold-0 … fold-K ─► ensemble ─► evaluate
                     └────────► distill ─► ensemble-student ─► evaluate-student

With `train.linear_first`, linear probes come before the folds; their ensemble and report are in the folders of the
final ones, which replace them.

    split ─► linear-fold-0 … ─► linear-ensemble ─► linear-evaluate ─► fold-0 …

A step's files are in `<runs>/<run>/<step>/{model,output,checkpoints}`. A plan is data: platforms
run it, `--dry-run` prints it, and `status` reads it.
"""

import itertools
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fivefold.config.loading import arguments_layer, in_sections, load, normalize_key
from fivefold.config.schema import Settings
from fivefold.contract.run_layout import channel_paths, output_variables
from fivefold.contract.s3.urls import is_url, parse
from fivefold.contract.stage_specs import RECORD, STAGES
from fivefold.errors import SettingsError
from fivefold.lookup import choose

PLAN = "plan.json"
LINEAR = "linear"
"""The folder of the linear probes of `train.linear_first`."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run: paths as the user wrote them, None if not set.

    `truth_unknown`: a ground truth may exist beside eval's test.csv, in a folder that only the stages can read.
    """

    train: str
    eval: str | None = None
    ground_truth: str | None = None
    unlabeled: str | None = None
    weights: str | None = None
    truth_unknown: bool = False

    def paths(self) -> list[tuple[str, str]]:
        """Return the name and the path of each input that is set. Raise a SettingsError for an invalid URL."""
        paths = [(name, path) for name, path in vars(self).items() if isinstance(path, str) and path]
        for name, path in paths:
            if is_url(path):
                parse(path, name)
        return paths


@dataclass(frozen=True)
class Step:
    """One process: `python -m fivefold.jobs <command>` with `environment`, after the steps it needs.

    `epochs` is the maximum number of epochs of a training step, 0 for other steps. `fold` is set if the step trains a
    fold, `seed` if it trains a model. `all_cores`: no other step runs beside it. `timed`: a limit of the run's time
    shortens it.
    """

    name: str
    stage: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    needs: tuple[str, ...]
    epochs: int = 0
    fold: int | None = None
    seed: int | None = None
    all_cores: bool = False
    timed: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """Return the stage and all its arguments, with the fold."""
        fold = () if self.fold is None else (f"FOLD={self.fold}",)
        return (self.stage, *self.arguments, *fold)


@dataclass(frozen=True)
class Plan:
    """A run's steps in the order of their dependencies, notes on omitted steps, and the settings of the run.

    `made`: the time of `time.monotonic()` when it was made. `expected`: the seconds of each step by a forecast, if there is one.
    """

    run: str
    folder: Path
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings, repr=False, compare=False)
    made: float = field(default_factory=time.monotonic, repr=False, compare=False)
    expected: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)


def make_plan(
    inputs: Inputs,
    overrides: Sequence[str] = (),
    run: str = "",
    runs: str = "runs",
    recipe: str = "",
    seeds: Sequence[int] = (),
    local: bool = False,
) -> Plan:
    """Return the plan of all stages for `recipe`, with `overrides` (KEY=VALUE) for the stages that use them.

    `local`: the steps run on this machine, the only one with `time` and `train.linear_first`.

    Raise a SettingsError for an invalid name, key or value before anything runs.
    """
    run = run or new_run_name()
    if not RUN_NAME.fullmatch(run):
        raise SettingsError(
            f"run={run[:200]!r} must be a folder name: at most 150 letters, digits, '.', '_' and '-', not starting with '.'"
        )
    settings = _load_settings(overrides, recipe, seeds)
    if (limit := settings.limit_words) and not local:
        raise SettingsError(f"{limit} limits a run on this machine only: set platform=local, or no limit")
    builder = _Builder(Path(runs) / run, inputs, settings, tuple(overrides), recipe, tuple(seeds), local)
    if settings.train.linear_first and settings.train.method != "linear_probe":
        builder.linear_first = local
        builder.notes += [] if local else ["train.linear_first: the plan omits linear probes; they need platform=local"]
    builder.build()
    return Plan(run, builder.folder, tuple(builder.steps), tuple(builder.notes), settings)


def make_planning(inputs: Inputs, overrides: Sequence[str], run: str, runs: str) -> Plan:
    """Return the plan of the two steps that come before a planned recipe: split and plan."""
    settings = _load_settings(overrides, "", ())
    builder = _Builder(Path(runs) / run, inputs, settings, tuple(overrides), "", ())
    builder.add_split()
    builder.add("plan", "plan", {"train": inputs.train, "weights": inputs.weights}, ("split",))
    return Plan(run, builder.folder, tuple(builder.steps), (), settings)


def new_run_name() -> str:
    """Return `run_YYYYMMDD_HHMMSS_<id8>` for the current local time."""
    return f"run_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:8]}"


def next_run_name(name: str, runs: Path) -> str:
    """Return the first of `name`, `name2`, `name3`, … that does not exist in `runs`."""
    names = itertools.chain([name], (f"{name}{number}" for number in itertools.count(2)))
    return next(candidate for candidate in names if not (runs / candidate).exists())


def select(plan: Plan, stages: Sequence[str] = (), folds: Sequence[int] = ()) -> Plan:
    """Return the plan with only the steps that `stages` (names of stages or steps) and `folds` select.

    `distill`, or their own names, select the student's ensemble and evaluation. `folds` alone
    selects split and the training of these folds, and no stage that needs all folds.
    """
    for name in stages:
        choose(dict.fromkeys([*STAGES, *(step.name for step in plan.steps)]), "stage", name)
    present = sorted({step.fold for step in plan.steps if step.fold is not None})
    if absent := [str(fold) for fold in folds if fold not in present]:
        raise SettingsError(f"folds={','.join(absent)}: the run has the folds {present[0]} to {present[-1]}")
    stages = stages or (("split", "train-fold") if folds else ())

    def is_selected(step: Step) -> bool:
        if folds and step.fold not in (None, *folds):
            return False
        by_stage = step.stage in stages and (not step.name.endswith("-student") or "distill" in stages)
        return not stages or step.name in stages or by_stage

    selected = {step.name: step for step in plan.steps if is_selected(step)}
    if not selected:
        raise SettingsError(f"stages={','.join(stages)} selects no step of this run; {', '.join(plan.notes)}")
    steps = (replace(step, needs=tuple(name for name in step.needs if name in selected)) for step in selected.values())
    return replace(plan, steps=tuple(steps))


def without(plan: Plan, names: Sequence[str]) -> Plan:
    """Return the plan without some steps, which have ended."""
    kept = [step for step in plan.steps if step.name not in names]
    steps = (replace(step, needs=tuple(need for need in step.needs if need not in names)) for step in kept)
    return replace(plan, steps=tuple(steps))


@dataclass
class _Builder:
    """Build the steps of one run in order, and notes on omitted steps."""

    folder: Path
    inputs: Inputs
    settings: Settings
    overrides: tuple[str, ...]
    recipe: str
    seeds: tuple[int, ...]
    local: bool = False
    linear_first: bool = False
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def build(self) -> None:
        inputs, split = self.inputs, self.settings.split
        self.add_split()
        images = {"train": inputs.train, "weights": inputs.weights}
        seeds = self.seeds or (self.settings.seed,)
        linear = self._add_linear(images, seeds[0]) if self.linear_first else ()
        # The first linear probe computes the features of all images, with all cores.
        folds, first, probes = [], (), self.local and self.settings.train.method == "linear_probe"
        for seed in seeds:
            for fold in range(self._folds):
                name = f"fold-{fold}" if seed == seeds[0] else f"fold-{fold}-seed-{seed}"
                needs = ("split", *(linear[-1:] or first))
                alone = probes and not folds
                epochs = self.settings.train.epochs
                self.add(name, "train-fold", images, needs, epochs, fold, seed, timed=True, all_cores=alone)
                folds.append(name)
                first = (name,) if alone else first
        teachers = (*linear, *folds)
        self._add_scores("ensemble", "evaluate", str(self.folder), teachers)
        if not inputs.eval:
            self.notes.append("no eval=: no test images to predict; evaluate reports on out-of-fold and holdout rows")
        elif not inputs.ground_truth and not inputs.truth_unknown:
            self.notes.append("no ground truth for eval: evaluate reports on out-of-fold and holdout rows")
        if split.ratios and self.settings.distill.teacher == "oof":
            self.notes.append(
                "split.ratios leaves no out-of-fold teacher: the plan omits distill; distill.teacher=best_fold includes it"
            )
            return
        images = {"train": inputs.train, "unlabeled": inputs.unlabeled, "weights": inputs.weights}
        self.add("distill", "distill", images, teachers, self.settings.student().train.epochs, seed=seeds[0])
        self._add_scores("ensemble-student", "evaluate-student", str(self.folder / "distill" / "model"), ("distill",))

    def add_split(self) -> None:
        self.add("split", "split", {"train": self.inputs.train, "eval": self.inputs.eval})

    @property
    def _folds(self) -> int:
        return 1 if self.settings.split.ratios else self.settings.split.folds

    def _add_linear(self, images: Mapping[str, str | None], seed: int) -> tuple[str, ...]:
        """Add the linear probes of all folds, their ensemble and their evaluation; return their names.

        The first fold computes the features of all images, with all cores. A result that exists is not replaced.
        """
        arguments = (f"system={self.settings.system}_linear", "train.method=linear_probe")
        names: list[str] = []
        for fold in range(self._folds):
            name, folder = f"linear-fold-{fold}", self.folder / LINEAR / f"fold-{fold}"
            needs = ("split", *names[:1])
            self.add(name, "train-fold", images, needs, 1, fold, seed, folder, arguments, all_cores=fold == 0)
            names.append(name)
        result = "ensemble" if self.inputs.eval else "evaluate"
        if not (self.folder / result / "output" / RECORD).is_file():
            model, before = str(self.folder / LINEAR), len(self.steps)
            self._add_scores("linear-ensemble", "linear-evaluate", model, tuple(names))
            names += [step.name for step in self.steps[before:]]
        return tuple(names)

    def _add_scores(self, ensemble: str, evaluate: str, model: str, needs: tuple[str, ...]) -> None:
        """Add the ensemble of the models below `model`, if there are test images or several systems, and its evaluation.

        A student has no out-of-fold rows, so it cannot be evaluated without ground truth and holdout.
        """
        inputs, split = self.inputs, self.settings.split
        channels = {"train": inputs.train, "model": model, "predictions": None}
        if inputs.eval or (self.linear_first and ensemble == "ensemble"):
            folder = self.folder / ensemble.removeprefix(f"{LINEAR}-")
            self.add(ensemble, "ensemble", {"model": model, "eval": inputs.eval}, needs, folder=folder)
            channels |= {"predictions": str(folder / "output"), "eval": inputs.eval}
            channels |= {"ground_truth": inputs.ground_truth}
            needs = (ensemble,)
        truth = inputs.eval and (inputs.ground_truth or inputs.truth_unknown)
        if evaluate != "evaluate-student" or truth or split.holdout > 0 or (split.ratios and split.ratios[2]):
            folder = self.folder / evaluate.removeprefix(f"{LINEAR}-")
            self.add(evaluate, "evaluate", channels, needs, folder=folder)
        else:
            self.notes.append(f"no ground truth for eval and no holdout: the plan omits {evaluate}")

    def add(
        self,
        name: str,
        stage: str,
        channels: Mapping[str, str | None],
        needs: tuple[str, ...] = (),
        epochs: int = 0,
        fold: int | None = None,
        seed: int | None = None,
        folder: Path | None = None,
        extra: Sequence[str] = (),
        **options: bool,
    ) -> None:
        """Add a step. `channels` extend or replace the channels that its stage reads from the run, `extra` its arguments.

        `options` are those of the Step.
        """
        folder = folder or self.folder / name
        paths = {**channel_paths(stage, str(self.folder)), **channels}
        environment = {f"SM_CHANNEL_{channel.upper()}": path for channel, path in paths.items() if path}
        environment |= output_variables(stage, str(folder))
        sections = (*STAGES[stage].sections, "on_version_change")
        arguments = [f"recipe={self.recipe}"] if self.recipe else []
        if name == "evaluate-student" and self.inputs.truth_unknown:
            arguments.append("evaluate.allow_empty=true")
        arguments += [text for text in self.overrides if in_sections(_key(text), sections)]
        if self.seeds and seed is not None:
            arguments.append(f"seed={seed}")
        arguments += extra
        self.steps.append(
            Step(name, stage, tuple(arguments), environment, folder, tuple(needs), epochs, fold, seed, **options)
        )


def _load_settings(overrides: Sequence[str], recipe: str, seeds: Sequence[int]) -> Settings:
    """Load the settings from the arguments, so that a typo fails before the first step."""
    for key in map(_key, overrides):
        if key in ("stage", "fold"):
            raise SettingsError(f"{key}=: for a run use {key}s=")
        if key == "seed" and seeds:
            raise SettingsError("seed= and seeds= are both set; give one of them")
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds={','.join(map(str, seeds))}: duplicate seed")
    return load([arguments_layer([*overrides, *([f"recipe={recipe}"] if recipe else [])])])


def _key(override: str) -> str:
    return normalize_key(override.split("=", 1)[0])
