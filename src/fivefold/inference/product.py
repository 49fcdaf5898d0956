"""Systems that know different factors, joined into all classes: log-probabilities add. No torch.

With mask and gender known by one system and age by another, p(class) = p(mask, gender) · p(age), as if
age were independent of the rest given the image. Systems that know the same factors are averaged first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fivefold.contract.artifacts import ModelDir
from fivefold.errors import DataError
from fivefold.factors import Factors, factors_from
from fivefold.inference.blends import mean
from fivefold.inference.systems import System, same_rows
from fivefold.predictions import Predictions


@dataclass(frozen=True)
class Product:
    """What the classes are made of, and which factors each system knows: all of them, each by one set of systems."""

    factors: Factors
    knows: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """The joined systems in words."""
        return " × ".join(self.knows)

    @property
    def sets(self) -> dict[tuple[str, ...], list[str]]:
        """The systems that know each set of factors."""
        return {knows: [name for name in self.knows if self.knows[name] == knows] for knows in self.knows.values()}

    @property
    def weights(self) -> np.ndarray:
        """What each system's log-probabilities count: 1, or its share among those that know the same factors."""
        return np.array([1 / len(self.sets[knows]) for knows in self.knows.values()])

    def join(self, each: Mapping[str, np.ndarray]) -> np.ndarray:
        """log p float32 [N, classes] from each system's [N, parts], columns in the order of their sorted names.

        Rows are brought to sum 1, which they do of themselves where every combination is a class.
        """
        classes = self.factors.classes
        total = 0.0
        for knows, names in self.sets.items():
            found = mean([each[name] for name in names]).astype(np.float64)
            total = total + found[:, self.factors.columns(knows, classes)]
        return (total - np.logaddexp.reduce(total, axis=1, keepdims=True)).astype(np.float32)

    def table(self, tables: Mapping[str, Predictions]) -> Predictions:
        """The systems' tables of the same rows as one of all classes, with the label that the parts make."""
        first = next(iter(tables.values()))
        ordered = {name: self._in_order(name, table, first.ids, tables) for name, table in tables.items()}
        log_probs = self.join({name: table.log_probs for name, table in ordered.items()})
        return replace(
            first, system=self.name, classes=self.factors.classes, log_probs=log_probs, labels=self._labels(ordered)
        )

    def joined(self, systems: Sequence[System]) -> System:
        """The systems as one; its tables are there where all of them have theirs."""
        tables = [{s.name: getattr(s, kind) for s in systems} for kind in ("oof", "holdout")]
        oof, holdout = (None if None in found.values() else self.table(found) for found in tables)
        chosen = [any(getattr(s, name) for s in systems) for name in ("selected", "folds_selected")]
        return System(self.name, sum(s.models for s in systems), max(s.seeds for s in systems), oof, holdout, *chosen)

    def _in_order(
        self, name: str, table: Predictions, ids: np.ndarray, tables: Mapping[str, Predictions]
    ) -> Predictions:
        if set(ids) != set(table.ids):
            same_rows([next(iter(tables.values())), table])  # says which ids
        return table.with_classes(self.factors.parts(self.knows[name])).in_order(ids)

    def _labels(self, tables: Mapping[str, Predictions]) -> np.ndarray | None:
        if any(table.labels is None for table in tables.values()):
            return None
        names = [systems[0] for systems in self.sets.values()]
        made = {tuple(self.factors.part(c, knows) for knows in self.sets): c for c in self.factors.classes}
        rows = zip(*(tables[name].labels for name in names), strict=True)
        return np.array([made[row] for row in rows], dtype=object)


def product_of(groups: Mapping[str, Sequence[ModelDir]]) -> Product:
    """How systems of models are joined; a DataError, with the names, unless they know all factors, and each but once."""
    first = next(iter(groups.values()))[0]
    for model in (model for models in groups.values() for model in models):
        if not model.info.get("knows") or not model.info.get("factors"):
            raise DataError(
                f"{model.name} knows its classes as they are, not some factors of them, so a product cannot join it; "
                "leave it out, or choose another ensemble.blend"
            )
        if model.info["factors"] != first.info["factors"]:
            raise DataError(
                f"{first.name} and {model.name} know factors of different classes; a product needs models of one split"
            )
    factors = factors_of(first.info)
    knows = {system: _one_set(models) for system, models in groups.items()}
    _check_cover(factors, knows)
    return Product(factors, knows)


def factors_of(info: Mapping[str, Any]) -> Factors:
    """What a `model.json` says that the classes of its split are made of."""
    content = info["factors"]
    return factors_from(content, tuple(next(iter(content.values()))), "model.json")


def needs_product(infos: Sequence[Mapping[str, Any]]) -> bool:
    """Whether models know different factors of their classes, so that nothing but a product joins them."""
    return len({tuple(info.get("knows", ())) for info in infos}) > 1


def _one_set(models: Sequence[ModelDir]) -> tuple[str, ...]:
    first, knows = models[0].name, models[0].info["knows"]
    for model in models[1:]:
        if model.info["knows"] != knows:
            raise DataError(
                f"{first} and {model.name} are of one system but know different factors ({', '.join(knows)}; "
                f"{', '.join(model.info['knows'])}); give one of them another name by system="
            )
    return tuple(knows)


def _check_cover(factors: Factors, knows: Mapping[str, tuple[str, ...]]) -> None:
    owner: dict[str, str] = {}
    for system, names in knows.items():
        for factor in names:
            other = owner.setdefault(factor, system)
            if knows[other] != names:
                raise DataError(
                    f"the factor {factor} is known by {other} ({', '.join(knows[other])}) and by {system} "
                    f"({', '.join(names)}); systems of a product share all their factors, or none"
                )
    missing = [name for name in factors.names if name not in owner]
    if missing:
        raise DataError(
            f"no model knows the factor {', '.join(missing)}, only {', '.join(owner)}; "
            f"train one with model.factors={','.join(missing)}, or choose another ensemble.blend"
        )
