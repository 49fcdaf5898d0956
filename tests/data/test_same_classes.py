"""Names that mean the same class: the three policies, with numbers worked by hand."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss

from fivefold.data.adapters import Rows
from fivefold.data.evals import Submission
from fivefold.data.same_classes import SameClasses
from fivefold.errors import DataError
from fivefold.evaluation.metrics import competition_logloss
from fivefold.inference.submission import write_submission
from fivefold.predictions import Predictions

PAIR = (("K5_3세대", "더_뉴_K5"),)
ALL = ("718", "K5_3세대", "더_뉴_K5")


def table(classes: tuple[str, ...], *rows: list[float]) -> Predictions:
    ids = np.array([f"TEST_{n}" for n in range(len(rows))], dtype=object)
    return Predictions(ids, np.full(len(rows), -1, np.int16), "s", classes, np.log(np.array(rows)).astype(np.float32))


def submitted(tmp_path, found: Predictions, same: SameClasses, columns: tuple[str, ...] = ALL) -> np.ndarray:
    write_submission(tmp_path / "s.csv", found, Submission("ID", tuple(columns), list(found.ids)), same)
    lines = (tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(["ID", *columns])
    return np.array([line.split(",")[1:] for line in lines[1:]], dtype=float)


def test_none_leaves_all_as_it_is(tmp_path):
    found = submitted(tmp_path, table(ALL, [0.5, 0.3, 0.2]), SameClasses(PAIR, "none"))
    np.testing.assert_allclose(found, [[0.5, 0.3, 0.2]], atol=1e-6)


def test_sum_gives_both_the_sum_and_rows_sum_to_1(tmp_path):
    # .5, .3 + .2, .3 + .2 make 1.5 in all.
    found = submitted(tmp_path, table(ALL, [0.5, 0.3, 0.2]), SameClasses(PAIR, "sum"))
    np.testing.assert_allclose(found, [[1 / 3, 1 / 3, 1 / 3]], atol=1e-6)
    found = submitted(tmp_path, table(ALL, [0.2, 0.7, 0.1]), SameClasses(PAIR, "sum"), ("더_뉴_K5", "718", "K5_3세대"))
    np.testing.assert_allclose(found, [[0.8 / 1.8, 0.2 / 1.8, 0.8 / 1.8]], atol=1e-6)


def test_merge_parts_the_one_class_equally(tmp_path):
    found = submitted(tmp_path, table(ALL[:2], [0.2, 0.8]), SameClasses(PAIR, "merge"))
    np.testing.assert_allclose(found, [[0.2, 0.4, 0.4]], atol=1e-6)


def test_labels_of_a_sum_are_the_sums_winner_under_its_more_probable_name(tmp_path):
    found, same = table(ALL, [0.4, 0.25, 0.35], [0.4, 0.35, 0.25]), SameClasses(PAIR, "sum")
    for policy, expected in ((same, ["더_뉴_K5", "K5_3세대"]), (SameClasses(), ["718", "718"])):
        write_submission(tmp_path / "l.csv", found, Submission("ID", ("target",), list(found.ids)), policy)
        lines = (tmp_path / "l.csv").read_text(encoding="utf-8").splitlines()[1:]
        assert [line.split(",")[1] for line in lines] == expected


def test_equal_parts_score_no_worse_than_the_whole_for_each_name_where_names_are_equally_frequent():
    """The docstring's claim: the mean competition logloss of a calibrated model over both names of the truth."""
    for s in (0.05, 0.3, 0.6, 0.9, 1.0):
        parts, whole = np.array([[1 - s, s / 2, s / 2]]), np.array([[1 - s, s, s]])
        truth = [(0, 1 - s), (1, s / 2), (2, s / 2)]
        costs = [sum(w * competition_logloss(p, np.array([c])) for c, w in truth if w) for p in (parts, whole)]
        assert costs[1] - costs[0] == pytest.approx(np.log(1 + s) - s * np.log(2), abs=1e-9)
        assert costs[0] <= costs[1] + 1e-12
    first_gets_all = np.array([[1 - 0.9, 0.9, 0.0]])
    assert log_loss([2], np.clip(first_gets_all, 1e-15, 1), labels=[0, 1, 2]) > 34


def test_merging_turns_rows_and_tables_to_the_first_name():
    same = SameClasses((tuple(unicodedata.normalize("NFD", name) for name in PAIR[0]),), "merge")
    names = pa.array(["a", "b", "c"])
    rows = Rows(names, names, np.array([2, 1, 0], np.int32), ALL, pa.nulls(3, pa.string()), "test")
    merged = same.merge_rows(rows)
    assert merged.classes == ("718", "K5_3세대")
    assert merged.codes.tolist() == [1, 1, 0]
    both = same.merge_table(table(ALL, [0.5, 0.3, 0.2]))
    assert both.classes == ("718", "K5_3세대")
    np.testing.assert_allclose(np.exp(both.log_probs), [[0.5, 0.5]], atol=1e-6)
    assert SameClasses(PAIR, "sum").merge_rows(rows) is rows


def test_names_that_do_not_fit_are_refused_by_name():
    rows = Rows(pa.array(["a"]), pa.array(["a"]), np.zeros(1, np.int32), ALL, pa.nulls(1, pa.string()), "test")
    with pytest.raises(
        DataError, match=r"names '더_누_K5', which is no class of the training rows; did you mean '더_뉴_K5'"
    ):
        SameClasses((("K5_3세대", "더_누_K5"),), "merge").merge_rows(rows)
    with pytest.raises(DataError, match="single class"):
        SameClasses((ALL,), "merge").merge_rows(rows)
    with pytest.raises(DataError, match=r"models know '더_뉴_K5'.*split and train with merge"):
        SameClasses(PAIR, "merge").check_model(ALL)
    with pytest.raises(DataError, match="no class of the models"):
        SameClasses(PAIR, "sum").check_model(("718", "K5_3세대"))


def test_a_sample_without_a_merged_name_or_with_a_strange_one_is_refused(tmp_path):
    same, found = SameClasses(PAIR, "merge"), table(ALL[:2], [0.2, 0.8])
    with pytest.raises(DataError, match=r"classes: '더_뉴_K5' without a column;"):
        submitted(tmp_path, found, same, ("718", "K5_3세대"))
    with pytest.raises(DataError, match=r"classes: '911' unknown to the models;"):
        submitted(tmp_path, found, same, (*ALL, "911"))
    assert not (tmp_path / "s.csv").exists()
