"""Products: combine systems that predict different factors of the classes by adding log-probabilities. No torch.

If one system predicts mask and gender and another age, p(class) = p(mask, gender) · p(age). This assumes that age is
independent of the rest given the image. Systems that predict the same factors are averaged first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from fivefold.contract.artifacts import ModelDir
from fivefold.csv_tables import check_same_ids
from fivefold.errors import DataError
from fivefold.inference.blending import mean
from fivefold.inference.systems import System
from fivefold.label_factors import LabelFactors, parse_factors
from fivefold.predictions import Predictions


@dataclass(frozen=True)
class FactorProduct:
    """The factors of the classes and the factors that each system predicts; each factor belongs to one set of systems."""

    factors: LabelFactors
    known_factors: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """The names of the combined systems, for people."""
        return " × ".join(self.known_factors)

    @property
    def systems_by_factors(self) -> dict[tuple[str, ...], list[str]]:
        """The systems that predict each set of factors."""
        known = self.known_factors
        return {knows: [name for name in known if known[name] == knows] for knows in known.values()}

    @property
    def weights(self) -> np.ndarray:
        """The weight of each system's log-probabilities: 1, or an equal share among systems with the same factors."""
        return np.array([1 / len(self.systems_by_factors[knows]) for knows in self.known_factors.values()])

    def combine(self, log_probs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return log p float32 [N, classes] from each system's [N, parts], with columns sorted by name.

        Rows are normalised to sum 1. If every combination is a class, they already sum to 1.
        """
        total = 0.0
        for knows, names in self.systems_by_factors.items():
            parts = mean([log_probs[name] for name in names]).astype(np.float64)
            total = total + parts[:, self.factors.column_index(knows, self.factors.classes)]
        return (total - np.logaddexp.reduce(total, axis=1, keepdims=True)).astype(np.float32)

    def combine_tables(self, tables: Mapping[str, Predictions]) -> Predictions:
        """Combine the systems' tables of the same rows into one of all classes, with labels made from the parts."""
        first, ordered = next(iter(tables.values())), {}
        for name, table in tables.items():
            check_same_ids(first.ids, f"system {first.system!r}", table.ids, f"system {name!r}")
            classes = self.factors.projected_classes(self.known_factors[name])
            ordered[name] = table.with_classes(classes).reindex(first.ids)
        log_probs, labels = self.combine({name: t.log_probs for name, t in ordered.items()}), self._labels(ordered)
        return replace(first, system=self.name, classes=self.factors.classes, log_probs=log_probs, labels=labels)

    def combine_systems(self, systems: Sequence[System]) -> System:
        """Combine the systems into one; it has a table if all of them have that table."""
        tables = [{s.name: getattr(s, kind) for s in systems} for kind in ("oof", "holdout")]
        oof, holdout = (None if None in by_name.values() else self.combine_tables(by_name) for by_name in tables)
        chosen = [any(getattr(s, name) for s in systems) for name in ("selected", "folds_selected")]
        return System(self.name, sum(s.models for s in systems), max(s.seeds for s in systems), oof, holdout, *chosen)

    def _labels(self, tables: Mapping[str, Predictions]) -> np.ndarray | None:
        if any(table.labels is None for table in tables.values()):
            return None
        names = [systems[0] for systems in self.systems_by_factors.values()]
        class_of = {
            tuple(self.factors.project(c, knows) for knows in self.systems_by_factors): c for c in self.factors.classes
        }
        rows = zip(*(tables[name].labels for name in names), strict=True)
        return np.array([class_of[row] for row in rows], dtype=object)


def build_product(groups: Mapping[str, Sequence[ModelDir]]) -> FactorProduct:
    """Return the product of systems; raise a DataError with the names unless they cover all factors without overlap."""
    first = next(iter(groups.values()))[0]
    knows: dict[str, tuple[str, ...]] = {}
    for system, model in ((system, model) for system, models in groups.items() for model in models):
        if not model.info.get("knows") or not model.info.get("factors"):
            raise DataError(
                f"{model.name} predicts whole classes, not factors, so it cannot be part of a product; "
                "remove the model, or set another ensemble.blend"
            )
        if model.info["factors"] != first.info["factors"]:
            raise DataError(
                f"{first.name} and {model.name} predict factors of different classes; a product needs models of one split"
            )
        own = tuple(model.info["knows"])
        if knows.setdefault(system, own) != own:
            raise DataError(
                f"{model.name} and the other models of its system predict different factors ({', '.join(knows[system])}; "
                f"{', '.join(own)}); rename one of the systems with system="
            )
    factors = read_factors(first.info)
    for (one, names), (other, others) in combinations(knows.items(), 2):
        if names != others and (shared := [name for name in names if name in others]):
            raise DataError(
                f"{one} ({', '.join(names)}) and {other} ({', '.join(others)}) both predict the factor {shared[0]}; systems "
                "of a product must share all their factors, or none"
            )
    predicted = [name for names in knows.values() for name in names]
    if missing := [name for name in factors.names if name not in predicted]:
        raise DataError(
            f"no model predicts the factor {', '.join(missing)}, only {', '.join(dict.fromkeys(predicted))}; "
            f"train one with model.label_factors={','.join(missing)}, or set another ensemble.blend"
        )
    return FactorProduct(factors, knows)


def read_factors(info: Mapping[str, Any]) -> LabelFactors:
    """Read the factors of the split's classes from a `model.json`."""
    content = info["factors"]
    return parse_factors(content, tuple(next(iter(content.values()))), "model.json")


def needs_product(infos: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the models predict different factors, so that only a product can combine them."""
    return len({tuple(info.get("knows", ())) for info in infos}) > 1
