"""Plan a recipe for a data set and this machine, and write it with the reason of each choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Table

from fivefold import build
from fivefold.config.recipes import default_system
from fivefold.config.schema import EXECUTION_KEYS, PLATFORM_SECTIONS, Settings
from fivefold.contract.files import atomic
from fivefold.distributed.process_group import SINGLE_PROCESS
from fivefold.errors import MissingInputError, SettingsError
from fivefold.launchers import local
from fivefold.log import log
from fivefold.models.pretrained import find_weights, published
from fivefold.planning import probe
from fivefold.planning.facts import DataFacts
from fivefold.planning.forecast import MEASUREMENTS, Rates, write_measurements
from fivefold.planning.probe import Speed
from fivefold.planning.rules import (
    BATCH_SIZE,
    CANDIDATES,
    DATA_CHOICES,
    RECIPE,
    VIEWS,
    Choice,
    choose,
    size_choices,
    training_size,
)
from fivefold.system import count_cores

SYSTEM = "planned"
"""The name of a planned system."""
RUN_KEYS = ("recipe", "run", "runs", "stage", "fold", "time", "budget", "hourly_price", "on_version_change")
"""Settings of a run or a process, which a recipe does not contain."""


@dataclass(frozen=True)
class Planned:
    """A planned recipe: its settings, the choices with their reasons, and what they are based on."""

    settings: Settings
    choices: Sequence[Choice]
    facts: DataFacts
    speed: Speed
    rates: Rates


def plan_recipe(
    settings: Settings,
    facts: DataFacts,
    train: Path,
    paths: Sequence[str],
    environ: Mapping[str, str],
    weights: Path | None = None,
    decisions: Path | None = None,
) -> Planned:
    """Measure the candidate backbones on images of the data set, and choose the settings that were not set by the user.

    `settings` are the defaults with the user's own; `paths` are images in `train` to measure with; `weights` is the weights
    channel; `decisions` is the folder of the run's decision on the precision. Raise the errors of `find_backbones`.
    """
    gpus = local.list_gpus(environ)
    parallel = local.fold_parallelism(facts.folds, gpus)
    views = settings.predict.tta if _is_set(settings, "predict.tta") else VIEWS
    rates = Rates(parallel, len(gpus) or count_cores(), len(views), bool(gpus))
    settings = _with_choices(settings, DATA_CHOICES)
    backbones = find_backbones(settings, weights)
    candidates = [_candidate(settings, backbone) for backbone in backbones]
    network = build.build_classifier(candidates[0].model, facts.classes)
    precision = build.resolve_precision(candidates[0], network, SINGLE_PROCESS, None, decisions).train.precision
    batch = fitting_batch(_with(candidates[-1], {"train": {"precision": precision}}), facts.classes)
    tried = _with(settings, {"train": {"precision": precision, "batch_size": batch, "freeze_norms": True}})
    tried = _with(tried, {"model": {"pretrained": candidates[0].model.pretrained}})
    sides = {each.model.backbone: each.augment.image_size for each in candidates}
    log.info("measuring %s in %d processes", ", ".join(backbones), rates.at_once)
    threads = 0 if gpus or parallel == 1 else max(1, count_cores() // parallel)
    variables = local.process_variables(environ, gpus[0] if gpus else "", threads)
    speeds = probe.measure(tried, train, paths, sides, 1 if gpus else rates.at_once, variables)
    chosen = choose(speeds, facts, rates, settings.time_limit, settings.limit_words, batch)
    speed = next(speed for speed in speeds if speed.backbone == chosen[0].value)
    offer = published(speed.backbone)
    chosen += size_choices(offer.size if offer else settings.model.size, facts)
    ours = [choice for choice in chosen if not _is_set(settings, choice.key)]
    if settings.system == default_system("default"):
        settings = settings.model_copy(update={"system": SYSTEM})
    return Planned(_with_choices(settings, ours), ours, facts, speed, rates)


def find_backbones(settings: Settings, weights: Path | None) -> list[str]:
    """Return the candidates whose weights are on this machine; if none are, the smallest one, after downloading its weights.

    A backbone that the user has set is the only candidate. Raise a SettingsError for a `weights` channel without a backbone, and
    the error of `find_weights` if there are no weights.
    """
    if _is_set(settings, "model.backbone"):
        build.check_weights(_candidate(settings, settings.model.backbone), weights)
        return [settings.model.backbone]
    if weights is not None or settings.model.weights:
        raise SettingsError("weights are given, but not their network: set model.backbone=FAMILY/NAME too")
    found, errors = [], []
    for backbone in CANDIDATES:
        try:
            find_weights(backbone, "auto", offline=True)
            found.append(backbone)
        except MissingInputError as error:
            errors.append(error)
    if not found and settings.offline:
        raise errors[0]
    if not found:  # download those of the smallest
        first = next(iter(CANDIDATES))
        find_weights(first, "auto")
        found = [first]
    return found


def _with_choices(settings: Settings, choices: Sequence[Choice]) -> Settings:
    """Return the settings with the choices, except for keys that were set."""
    tree = settings.model_dump(mode="json", exclude_unset=True)
    for choice in choices:
        section, key = choice.key.split(".")
        tree.setdefault(section, {}).setdefault(key, choice.value)
    return Settings.model_validate(tree)


def _candidate(settings: Settings, backbone: str) -> Settings:
    """Return the settings of a candidate: image sizes, and a batch of the usual size unless one is set."""
    pretrained = settings.model.pretrained if _is_set(settings, "model.pretrained") else "auto"
    resolved = build.resolve_inputs(_with(settings, {"model": {"backbone": backbone, "pretrained": pretrained}}))
    side = settings.augment.image_size or training_size(min(resolved.model.size))
    batch = settings.train.batch_size if _is_set(settings, "train.batch_size") else BATCH_SIZE
    return _with(resolved, {"augment": {"image_size": side}, "train": {"batch_size": batch}})


def fitting_batch(settings: Settings, classes: int) -> int:
    """Return the batch size of the settings, or the first half, quarter and so on of it that fits the memory.

    Raise a SettingsError if not even one image fits.
    """
    network, batch = build.build_classifier(settings.model, classes), settings.train.batch_size
    while True:
        tried = _with(settings, {"train": {"batch_size": batch}})
        try:
            build.check_memory(network, tried, build.make_training_runtime(tried))
        except SettingsError:
            if batch == 1:
                raise
            batch //= 2
        else:
            return batch


def _is_set(settings: Settings, key: str) -> bool:
    section, name = key.split(".")
    return name in getattr(settings, section).model_fields_set


def _with(settings: Settings, changes: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Return the settings with other values, by section and key."""
    sections = {name: getattr(settings, name).model_copy(update=values) for name, values in changes.items()}
    return settings.model_copy(update=sections)


def write_plan(folder: Path, planned: Planned) -> list[Path]:
    """Write the recipe, and the measurements that its forecast needs; return the files."""
    recipe, measurements = folder / RECIPE, folder / MEASUREMENTS
    with atomic(recipe) as temporary:
        temporary.write_text(to_toml(planned), encoding="utf-8")
    write_measurements(measurements, planned.facts, planned.speed, planned.rates)
    return [recipe, measurements]


def to_toml(planned: Planned) -> str:
    """Return the recipe as TOML: all settings that were set or chosen, each choice below its reason.

    Settings that cannot change a result, such as the folder of caches, are those of a machine, so the recipe has none of them.
    """
    reasons = {choice.key: choice.reason for choice in planned.choices}
    facts = planned.facts
    document = tomlkit.document()
    grouped = f", {facts.groups:,} groups" if facts.groups else ""
    document.add(
        tomlkit.comment(f"Planned for {facts.rows:,} rows of {facts.classes} classes{grouped}, {facts.folds} folds.")
    )
    document.add(tomlkit.comment("Edit it, and give it back as recipe=FILE. docs/recipes.md explains the rules."))
    document.add(tomlkit.nl())
    tree = planned.settings.model_dump(mode="json", exclude_unset=True)
    sections: dict[str, Table] = {}
    for name, value in tree.items():
        if name in (*RUN_KEYS, *PLATFORM_SECTIONS):
            continue
        if not isinstance(value, dict):
            document.add(name, value)
            continue
        table = sections[name] = tomlkit.table()
        for key, item in value.items():
            if item is None or (f"{name}.{key}" in EXECUTION_KEYS and f"{name}.{key}" not in reasons):
                continue
            if reason := reasons.get(f"{name}.{key}"):
                table.add(tomlkit.comment(reason))
            table.add(key, _inline(item))
    for name, table in sections.items():
        document.add(tomlkit.nl())
        document.add(name, table)
    return tomlkit.dumps(document)


def _inline(value: Any) -> Any:
    """Return a value of TOML; a table is written on one line."""
    if isinstance(value, dict):
        table = tomlkit.inline_table()
        for key, item in value.items():
            table.append(key, _inline(item))
        return table
    return [_inline(item) for item in value] if isinstance(value, list) else value
