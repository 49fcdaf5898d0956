"""Likeness of experiments by hand and under renaming, and the page that shows it."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest

from fivefold.errors import DataError
from fivefold.evaluation import comparison
from fivefold.evaluation.comparison import Experiment, agreement, correlation, pairwise_agreement
from fivefold.predictions import Predictions


def table(probs: np.ndarray, classes: tuple[str, ...] = ("a", "b", "c"), start: int = 0) -> Predictions:
    ids = np.array([f"T{start + n}" for n in range(len(probs))], object)
    return Predictions(ids, np.full(len(probs), -1, np.int16), "s", classes, np.log(probs).astype(np.float32))


FIRST = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
SECOND = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.2, 0.3], [0.3, 0.1, 0.6]])


def test_agreement_and_correlation_by_hand():
    np.testing.assert_allclose(agreement([table(FIRST), table(SECOND)]), [[1, 0.5], [0.5, 1]])
    expected = np.corrcoef(FIRST.ravel(), SECOND.ravel())
    np.testing.assert_allclose(correlation([table(FIRST), table(SECOND)]), expected, atol=1e-6)
    found = correlation([table(np.full((4, 3), 1 / 3)), table(SECOND)])  # the first never changes
    np.testing.assert_allclose(found, [[np.nan, np.nan], [np.nan, 1]])


def test_defect_sketch_likeness_does_not_hang_on_what_classes_are_called():
    """Pearson of class indices did: in another order of the classes it says something else of the same predictions."""
    turned = [table(FIRST[:, [1, 0, 2]]), table(SECOND[:, [1, 0, 2]])]
    plain = [table(FIRST), table(SECOND)]
    indices = [np.corrcoef([each.log_probs.argmax(axis=1) for each in tables])[0, 1] for tables in (plain, turned)]
    assert abs(indices[0] - indices[1]) > 0.1
    np.testing.assert_allclose(agreement(turned), agreement(plain))
    np.testing.assert_allclose(correlation(turned), correlation(plain), atol=1e-12)


def test_rows_and_classes_are_matched_by_name_and_whoever_has_none_is_named():
    turned = table(FIRST[::-1][:, [2, 0, 1]], ("c", "a", "b"))
    turned = Predictions(turned.ids[::-1], turned.fold, "s", turned.classes, turned.log_probs)
    given = [Experiment("x", "x", table=table(FIRST)), Experiment("none", "z"), Experiment("y", "y", table=turned)]
    found, notes = pairwise_agreement(given)
    assert found.names == {1: "x", 3: "y"}
    np.testing.assert_allclose(found.agreement, 1)
    np.testing.assert_allclose(found.correlation, 1, atol=1e-6)
    assert len(notes) == 1
    assert notes[0].startswith("none has no test predictions")


def test_out_of_fold_rows_are_compared_where_both_have_them():
    given = [Experiment("x", "x", oof=table(FIRST)), Experiment("y", "y", oof=table(SECOND, start=2))]
    found, _ = pairwise_agreement(given)
    assert found.rows == "2 out-of-fold rows"
    given = [Experiment("x", "x", table=table(FIRST)), Experiment("y", "y", table=table(SECOND, start=2))]
    with pytest.raises(DataError, match=r"x and y .*'T0', 'T1'.*'T4', 'T5'"):
        pairwise_agreement(given)
    with pytest.raises(DataError, match=r"x and y .*: 'c', 'd'"):
        pairwise_agreement([given[0], Experiment("y", "y", table=table(SECOND, ("a", "b", "d")))])


def test_figures_are_numbers_and_empty_where_unknown(tmp_path):
    known = dict(zip(comparison.SCORE_NAMES, (4, 0.5, 0.1, 0.9, None, 0.4), strict=True))
    given = [Experiment("=x", "x.csv"), Experiment("y", "y.csv")]
    comparison.write_scores(tmp_path / "c.csv", given, {"test": [known, None]})
    rows = (tmp_path / "c.csv").read_text().splitlines()
    assert rows == [
        "number,experiment," + ",".join(f"test_{name}" for name in comparison.SCORE_NAMES),
        "1,'=x,4,0.500000,0.100000,0.900000,,0.400000",
        "2,y,,,,,,",
    ]


def test_the_page_escapes_names_of_strangers():
    given = [Experiment("<b>x</b>", "x.csv", table=table(FIRST)), Experiment("y", "y.csv", table=table(SECOND))]
    figures = {"n": 4, "accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9, "logloss": None, "f1_macro": 0.4}
    alike, notes = pairwise_agreement(given)
    pictures = comparison.draw(given, [figures, None], alike)
    text = comparison.render_page("two", given, {"test": [figures, None], "oof": [None, None]}, alike, pictures, notes)
    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x" in text
    assert text.count("data:image/png") == 4
    assert "Out-of-fold</h2>" not in text


def labelled(right: np.ndarray, start: int = 0, sure: float = 0.8) -> Predictions:
    """Rows of class "a" that are predicted with probability `sure`, as that class where `right` [N]."""
    probs = np.where(right[:, None], [sure, 0.9 - sure, 0.1], [0.9 - sure, sure, 0.1])
    found = table(probs, start=start)
    return replace(found, labels=np.full(len(right), "a", object))


def test_pairs_are_tested_on_the_rows_that_both_predict():
    """30 rows that the first alone has right against 10 of the second, of 400: McNemar's exact test by its binomial."""
    first, second = np.ones(400, bool), np.ones(400, bool)
    first[:10], second[10:40] = False, False
    given = {
        "x": labelled(first),
        "y": labelled(second, sure=0.7),
        "z": labelled(second[:40], 390),
        "w": labelled(second, 900),
    }
    found = {(row["first"], row["second"]): row for row in comparison.paired_differences(given, ["z"])}
    assert found.keys() == {("x", "y"), ("x", "z"), ("y", "z")}, "w has no row in common with them"
    row = found["x", "y"]
    assert (row["n"], row["accuracy"]) == (400, pytest.approx(0.05))
    assert row["p"] == pytest.approx(2 * sum(comb(40, k) for k in range(11)) / 2**40)
    error = np.sqrt(40 / 400 - 0.05**2) / 20
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(
        (0.05 - 1.96 * error, 0.05 + 1.96 * error), abs=0.006
    )
    losses = [-np.log(np.where(right, sure, 0.9 - sure)) for right, sure in ((first, 0.8), (second, 0.7))]
    assert row["logloss"] == pytest.approx((losses[0] - losses[1]).mean(), abs=1e-6)
    assert row["logloss_low"] < row["logloss"] < row["logloss_high"]
    assert (found["x", "z"]["n"], found["x", "z"]["logloss"]) == (10, None)
    alike = comparison.paired_differences({"x": given["x"], "again": given["x"]})[0]
    assert (alike["p"], alike["accuracy_low"], alike["accuracy_high"]) == (1.0, 0.0, 0.0)
