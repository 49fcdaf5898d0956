"""The plan of a run: its steps in order, each a stage with arguments and SM_* variables.

    split ─► fold-0 … fold-K ─► ensemble ─► evaluate
                     └────────► distill ─► ensemble-student ─► evaluate-student

A step's files lie in `<runs>/<run>/<step>/{model,output,checkpoints}`. A plan is data: platforms
run it, `--dry-run` prints it, and `status` reads it.
"""

import itertools
import re
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fivefold.choose import did_you_mean
from fivefold.contract.layout import channels_of, outputs_of
from fivefold.contract.stages import STAGES
from fivefold.errors import SettingsError
from fivefold.recipe import Settings
from fivefold.settings import arguments_layer, is_of, load, normal_key

PLAN = "plan.json"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SAID_OTHERWISE = {"stage": "stages=", "fold": "folds="}


@dataclass(frozen=True)
class Inputs:
    """What a run is given: paths as the user wrote them, None where not given."""

    train: str
    eval: str | None = None
    ground_truth: str | None = None
    unlabeled: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Step:
    """One process: `python -m jobs <command>` with `environment`, after the steps it needs.

    `epochs` is how many a training step takes at most, 0 for other steps. `fold` is set where a step trains a fold,
    `seed` where it trains a model.
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

    @property
    def command(self) -> tuple[str, ...]:
        """The stage and all its arguments, with the fold."""
        fold = () if self.fold is None else (f"FOLD={self.fold}",)
        return (self.stage, *self.arguments, *fold)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class Plan:
    """A run's steps in an order that respects their needs, notes on what was left out, and the settings it was made of."""

    run: str
    folder: Path
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings, repr=False, compare=False)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)


def make_plan(
    inputs: Inputs,
    overrides: Sequence[str] = (),
    run: str = "",
    runs: str = "runs",
    recipe: str = "",
    seeds: Sequence[int] = (),
) -> Plan:
    """The plan of all stages for `recipe`, with `overrides` (KEY=VALUE) passed to the stages that use them.

    Raises SettingsError for a bad name, key or value before anything runs.
    """
    run = run or new_run_name()
    if not RUN_NAME.fullmatch(run):
        raise SettingsError(f"run={run!r} names a folder: letters, digits, '.', '_' and '-', not starting with '.'")
    settings = _checked(overrides, recipe, seeds)
    builder = _Builder(Path(runs) / run, inputs, settings, tuple(overrides), recipe, tuple(seeds))
    steps = tuple(builder.steps())
    return Plan(run, builder.folder, steps, tuple(builder.notes()), settings)


def new_run_name() -> str:
    """`run_YYYYMMDD_HHMMSS_<id8>`, of this second's local time."""
    return f"run_{time.strftime('%Y%m%d_%H%M%S')}_{uuid.uuid4().hex[:8]}"


def next_run_name(name: str, runs: Path) -> str:
    """`name`, or the first of `name2`, `name3`, … that stands not yet in `runs`."""
    names = itertools.chain([name], (f"{name}{number}" for number in itertools.count(2)))
    return next(each for each in names if not (runs / each).exists())


def select(plan: Plan, stages: Sequence[str] = (), folds: Sequence[int] = ()) -> Plan:
    """The plan with only the steps that `stages` (stages' or steps' names) and `folds` ask for.

    The student's ensemble and evaluation come with `distill`, or by their own names. `folds` alone
    means these folds' training, and no stage that would want all of them.
    """
    _check_names(plan, stages, folds)
    if folds and not stages:
        stages = ("split", "train-fold")
    kept = [step for step in plan.steps if _wanted(step, stages, folds)]
    if not kept:
        raise SettingsError(f"no step of this run is left by stages={','.join(stages)}; {', '.join(plan.notes)}")
    names = {step.name for step in kept}
    steps = tuple(replace(step, needs=tuple(n for n in step.needs if n in names)) for step in kept)
    return replace(plan, steps=steps)


def describe(plan: Plan, python: str = "python") -> str:
    """The plan as text that a shell would take: comments, and each step's command with its variables."""
    blocks = [f"# run {plan.run} in {plan.folder}"]
    blocks += [f"# {note}" for note in plan.notes]
    for step in plan.steps:
        after = f", after {', '.join(step.needs)}" if step.needs else ""
        variables = [f"{name}={shlex.quote(value)}" for name, value in step.environment.items()]
        command = shlex.join([python, "-m", "jobs", *step.command])
        blocks.append(f"\n# {step.name}{after}\n" + " \\\n  ".join([*variables, command]))
    return "\n".join(blocks)


def number_of_folds(settings: Settings) -> int:
    """K for k folds; 1 where rows are parted by shares."""
    return 1 if settings.split.parts else settings.split.folds


@dataclass(frozen=True)
class _Builder:
    """What every step of one run is made of."""

    folder: Path
    inputs: Inputs
    settings: Settings
    overrides: tuple[str, ...]
    recipe: str
    seeds: tuple[int, ...]

    def steps(self) -> Iterator[Step]:
        yield self._step("split", "split", {"train": self.inputs.train})
        folds = list(self._folds())
        yield from folds
        names = tuple(step.name for step in folds)
        scored = self._scored("ensemble", "evaluate", str(self.folder), names)
        yield from scored
        if not self._has_teachers():
            return
        yield self._student(names)
        if self._student_can_be_scored():
            model = str(self.folder / "distill" / "model")
            yield from self._scored("ensemble-student", "evaluate-student", model, ("distill",))

    def notes(self) -> Iterator[str]:
        """What the plan leaves out, and why."""
        if not self.inputs.eval:
            yield "no eval=: no ensemble of test images; evaluate reports on out-of-fold and holdout rows"
        elif not self.inputs.ground_truth:
            yield "no ground truth for eval: evaluate reports on out-of-fold and holdout rows"
        if not self._has_teachers():
            yield "split.parts leaves training rows without out-of-fold teachers, so distill is left out; distill.teacher=best_fold takes it in"
        elif not self._student_can_be_scored():
            yield "no eval= and no holdout: nothing to score the student on, so evaluate-student is left out"

    def _folds(self) -> Iterator[Step]:
        for seed in self.seeds or (self.settings.seed,):
            for fold in range(number_of_folds(self.settings)):
                name = f"fold-{fold}" if seed == self._first_seed() else f"fold-{fold}-seed-{seed}"
                channels = {"train": self.inputs.train, "weights": self.inputs.weights}
                epochs = self.settings.train.epochs
                yield self._step(name, "train-fold", channels, ("split",), epochs, fold, seed)

    def _student(self, teachers: tuple[str, ...]) -> Step:
        given = {"train": self.inputs.train, "unlabeled": self.inputs.unlabeled, "weights": self.inputs.weights}
        epochs = self.settings.student().train.epochs
        return self._step("distill", "distill", given, teachers, epochs, seed=self._first_seed())

    def _scored(self, ensemble: str, evaluate: str, model: str, needs: tuple[str, ...]) -> list[Step]:
        """The prediction of the eval images by the models below `model`, where there is an eval; its evaluation."""
        steps = []
        given = {"train": self.inputs.train, "model": model, "predictions": None}
        if self.inputs.eval:
            steps.append(self._step(ensemble, "ensemble", {"model": model, "eval": self.inputs.eval}, needs=needs))
            given |= {"predictions": str(self.folder / ensemble / "output"), "eval": self.inputs.eval}
            given |= {"ground_truth": self.inputs.ground_truth}
            needs = (ensemble,)
        return [*steps, self._step(evaluate, "evaluate", given, needs=needs)]

    def _step(
        self,
        name: str,
        stage: str,
        channels: Mapping[str, str | None],
        needs: tuple[str, ...] = (),
        epochs: int = 0,
        fold: int | None = None,
        seed: int | None = None,
    ) -> Step:
        """The step; `channels` beside those that its stage reads of the run, or instead of them."""
        folder = self.folder / name
        paths = {**channels_of(stage, str(self.folder)), **channels}
        environment = {f"SM_CHANNEL_{channel.upper()}": path for channel, path in paths.items() if path}
        environment |= outputs_of(stage, str(folder))
        recipe = (f"recipe={self.recipe}",) if self.recipe else ()
        own = tuple(text for text in self.overrides if is_of(_key(text), (*STAGES[stage].sections, "reuse")))
        seeded = (f"seed={seed}",) if self.seeds and seed is not None else ()
        return Step(name, stage, (*recipe, *own, *seeded), environment, folder, needs, epochs, fold, seed)

    def _first_seed(self) -> int:
        return self.seeds[0] if self.seeds else self.settings.seed

    def _has_teachers(self) -> bool:
        """Whether each training row has a teacher: with parts, none is out-of-fold."""
        return not (self.settings.split.parts and self.settings.distill.teacher == "oof")

    def _student_can_be_scored(self) -> bool:
        set_aside = self.settings.split.holdout > 0 or bool(self.settings.split.parts and self.settings.split.parts[2])
        return bool(self.inputs.eval) or set_aside


def _checked(overrides: Sequence[str], recipe: str, seeds: Sequence[int]) -> Settings:
    """The settings that the arguments give, so that a typo fails before the first step."""
    for text in overrides:
        if _section(text) in SAID_OTHERWISE:
            raise SettingsError(f"{text}: a run takes {SAID_OTHERWISE[_section(text)]}")
    if seeds and any(_section(text) == "seed" for text in overrides):
        raise SettingsError("seed= and seeds= are both given; give one of them")
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds={','.join(map(str, seeds))}: a seed stands there twice")
    chosen = [f"recipe={recipe}"] if recipe else []
    return load([arguments_layer([*overrides, *chosen])])


def _section(override: str) -> str:
    return _key(override).split(".")[0]


def _key(override: str) -> str:
    return normal_key(override.split("=", 1)[0])


def _check_names(plan: Plan, stages: Sequence[str], folds: Sequence[int]) -> None:
    known = [*STAGES, *(step.name for step in plan.steps)]
    for name in stages:
        if name not in known:
            raise SettingsError(
                f"stages: unknown stage {name!r}{did_you_mean(name, known)}; known: {', '.join(STAGES)}"
            )
    there = sorted({step.fold for step in plan.steps if step.fold is not None})
    absent = [str(fold) for fold in folds if fold not in there]
    if absent:
        raise SettingsError(f"folds={','.join(absent)}: the run has the folds {there[0]} to {there[-1]}")


def _wanted(step: Step, stages: Sequence[str], folds: Sequence[int]) -> bool:
    if folds and step.fold is not None and step.fold not in folds:
        return False
    if not stages or step.name in stages:
        return True
    of_student = step.name.endswith("-student")
    return step.stage in stages and (not of_student or "distill" in stages)
