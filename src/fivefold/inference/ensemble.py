"""What may be blended with what: models of one split and the same classes, whole systems. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from fivefold.errors import DataError
from fivefold.inference.product import needs_product


def check_members(members: Sequence[tuple[str, Mapping[str, Any]]], product: bool = False) -> None:
    """Raises a DataError, with the names, unless all members may stand in one ensemble.

    `members`: a name and the `model.json` of each. All must share one split and the same classes (of a
    `product` those that systems of different factors make together); within a system all folds must be there, for every seed, trained with the same settings.
    """
    check_same(members, "split", "come from different splits (folds.parquet)")
    if not product:
        factored = needs_product([info for _, info in members])
        hint = "know different factors of their classes (ensemble.blend=product joins such systems)"
        check_same(members, "classes", hint if factored else "know different classes")
    systems: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, info in members:
        systems.setdefault(info["system"], []).append((name, info))
    for system, models in systems.items():
        _check_settings(system, models)
        _check_folds(system, models)


def check_same(members: Sequence[tuple[str, Mapping[str, Any]]], field: str, problem: str) -> None:
    """Raises a DataError that names the first two members whose `field` differs, and the `problem`."""
    first, expected = members[0][0], members[0][1][field]
    for name, info in members[1:]:
        if info[field] != expected:
            raise DataError(f"{first} and {name} {problem}; an ensemble needs models of one split and the same classes")


def _check_settings(system: str, models: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    first, expected = models[0][0], models[0][1]["training"]
    for name, info in models[1:]:
        other = info["training"]
        differing = sorted(key for key in {*expected, *other} if expected.get(key) != other.get(key))
        if differing:
            raise DataError(
                f"{first} and {name} carry the system's name {system!r} but differ in {', '.join(differing[:5])}; "
                "train them again, or give one of them another name by system="
            )


def _check_folds(system: str, models: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    folds = models[0][1]["folds"]
    for seed in sorted({info["seed"] for _, info in models}):
        there = [info["fold"] for _, info in models if info["seed"] == seed]
        missing = sorted(set(range(folds)) - set(there))
        if missing:
            raise DataError(
                f"system {system!r} with seed {seed} lacks {', '.join(f'fold {fold}' for fold in missing)} of {folds}: "
                "train them first"
            )
        if len(there) > folds:
            raise DataError(f"system {system!r} with seed {seed} has {len(there)} models for {folds} folds")
