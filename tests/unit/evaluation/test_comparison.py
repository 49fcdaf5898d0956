from dataclasses import replace
from math import comb

import numpy as np
import pytest

from fivefold.errors import DataError
from fivefold.evaluation import comparison
from fivefold.evaluation.comparison import Experiment, agreement, correlation, pairwise_agreement
from fivefold.predictions import Predictions


def tabulate(probs: np.ndarray, classes: tuple[str, ...] = ("a", "b", "c"), start: int = 0) -> Predictions:
    ids = np.array([f"T{start + n}" for n in range(len(probs))], object)
    return Predictions(ids, np.full(len(probs), -1, np.int16), "s", classes, np.log(probs).astype(np.float32))


FIRST = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
SECOND = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.2, 0.3], [0.3, 0.1, 0.6]])


def test_agreement_and_correlation_equal_values_computed_by_hand():
    np.testing.assert_allclose(agreement([tabulate(FIRST), tabulate(SECOND)]), [[1, 0.5], [0.5, 1]])
    expected = np.corrcoef(FIRST.ravel(), SECOND.ravel())
    np.testing.assert_allclose(correlation([tabulate(FIRST), tabulate(SECOND)]), expected, atol=1e-6)
    actual = correlation([tabulate(np.full((4, 3), 1 / 3)), tabulate(SECOND)])  # the first table is constant
    np.testing.assert_allclose(actual, [[np.nan, np.nan], [np.nan, 1]])


def test_pairwise_agreement_matches_by_name_and_notes_missing_predictions():
    swapped = tabulate(FIRST[::-1][:, [2, 0, 1]], ("c", "a", "b"))
    swapped = Predictions(swapped.ids[::-1], swapped.fold, "s", swapped.classes, swapped.log_probs)
    inputs = [Experiment("x", "x", table=tabulate(FIRST)), Experiment("none", "z"), Experiment("y", "y", table=swapped)]
    result, notes = pairwise_agreement(inputs)
    assert result.names == {1: "x", 3: "y"}
    np.testing.assert_allclose(result.agreement, 1)
    np.testing.assert_allclose(result.correlation, 1, atol=1e-6)
    assert len(notes) == 1
    assert notes[0].startswith("none has no test predictions")


def test_pairwise_agreement_uses_the_out_of_fold_rows_of_both():
    pair = [Experiment("x", "x", oof=tabulate(FIRST)), Experiment("y", "y", oof=tabulate(SECOND, start=2))]
    result, _ = pairwise_agreement(pair)
    assert result.rows == "2 out-of-fold rows"
    pair = [Experiment("x", "x", table=tabulate(FIRST)), Experiment("y", "y", table=tabulate(SECOND, start=2))]
    with pytest.raises(DataError, match=r"x and y .*'T0', 'T1'.*'T4', 'T5'"):
        pairwise_agreement(pair)
    with pytest.raises(DataError, match=r"x and y .*: 'c', 'd'"):
        pairwise_agreement([pair[0], Experiment("y", "y", table=tabulate(SECOND, ("a", "b", "d")))])


def test_render_page_escapes_experiment_names():
    experiments = [Experiment("<b>x</b>", "x.csv"), Experiment("y", "y.csv")]
    scores = dict(zip(comparison.SCORE_NAMES, (4, 0.5, 0.1, 0.9, None, 0.4), strict=True))
    content = {"pairs": None, "pictures": {"model_acc": b"\x89PNG"}, "notes": ["a note"], "differences": []}
    text = comparison.render_page("two", experiments, {"test": [scores, None], "oof": [None, None]}, **content)
    assert ("<b>x</b>" in text, "&lt;b&gt;x" in text, "Out-of-fold</h2>" in text) == (False, True, False)
    assert text.count("data:image/png") == 1


def make_labelled(correct: np.ndarray, start: int = 0, sure: float = 0.8) -> Predictions:
    """Return rows of class "a" whose predicted class has probability `sure`: "a" if `correct` [N], else "b"."""
    probs = np.where(correct[:, None], [sure, 0.9 - sure, 0.1], [0.9 - sure, sure, 0.1])
    table = tabulate(probs, start=start)
    return replace(table, labels=np.full(len(correct), "a", object))


def test_paired_differences_use_the_rows_that_both_predict():
    """Of 400 rows, 30 are correct in the first only and 10 in the second only: McNemar's exact test by its binomial."""
    first, second = np.ones(400, bool), np.ones(400, bool)
    first[:10], second[10:40] = False, False
    tables = {
        "x": make_labelled(first),
        "y": make_labelled(second, sure=0.7),
        "z": make_labelled(second[:40], 390),
        "w": make_labelled(second, 900),
    }
    differences = {(row["first"], row["second"]): row for row in comparison.paired_differences(tables, ["z"])}
    assert differences.keys() == {("x", "y"), ("x", "z"), ("y", "z")}, "w shares no row with the others"
    row = differences["x", "y"]
    assert (row["n"], row["accuracy"]) == (400, pytest.approx(0.05))
    assert row["p"] == pytest.approx(2 * sum(comb(40, k) for k in range(11)) / 2**40)
    error = np.sqrt(40 / 400 - 0.05**2) / 20
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(
        (0.05 - 1.96 * error, 0.05 + 1.96 * error), abs=0.006
    )
    losses = [-np.log(np.where(correct, sure, 0.9 - sure)) for correct, sure in ((first, 0.8), (second, 0.7))]
    assert row["logloss"] == pytest.approx((losses[0] - losses[1]).mean(), abs=1e-6)
    assert row["logloss_low"] < row["logloss"] < row["logloss_high"]
    assert (differences["x", "z"]["n"], differences["x", "z"]["logloss"]) == (10, None)
    identical = comparison.paired_differences({"x": tables["x"], "again": tables["x"]})[0]
    assert (identical["p"], identical["accuracy_low"], identical["accuracy_high"]) == (1.0, 0.0, 0.0)
