"""Photographs of people: `<id>_<gender>_<race>_<age>/{mask1..mask5,incorrect_mask,normal}.<ext>`.

A class is mask × gender × age as one number: `(mask · 2 + gender) · ages + age`, which is
`mask · 6 + gender · 3 + age` for the usual three ages.
"""

import bisect
import logging
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from fivefold.data.tables import few
from fivefold.errors import DataError
from fivefold.factors import Factors

log = logging.getLogger("fivefold")

MASKS = ("mask", "incorrect", "normal")
GENDERS = ("male", "female")
STEMS = {**{f"mask{number}": 0 for number in range(1, 6)}, "incorrect_mask": 1, "normal": 2}
"""What a file is called, without its suffix -> its place in MASKS."""
NAMED = "<id>_<gender>_<race>_<age>"


@dataclass(frozen=True)
class Profiles:
    """N photographs: `paths`, class names `labels` and the `people` they show, [N] each; what the classes are made of."""

    paths: list[str]
    labels: list[str]
    people: list[str]
    factors: Factors


def are_profiles(names: Sequence[str], level: str) -> bool:
    """Whether most folders below `level` that hold images are named as profiles, and images in them as theirs."""
    inside = list(_inside(names, level))
    known = {folder for _, folder, stem in inside if stem in STEMS}
    right = sum(_parsed(folder) is not None for folder in known)
    return 2 * right > len({folder for _, folder, _ in inside})


def read_profiles(names: Sequence[str], level: str, age_cuts: Sequence[float], where: str) -> Profiles:
    """The photographs among the image `names` below `level`; those of other names are left out, with a warning.

    Raises a DataError that names folders which are no profiles, or whose age is no number.
    """
    inside = list(_inside(names, level))
    folders = {folder: _parsed(folder) for folder in sorted({folder for _, folder, _ in inside})}
    _refuse(folders, where)
    kept = [(name, *folders[folder], STEMS[stem]) for name, folder, stem in inside if stem in STEMS]
    left = len(names) - len(kept)
    if left:
        odd = sorted(set(names) - {name for name, *_ in kept})
        log.warning("data: %d images are none of %s and are left out: %s", left, ", ".join(STEMS), few(odd))
    factors = profile_factors(age_cuts)
    ages = len(age_cuts) + 1
    labels = [
        str(label_of(mask, GENDERS.index(gender), age_class(int(age), age_cuts), ages))
        for _, _, gender, age, mask in kept
    ]
    return Profiles([name for name, *_ in kept], labels, [person for _, person, *_ in kept], factors)


def label_of(mask: int, gender: int, age: int, ages: int = 3) -> int:
    """The number of a class from the places of its factors, of which there are 3, 2 and `ages`."""
    return (mask * len(GENDERS) + gender) * ages + age


def age_class(age: float, cuts: Sequence[float]) -> int:
    """How many of the ascending `cuts` an age has reached: with 30 and 60, 29 is 0, 30 is 1, 60 is 2."""
    return bisect.bisect_right(cuts, age)


def profile_factors(age_cuts: Sequence[float]) -> Factors:
    """Mask, gender and age of every class, those that no photograph shows among them."""
    ages = [f"<{cut:g}" for cut in age_cuts] + [f">={age_cuts[-1]:g}"]
    combinations = product(enumerate(MASKS), enumerate(GENDERS), enumerate(ages))
    values = {
        str(label_of(m, g, a, len(ages))): (mask, gender, age) for (m, mask), (g, gender), (a, age) in combinations
    }
    return Factors(("mask", "gender", "age"), values)


def _inside(names: Sequence[str], level: str) -> Iterator[tuple[str, str, str]]:
    """Each image below a folder of `level`: its name, that folder, and its name in there without the suffix."""
    for name in names:
        folder, slash, rest = name[len(level) :].partition("/")
        if name.startswith(level) and slash:
            yield name, folder, posixpath.splitext(rest)[0]


def _parsed(folder: str) -> tuple[str, str, str] | None:
    """Person, gender and age (as written) of a profile's name; None when it is no profile's."""
    parts = folder.rsplit("_", 3)
    if len(parts) < 4 or not all(parts) or parts[1].lower() not in GENDERS:
        return None
    return parts[0], parts[1].lower(), parts[3]


def _refuse(folders: dict[str, tuple[str, str, str] | None], where: str) -> None:
    odd = [folder for folder, parsed in folders.items() if parsed is None]
    if odd:
        raise DataError(
            f"{where}: {len(odd)} of {len(folders)} folders are not named {NAMED} (gender male or female): {few(odd)}; "
            "rename them or take them out"
        )
    ageless = [
        folder for folder, parsed in folders.items() if parsed and not (parsed[2].isascii() and parsed[2].isdigit())
    ]
    if ageless:
        raise DataError(
            f"{where}: {len(ageless)} of {len(folders)} folders, named {NAMED}, have an age that is no number: {few(ageless)}; "
            "rename them or take them out"
        )
