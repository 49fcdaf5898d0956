"""Photographs of people: `<id>_<gender>_<race>_<age>/{mask1..mask5,incorrect_mask,normal}.<ext>`.

A class combines mask, gender and age in one number: `(mask · 2 + gender) · ages + age`, which is
`mask · 6 + gender · 3 + age` for the default three age groups.
"""

import bisect
import posixpath
from collections.abc import Sequence
from itertools import product

import pandas as pd

from fivefold.errors import DataError
from fivefold.label_factors import LabelFactors
from fivefold.log import log
from fivefold.predictions import preview

MASKS = ("mask", "incorrect", "normal")
GENDERS = ("male", "female")
STEMS = {**{f"mask{number}": 0 for number in range(1, 6)}, "incorrect_mask": 1, "normal": 2}
"""File name without suffix -> index into MASKS."""
PROFILE_PATTERN = rf"^(?P<person>.+)_(?P<gender>(?i:{'|'.join(GENDERS)}))_[^_]+_(?P<age>[^_]+)$"


def are_profiles(names: Sequence[str], level: str) -> bool:
    """Return whether most folders with images below `level` are named as profiles and contain images named as in profiles."""
    photos = _photos(names, level)
    profile_photos = photos[photos["stem"].isin(STEMS) & photos["person"].notna()]
    return 2 * profile_photos["folder"].nunique() > photos["folder"].nunique()


def read_profiles(names: Sequence[str], level: str, age_bins: Sequence[float], where: str) -> pd.DataFrame:
    """Return the photographs among the image `names` below `level`: `name`, `person` and `label`, the name of the class.

    Images with other names are ignored with a warning. Raise a DataError that lists folders whose name is not a profile.
    """
    photos = _photos(names, level)
    folders = photos.drop_duplicates("folder").sort_values("folder")
    invalid = folders["folder"][[not str(age).isdecimal() for age in folders["age"]]]
    if len(invalid):
        raise DataError(
            f"{where}: {len(invalid)} of {len(folders)} folders are not named <id>_<gender>_<race>_<age> (gender male or "
            f"female, age a number): {preview(invalid)}; rename or remove them"
        )
    known = photos[photos["stem"].isin(STEMS)]
    ignored = sorted(set(names) - set(known["name"]))
    if ignored:
        log.warning(
            "data: %d images are none of %s and are ignored: %s", len(ignored), ", ".join(STEMS), preview(ignored)
        )
    ages = known["age"].map(lambda age: age_class(int(age), age_bins))
    genders = known["gender"].str.lower().map(GENDERS.index)
    numbers = encode_label(known["stem"].map(STEMS), genders, ages, len(age_bins) + 1)
    return known.assign(label=numbers.astype(str))


def encode_label(mask: int, gender: int, age: int, ages: int = 3) -> int:
    """Return the class number for the indices of its factors, which have 3, 2 and `ages` values."""
    return (mask * len(GENDERS) + gender) * ages + age


def age_class(age: float, cuts: Sequence[float]) -> int:
    """Return how many of the ascending `cuts` an age has reached: with 30 and 60, 29 is 0, 30 is 1, 60 is 2."""
    return bisect.bisect_right(cuts, age)


def profile_factors(age_bins: Sequence[float]) -> LabelFactors:
    """Return mask, gender and age of every class, including classes without photographs."""
    ages = [f"<{cut:g}" for cut in age_bins] + [f">={age_bins[-1]:g}"]
    classes = enumerate(product(MASKS, GENDERS, ages))  # in the order of `encode_label`
    return LabelFactors(("mask", "gender", "age"), {str(number): values for number, values in classes})


def _photos(names: Sequence[str], level: str) -> pd.DataFrame:
    """Return the images in folders below `level`: `name`, `folder`, `stem`, and the folder's `person`, `gender`, `age`.

    The last three are missing values if the folder is not named as a profile.
    """
    rows = []
    for name in names:
        folder, slash, rest = name[len(level) :].partition("/")
        if name.startswith(level) and slash:
            rows.append((name, folder, posixpath.splitext(rest)[0]))
    photos = pd.DataFrame(rows, columns=["name", "folder", "stem"], dtype=object)
    return photos.join(photos["folder"].str.extract(PROFILE_PATTERN))
