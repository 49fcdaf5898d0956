"""Names that mean the same class: the three policies, with numbers worked by hand."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from fivefold.data.class_aliases import ClassAliases
from fivefold.data.readers.eval_images import SampleSubmission
from fivefold.data.readers.training_rows import LabelledImages
from fivefold.errors import DataError
from fivefold.inference.submission import write_submission
from fivefold.predictions import Predictions

PAIR = (("K5_3세대", "더_뉴_K5"),)
ALL = ("718", "K5_3세대", "더_뉴_K5")


def table(classes: tuple[str, ...], *rows: list[float]) -> Predictions:
    ids = np.array([f"TEST_{n}" for n in range(len(rows))], dtype=object)
    return Predictions(ids, np.full(len(rows), -1, np.int16), "s", classes, np.log(np.array(rows)).astype(np.float32))


def submitted(tmp_path, found: Predictions, same: ClassAliases, columns: tuple[str, ...] = ALL) -> np.ndarray:
    write_submission(tmp_path / "s.csv", found, SampleSubmission("ID", tuple(columns), list(found.ids)), same)
    lines = (tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(["ID", *columns])
    return np.array([line.split(",")[1:] for line in lines[1:]], dtype=float)


@pytest.mark.parametrize(
    ("policy", "classes", "row", "columns", "expected"),
    [
        ("none", ALL, [0.5, 0.3, 0.2], ALL, [0.5, 0.3, 0.2]),
        ("sum", ALL, [0.5, 0.3, 0.2], ALL, [1 / 3, 1 / 3, 1 / 3]),  # .5, .3 + .2, .3 + .2 make 1.5 in all
        ("sum", ALL, [0.2, 0.7, 0.1], ("더_뉴_K5", "718", "K5_3세대"), [0.8 / 1.8, 0.2 / 1.8, 0.8 / 1.8]),
        ("merge", ALL[:2], [0.2, 0.8], ALL, [0.2, 0.4, 0.4]),
    ],
)
def test_a_submission_has_the_shares_of_the_policy(tmp_path, policy, classes, row, columns, expected):
    found = submitted(tmp_path, table(classes, row), ClassAliases(PAIR, policy), columns)
    np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_labels_of_a_sum_are_the_sums_winner_under_its_more_probable_name(tmp_path):
    found, same = table(ALL, [0.4, 0.25, 0.35], [0.4, 0.35, 0.25]), ClassAliases(PAIR, "sum")
    for policy, expected in ((same, ["더_뉴_K5", "K5_3세대"]), (ClassAliases(), ["718", "718"])):
        write_submission(tmp_path / "l.csv", found, SampleSubmission("ID", ("target",), list(found.ids)), policy)
        lines = (tmp_path / "l.csv").read_text(encoding="utf-8").splitlines()[1:]
        assert [line.split(",")[1] for line in lines] == expected


def test_merging_turns_rows_and_tables_to_the_first_name():
    same = ClassAliases((tuple(unicodedata.normalize("NFD", name) for name in PAIR[0]),), "merge")
    names = pa.array(["a", "b", "c"])
    rows = LabelledImages(names, names, np.array([2, 1, 0], np.int32), ALL, pa.nulls(3, pa.string()), "test")
    merged = same.merge_rows(rows)
    assert merged.classes == ("718", "K5_3세대")
    assert merged.codes.tolist() == [1, 1, 0]
    both = same.merge_table(table(ALL, [0.5, 0.3, 0.2]))
    assert both.classes == ("718", "K5_3세대")
    np.testing.assert_allclose(np.exp(both.log_probs), [[0.5, 0.5]], atol=1e-6)
    assert ClassAliases(PAIR, "sum").merge_rows(rows) is rows


def test_names_that_do_not_fit_are_refused_by_name():
    rows = LabelledImages(
        pa.array(["a"]), pa.array(["a"]), np.zeros(1, np.int32), ALL, pa.nulls(1, pa.string()), "test"
    )
    with pytest.raises(DataError, match=r"'더_누_K5'.* did you mean '더_뉴_K5'"):
        ClassAliases((("K5_3세대", "더_누_K5"),), "merge").merge_rows(rows)
    with pytest.raises(DataError, match="single class"):
        ClassAliases((ALL,), "merge").merge_rows(rows)
    with pytest.raises(DataError, match=r"models .*'더_뉴_K5'.*split and train with merge"):
        ClassAliases(PAIR, "merge").check_model(ALL)
    with pytest.raises(DataError, match="class of the models"):
        ClassAliases(PAIR, "sum").check_model(("718", "K5_3세대"))


def test_a_sample_without_a_merged_name_or_with_a_strange_one_is_refused(tmp_path):
    same, found = ClassAliases(PAIR, "merge"), table(ALL[:2], [0.2, 0.8])
    with pytest.raises(DataError, match=r"classes: '더_뉴_K5' without a column;"):
        submitted(tmp_path, found, same, ("718", "K5_3세대"))
    with pytest.raises(DataError, match=r"classes: '911' unknown to the models;"):
        submitted(tmp_path, found, same, (*ALL, "911"))
    assert not (tmp_path / "s.csv").exists()
