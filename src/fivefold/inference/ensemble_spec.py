"""An ensemble: which models can be combined, how they are blended, and the content of `ensemble.json`. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fivefold.contract.artifacts import ModelDir
from fivefold.contract.files import read_json
from fivefold.contract.stage_specs import ENSEMBLE
from fivefold.errors import DataError
from fivefold.evaluation.metrics import apply_temperature
from fivefold.inference.blending import apply_blend, equal_weights
from fivefold.inference.factor_product import needs_product
from fivefold.log import log


@dataclass(frozen=True)
class EnsembleSpec:
    """Trained models and submission files that predict together.

    `systems`: the models of each system by its name, with equal weights inside a system. `files`: submission files by
    name; each is a system and comes after `systems`. `weights` [systems + files]. `within` and `between`: the names of
    the blends inside a system and between systems.
    """

    systems: Mapping[str, Sequence[ModelDir]]
    weights: tuple[float, ...]
    temperature: float = 1.0
    within: str = "mean"
    between: str = "mean"
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def models(self) -> list[ModelDir]:
        return [model for group in self.systems.values() for model in group]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.models[0].info["classes"])

    @property
    def model_weights(self) -> list[float]:
        """The weight of each of `models`: an equal share of its system's weight."""
        groups = zip(self.systems.values(), self.weights, strict=False)
        return [weight / len(group) for group, weight in groups for _ in group]

    def blend(self, log_probs: Sequence[np.ndarray]) -> np.ndarray:
        """Blend the log-probabilities [N, C] of each of `models` into float32 [N, C]."""
        rest = iter(log_probs)
        groups = [[next(rest) for _ in group] for group in self.systems.values()]
        systems = [apply_blend(self.within, group) for group in groups]
        return apply_temperature(apply_blend(self.between, systems, np.array(self.weights)), self.temperature)

    def describe(self, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the ensemble's content of `ensemble.json`, with the `scores`."""
        weights = {n: round(w, 9) for n, w in zip([*self.systems, *self.files], self.weights, strict=True)}
        members = [
            {"system": model.system, "model": model.name, "weight": round(weight, 9), "best": model.info["best"]}
            | ({"selected_on": model.info["selected_on"]} if model.info.get("selected_on") else {})
            for model, weight in zip(self.models, self.model_weights, strict=True)
        ]
        members += [{"system": n, "model": f"file {path.name}", "weight": weights[n]} for n, path in self.files.items()]
        facts = {"within": self.within, "blend": self.between, "members": members, "weights": weights}
        return facts | {"temperature": self.temperature, "scores": list(scores)}


def group_by_system(models: Sequence[ModelDir]) -> dict[str, list[ModelDir]]:
    """Group the models by their system's name; a student is its own system."""
    groups: dict[str, list[ModelDir]] = {}
    for model in models:
        groups.setdefault(model.system, []).append(model)
    return groups


def find_ensemble(models: Sequence[ModelDir], paths: Sequence[Path], required: bool = False) -> EnsembleSpec:
    """Return the models' ensemble from one of the `ensemble.json` at `paths`; without a match, weigh systems equally.

    Raise a DataError unless there is one model or all models are complete systems of one split. Raise it too if several
    files blend these models differently, or if a file is `required` and none blends these models.
    """
    if len(models) > 1:
        check_combinable(models)
    ensembles = {path: spec for path in paths if (spec := read_ensemble(path, models))}
    if required and not ensembles:
        names = ", ".join(model.name for model in models)
        raise DataError(f"{', '.join(map(str, paths))} blends other models; the models here are {names}")
    if not ensembles:
        systems = group_by_system(models)
        return EnsembleSpec(systems, tuple(equal_weights(len(systems)).tolist()))
    path, ensemble = next(iter(ensembles.items()))
    if any(other != ensemble for other in ensembles.values()):
        raise DataError(
            f"several {ENSEMBLE} for these models ({', '.join(map(str, ensembles))}) differ in weights or temperature; "
            "pass the folder of a single run"
        )
    log.info("%d models with the weights and the temperature %.4g of %s", len(models), ensemble.temperature, path)
    return ensemble


def read_ensemble(path: Path, models: Sequence[ModelDir]) -> EnsembleSpec | None:
    """Read the ensemble of exactly these models from an `ensemble.json`; None if it lists others, a DataError if invalid."""
    facts, systems = read_json(path), group_by_system(models)
    try:
        members = sorted((member["system"], member["model"]) for member in facts["members"])
        if members != sorted((model.system, model.name) for model in models):
            return None
        weights = tuple(float(facts["weights"][name]) for name in systems)
        blends = [str(facts.get(key, "mean")) for key in ("within", "blend")]
        return EnsembleSpec(systems, weights, float(facts["temperature"]), *blends)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} does not describe an ensemble: {error!r}; rerun ensemble, or remove the file"
        ) from error


def check_combinable(models: Sequence[ModelDir], product: bool = False) -> None:
    """Raise a DataError with the names unless the models are one student, or fold models that `check_members` accepts."""
    if models[0].info["role"] == "fold":
        check_members(models, product)
    elif len(models) > 1 and not product:
        names = ", ".join(model.name for model in models)
        raise DataError(f"several students ({names}); pass the model directory of one")


def check_members(models: Sequence[ModelDir], product: bool = False) -> None:
    """Raise a DataError with the names unless all fold models can form one ensemble.

    All must share one split and the same classes. In a `product`, systems may predict different factors of the classes.
    Within a system every seed must have all folds, and all models must have the same settings.
    """
    check_equal_field(models, "split", "come from different splits (folds.parquet)")
    if not product:
        factored = needs_product([model.info for model in models])
        hint = "predict different factors of their classes (ensemble.blend=product combines such systems)"
        check_equal_field(models, "classes", hint if factored else "predict different classes")
    for system, group in group_by_system(models).items():
        first, expected, folds = group[0], group[0].info["training"], group[0].info["folds"]
        for model in group[1:]:
            other = model.info["training"]
            if differing := sorted(key for key in {*expected, *other} if expected.get(key) != other.get(key)):
                raise DataError(
                    f"{first.name} and {model.name} both belong to system {system!r} but differ in "
                    f"{', '.join(differing[:5])}; retrain them, or rename one of the systems with system="
                )
        for seed in sorted({model.info["seed"] for model in group}):
            trained = {model.info["fold"] for model in group if model.info["seed"] == seed}
            if missing := sorted(set(range(folds)) - trained):
                raise DataError(
                    f"system {system!r} with seed {seed} lacks {', '.join(f'fold {fold}' for fold in missing)} of {folds}: "
                    "train the missing folds first"
                )


def check_equal_field(models: Sequence[ModelDir], field: str, problem: str) -> None:
    """Raise a DataError with the first two models that differ in `field`, and the `problem`."""
    first = models[0]
    for model in models[1:]:
        if model.info[field] != first.info[field]:
            raise DataError(
                f"{first.name} and {model.name} {problem}; the models of an ensemble must share one split and the same classes"
            )
