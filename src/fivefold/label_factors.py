"""Classes that combine factors, such as mask × gender × age; a model can predict some of the factors only.

`classes.json` lists the factor values of each class. A model of some factors has classes named by their values
(`mask+male`); the product of models that together cover all factors predicts the original classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fivefold.errors import DataError
from fivefold.lookup import choose


@dataclass(frozen=True)
class LabelFactors:
    """The `names` of the factors, and for each class its `values`, one per factor; no two classes have the same values."""

    names: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return all classes, sorted by name."""
        return tuple(sorted(self.values))

    def select(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the factors called `names`, in the order of `self.names`; raise a SettingsError for an unknown one."""
        for name in names:
            choose(dict.fromkeys(self.names), "factor", name)
        return tuple(name for name in self.names if name in names)

    def project(self, of_class: str, names: Sequence[str]) -> str:
        """Return the class of a model that predicts only the factors `names`: `mask+male` for class `0`."""
        return "+".join(self.values[of_class][self.names.index(name)] for name in names)

    def projected_classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return all classes of a model that predicts only the factors `names`, sorted by name."""
        return tuple(sorted({self.project(of_class, names) for of_class in self.values}))

    def column_index(self, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
        """Return the index of each of `classes` [C] among the `projected_classes` of `names`: int64 [C]."""
        position = {part: index for index, part in enumerate(self.projected_classes(names))}
        return np.array([position[self.project(of_class, names)] for of_class in classes], np.int64)

    def restrict(self, classes: Sequence[str]) -> "LabelFactors":
        """Return the factors of a subset of the classes."""
        return LabelFactors(self.names, {name: self.values[name] for name in classes})

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return for each factor the value of each class."""
        return {name: {c: self.values[c][index] for c in self.classes} for index, name in enumerate(self.names)}


def parse_factors(content: Any, classes: Sequence[str], where: str) -> LabelFactors:
    """Return the factors that `to_json` wrote; raise a DataError unless they distinguish all `classes`."""
    is_valid = isinstance(content, dict) and content and all(isinstance(values, dict) for values in content.values())
    if not is_valid or any(sorted(values) != sorted(classes) for values in content.values()):
        raise DataError(f"{where}: factors must list a value of each factor for each class; run the split again")
    factors = LabelFactors(tuple(content), {c: tuple(str(content[name][c]) for name in content) for c in classes})
    if len(set(factors.values.values())) < len(classes):
        raise DataError(f"{where}: two classes have the same factors; run the split again")
    return factors
