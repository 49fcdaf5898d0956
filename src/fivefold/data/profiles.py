"""Photographs of people: `<id>_<gender>_<race>_<age>/{mask1..mask5,incorrect_mask,normal}.<ext>`.

A class is mask × gender × age as one number: `(mask · 2 + gender) · ages + age`, which is
`mask · 6 + gender · 3 + age` for the usual three ages.
"""

import bisect
import logging
import posixpath
from collections.abc import Sequence
from itertools import product

import pandas as pd

from fivefold.errors import DataError
from fivefold.factors import Factors
from fivefold.predictions import sample

log = logging.getLogger("fivefold")

MASKS = ("mask", "incorrect", "normal")
GENDERS = ("male", "female")
STEMS = {**{f"mask{number}": 0 for number in range(1, 6)}, "incorrect_mask": 1, "normal": 2}
"""What a file is called, without its suffix -> its place in MASKS."""
NAMED = "<id>_<gender>_<race>_<age>"
PROFILE = rf"^(?P<person>.+)_(?P<gender>(?i:{'|'.join(GENDERS)}))_[^_]+_(?P<age>[^_]+)$"


def are_profiles(names: Sequence[str], level: str) -> bool:
    """Whether most folders below `level` that hold images are named as profiles, and images in them as theirs."""
    photos = _photos(names, level)
    right = photos[photos["stem"].isin(STEMS) & photos["person"].notna()]
    return 2 * right["folder"].nunique() > photos["folder"].nunique()


def read_profiles(names: Sequence[str], level: str, age_cuts: Sequence[float], where: str) -> pd.DataFrame:
    """The photographs among the image `names` below `level`: `name`, `person` and `label`, the name of the class.

    Those of other names are left out, with a warning.

    Raises a DataError that names folders which are no profiles, or whose age is no number.
    """
    photos = _photos(names, level)
    folders = photos.drop_duplicates("folder").sort_values("folder")
    _refuse(folders, folders["person"].isna(), f"are not named {NAMED} (gender male or female)", where)
    ageless = ~folders["age"].astype(object).str.fullmatch("[0-9]+").astype(bool)
    _refuse(folders, ageless, f"named {NAMED}, have an age that is no number", where)
    kept = photos[photos["stem"].isin(STEMS)]
    odd = sorted(set(names) - set(kept["name"]))
    if odd:
        log.warning("data: %d images are none of %s and are left out: %s", len(odd), ", ".join(STEMS), sample(odd))
    ages = kept["age"].map(lambda age: age_class(int(age), age_cuts))
    genders = kept["gender"].str.lower().map(GENDERS.index)
    numbers = label_of(kept["stem"].map(STEMS), genders, ages, len(age_cuts) + 1)
    return kept.assign(label=numbers.astype(str))


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


def _photos(names: Sequence[str], level: str) -> pd.DataFrame:
    """The images below a folder of `level`: `name`, `folder`, `stem` in there, and the folder's `person`, `gender`, `age`.

    These are absent where the folder is named otherwise.
    """
    rows = []
    for name in names:
        folder, slash, rest = name[len(level) :].partition("/")
        if name.startswith(level) and slash:
            rows.append((name, folder, posixpath.splitext(rest)[0]))
    photos = pd.DataFrame(rows, columns=["name", "folder", "stem"], dtype=object)
    return photos.join(photos["folder"].str.extract(PROFILE))


def _refuse(folders: pd.DataFrame, odd: pd.Series, what: str, where: str) -> None:
    if odd.any():
        raise DataError(
            f"{where}: {odd.sum()} of {len(folders)} folders {what}: {sample(folders['folder'][odd])}; "
            "rename them or take them out"
        )
