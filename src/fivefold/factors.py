"""Classes that are made of factors, as mask × gender × age are: a model may know some of them alone.

`classes.json` says what each class is made of; a model of some factors has classes of its own, named
by their values (`mask+male`), and the product of models that know all factors speaks of the classes again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fivefold.choose import choose
from fivefold.errors import DataError, SettingsError

JOINT = "+"


@dataclass(frozen=True)
class Factors:
    """The `names` of the factors, and of each class its `values`, one a factor; no two classes have the same."""

    names: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes, sorted by name."""
        return tuple(sorted(self.values))

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """The factors called `names`, in the order of all; a SettingsError for one that there is not."""
        for name in names:
            choose({known: known for known in self.names}, "factor", name)
        return tuple(name for name in self.names if name in names)

    def part(self, of_class: str, names: Sequence[str]) -> str:
        """The class of a model that knows the factors `names` alone: `mask+male` of class `0`."""
        values = self.values[of_class]
        return JOINT.join(values[self.names.index(name)] for name in names)

    def parts(self, names: Sequence[str]) -> tuple[str, ...]:
        """All classes of a model that knows the factors `names` alone, sorted by name."""
        return tuple(sorted({self.part(of_class, names) for of_class in self.values}))

    def columns(self, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
        """Where each of `classes` [C] stands among the parts of `names`: int64 [C]."""
        position = {part: at for at, part in enumerate(self.parts(names))}
        return np.array([position[self.part(of_class, names)] for of_class in classes], np.int64)

    def only(self, classes: Sequence[str]) -> "Factors":
        """The factors of fewer classes."""
        return Factors(self.names, {name: self.values[name] for name in classes})

    def as_json(self) -> dict[str, dict[str, str]]:
        """For each factor the value of each class."""
        return {name: {c: self.values[c][at] for c in self.classes} for at, name in enumerate(self.names)}


def factors_from(content: Any, classes: Sequence[str], where: str) -> Factors:
    """The factors that `as_json` wrote; a DataError unless they tell the `classes` apart."""
    fine = isinstance(content, dict) and content and all(isinstance(of, dict) for of in content.values())
    if not fine or any(sorted(of) != sorted(classes) for of in content.values()):
        raise DataError(f"{where}: factors must give each class its value of each factor; run the split again")
    names = tuple(content)
    found = Factors(names, {c: tuple(str(content[name][c]) for name in names) for c in classes})
    if len(set(found.values.values())) < len(classes):
        raise DataError(f"{where}: two classes have the same factors; run the split again")
    return found


def must_be_factored(factors: Factors | None, names: Sequence[str]) -> Factors:
    """The factors of a split; a SettingsError when a model is to know some and the split has none."""
    if factors is None:
        raise SettingsError(
            f"model.factors={','.join(names)}, but the classes of this split are not made of factors; "
            "leave it empty, or split with a layout that has factors (data.layout=mask_profiles)"
        )
    return factors
