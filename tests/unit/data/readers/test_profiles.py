import json
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fivefold.config.schema import Split
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.profiles import STEMS, encode_label, profile_factors
from fivefold.data.readers.training_rows import LabelledImages
from fivefold.data.split.assign import assign_rows, find_duplicates, split_groups
from fivefold.data.split.fold_table import FoldTable, read_folds, write_folds
from fivefold.data.split.summary import class_file_content
from fivefold.errors import DataError, SettingsError
from toy_data import load_rows, write_data

PEOPLE = {
    "000001_female_Asian_29": 0,
    "000002_male_Asian_30": 1,
    "000003_female_Asian_59": 1,
    "000004_male_Asian_60": 2,
    "000_5_female_Asian_58": 1,
}
"""Folder of a person -> age class."""


def draw(root: Path, folders: Sequence[str] = tuple(PEOPLE), prefix: str = "train/images/") -> Path:
    """Write seven photographs to each folder."""
    suffixes = (".jpg", ".jpeg", ".png")
    names = enumerate(product(folders, STEMS))
    return write_data(root, *(f"{prefix}{folder}/{stem}{suffixes[n % 3]}" for n, (folder, stem) in names))


@pytest.mark.parametrize("prefix", ["", "images/", "train/images/"])
@pytest.mark.parametrize("layout", ["auto", "mask_profiles"])
def test_label_is_mask_times_6_plus_gender_times_3_plus_age(tmp_path: Path, prefix: str, layout: str) -> None:
    rows = load_rows(draw(tmp_path, prefix=prefix), layout=layout)
    for path, code, person in zip(rows.paths.to_pylist(), rows.codes, rows.groups.to_pylist(), strict=True):
        folder, file = Path(path).parts[-2:]
        mask = 0 if file.startswith("mask") else 1 if file.startswith("incorrect") else 2
        gender = int("female" in folder)
        assert rows.classes[code] == str(mask * 6 + gender * 3 + PEOPLE[folder])
        assert person == folder.rsplit("_", 3)[0]
    assert sorted(Counter(rows.groups.to_pylist()).values()) == [7] * len(PEOPLE)


def test_defect_mask_every_combination_is_a_distinct_class_from_0_to_17() -> None:
    factors = profile_factors([30, 60])
    assert sorted(map(int, factors.values)) == list(range(18))
    assert len(set(factors.values.values())) == 18, "the codes of the original reached 32"
    assert factors.values["0"] == ("mask", "male", "<30")
    assert factors.values["10"] == ("incorrect", "female", "<60")
    assert factors.values["17"] == ("normal", "female", ">=60")
    assert [encode_label(*parts) for parts in product(range(3), range(2), range(3))] == list(range(18))


def test_age_bins_are_configurable(tmp_path: Path) -> None:
    root = draw(tmp_path, ["1_male_Asian_57", "2_male_Asian_58", "3_male_Asian_59", "4_male_Asian_60"])
    for cut, expected in ((60, ["1", "1", "1", "2"]), (58, ["1", "2", "2", "2"])):
        rows = load_rows(root, age_bins=[30, cut])
        paths = zip(rows.paths.to_pylist(), rows.codes, strict=True)
        assert [rows.classes[code] for path, code in paths if "/mask1" in path] == expected
    assert set(load_rows(root, age_bins=[58]).classes) == {str((m * 2 + 0) * 2 + a) for m in range(3) for a in range(2)}


def test_hidden_files_are_skipped_and_unknown_files_are_reported(tmp_path: Path, caplog) -> None:
    folder = draw(tmp_path) / "train" / "images" / "000001_female_Asian_29"
    write_data(folder, "._mask1.jpg", ".hidden.png", "../._000001_female_Asian_29", "mask6.jpg", "copy/mask1.jpg")
    assert len(load_rows(tmp_path)) == 7 * len(PEOPLE)
    assert "2 images are none of mask1" in caplog.text
    assert "mask6.jpg" in caplog.text


def test_table_of_people_is_not_read_as_a_table_of_images(tmp_path: Path) -> None:
    root = draw(tmp_path)
    lines = ["id,gender,race,age,path", *(f"{folder.replace('_', ',')},{folder}" for folder in list(PEOPLE)[:4])]
    (root / "train" / "train.csv").write_text("\n".join(lines))
    assert "mask profiles" in load_rows(root).layout
    assert "mask profiles" in load_rows(root / "train").layout


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["6_child_Asian_10", "notaprofile"], r"2 of 7 folders are not named <id>_<gender>_<race>_<age>.*'6_child"),
        (["6_male_Asian_old"], r"1 of 6 folders.*age .*: '6_male_Asian_old'"),
        (["6_male_Asian_-3"], r"age .*: '6_male_Asian_-3'"),
        ([f"{n}_male_Asian_x{n}" for n in range(8)], r"8 of 13.*and 3 more"),
    ],
)
def test_error_names_folders_that_are_not_profiles(tmp_path: Path, folders: list[str], message: str) -> None:
    root = draw(tmp_path, [*PEOPLE, *folders])
    for layout in ("auto", "mask_profiles"):
        with pytest.raises(DataError, match=message):
            load_rows(root, layout=layout)


def test_class_folders_are_not_mistaken_for_profiles(tmp_path: Path) -> None:
    rows = load_rows(draw(tmp_path, ["cat_male_tabby_3", "dog", "bird"]))
    assert (set(rows.classes), rows.factors) == ({"cat_male_tabby_3", "dog", "bird"}, None)
    other = write_data(tmp_path / "other", *(f"{folder}/1.png" for folder in PEOPLE))  # no profiles' files
    assert set(load_rows(other).classes) == set(PEOPLE)
    assert set(load_rows(draw(tmp_path / "third"), layout="folders").classes) == set(PEOPLE)


@pytest.mark.parametrize("ratios", [(), (0.8, 0.2, 0.0)])
def test_defect_mask_each_person_is_in_one_fold_and_occurs_once(ratios: tuple[float, ...]) -> None:
    """The original drew people with replacement (`random.choices`): some occurred twice and others never."""
    random, person = np.random.default_rng(0), np.repeat(np.arange(60), len(STEMS))
    gender, age = random.integers(0, 2, 60)[person], random.integers(0, 3, 60)[person]
    codes = encode_label(np.tile(list(STEMS.values()), 60), gender, age)
    fold, part = split_groups(codes, person, Split(folds=5, ratios=list(ratios), seed=0))
    pairs = set(zip(person, part if ratios else fold, strict=True))
    assert (len(fold), len(pairs), len({group for _, group in pairs})) == (420, 60, 2 if ratios else 5)


def write_split(folder: Path, rows: LabelledImages) -> FoldTable:
    """Split the rows into two folds, write the table and its classes, and return the table."""
    fold, part = assign_rows(rows, find_duplicates(rows.paths), Split(folds=2))
    table = FoldTable(rows.ids, rows.paths, rows.codes, rows.classes, rows.groups, fold, part, rows.paths, rows.factors)
    write_folds(folder / "folds.parquet", table)
    (folder / "classes.json").write_text(json.dumps(class_file_content(table)))
    return table


def test_split_stores_the_factors_of_its_classes(tmp_path: Path) -> None:
    rows = load_rows(draw(tmp_path))
    write_split(tmp_path, rows)
    loaded = read_folds(tmp_path / "folds.parquet", tmp_path / "classes.json")
    assert loaded.factors == rows.factors

    projected, ages = loaded.project_factors(["gender", "mask"]), loaded.project_factors(["age"])
    assert projected.known_factors == ("mask", "gender")
    masks = product(("incorrect", "mask", "normal"), ("female", "male"))
    assert (projected.classes, ages.classes) == (tuple(map("+".join, masks)), ("<30", "<60", ">=60"))
    for path, label, age in zip(loaded.paths.to_pylist(), projected.labels(), ages.labels(), strict=True):
        assert label.split("+")[1] == Path(path).parent.name.split("_")[-3]
        assert age == ages.classes[PEOPLE[Path(path).parent.name]]
    assert loaded.project_factors([]) is loaded.project_factors(["age", "gender", "mask"]) is loaded
    with pytest.raises(SettingsError, match="unknown factor 'ages'; did you mean 'age'"):
        loaded.project_factors(["ages"])


def test_missing_or_invalid_factors_are_rejected(tmp_path: Path) -> None:
    rows = load_rows(write_data(tmp_path / "two", *(f"{name}/{n}.png" for name in "ab" for n in "123")))
    with pytest.raises(SettingsError, match=r"model\.label_factors=age"):
        write_split(tmp_path, rows).project_factors(["age"])
    for values, message in (({"a": "x", "b": "x"}, "the same factors"), ({"a": "x"}, "factors must")):
        (tmp_path / "classes.json").write_text(json.dumps({"classes": ["a", "b"], "factors": {"mask": values}}))
        with pytest.raises(DataError, match=message):
            read_folds(tmp_path / "folds.parquet", tmp_path / "classes.json")


def test_info_csv_defines_the_columns_of_the_submission(tmp_path: Path) -> None:
    names = [f"{n:040x}.jpg" for n in (7, 3, 5)]
    info = "\n".join(["ImageID,ans", *(f"{name},0" for name in names)])
    write_data(tmp_path / "eval", *(f"images/{name}" for name in names), info=info)
    for root in (tmp_path / "eval", tmp_path):
        table = read_eval(root)
        assert list(table.ids) == [Path(path).name for path in table.paths] == names
        assert (table.sample.id_column, table.sample.classes, list(table.sample.ids)) == ("ImageID", ("ans",), names)
    (tmp_path / "eval" / "images" / names[1]).unlink()
    with pytest.raises(DataError, match=names[1]):
        read_eval(tmp_path / "eval")
