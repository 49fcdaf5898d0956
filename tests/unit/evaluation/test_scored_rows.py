import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fivefold.errors import DataError
from fivefold.evaluation import scored_rows
from fivefold.evaluation.metrics import wilson_interval
from fivefold.evaluation.scored_rows import ScoredRows
from fivefold.predictions import Predictions


def tabulate(rows: dict[str, tuple[str, list[float]]], classes: tuple[str, ...] = ("a", "b", "c")) -> Predictions:
    """Return the table of rows `{id: (label, probabilities)}`."""
    ids, labels = np.array(list(rows), object), np.array([label for label, _ in rows.values()], object)
    log_probs = np.log(np.array([probs for _, probs in rows.values()])).astype(np.float32)
    return Predictions(ids, np.zeros(len(rows), np.int16), "s", classes, log_probs, labels)


ROWS = {
    "r1": ("a", [0.8, 0.1, 0.1]),
    "r2": ("a", [0.2, 0.6, 0.2]),
    "r3": ("b", [0.05, 0.05, 0.9]),
    "r4": ("b", [0.2, 0.2, 0.6]),
    "r5": ("c", [0.1, 0.1, 0.8]),
}


def test_escape_formula_quotes_formulas_and_keeps_numbers():
    for formula in ("=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-5e"):
        assert scored_rows.escape_formula(formula) == f"'{formula}"
    for text in ("-5", "+49", "-0.25", "a=b", "5", ""):
        assert scored_rows.escape_formula(text) == text


def test_mistakes_are_sorted_by_confidence_then_id():
    scored = ScoredRows("test", "", "", tabulate(ROWS), {"r3": "x/3.png"})
    assert scored_rows.confused_pairs(scored) == [("b", "c", 2, 1.0), ("a", "b", 1, 0.5)]
    first, *others = scored.mistakes().itertuples(index=False)
    assert [mistake.id for mistake in others] == ["r2", "r4"]
    assert tuple(first) == ("r3", "x/3.png", "b", "c", pytest.approx(0.9))


def test_confusion_and_scores_per_class_equal_values_computed_by_hand():
    scored = ScoredRows("test", "", "", tabulate(ROWS), {})
    assert scored.confusion.tolist() == [[1, 1, 0], [0, 0, 2], [0, 0, 1]]
    rows = [["a", 1, 1 / 2, 2 / 3, 2, 1], ["b", 0, 0, 0, 2, 1], ["c", 1 / 3, 1, 1 / 2, 1, 3]]
    pd.testing.assert_frame_equal(
        scored.per_class(), pd.DataFrame(rows, columns=scored_rows.PER_CLASS), check_dtype=False
    )


def test_concat_tables_matches_columns_by_name_and_refuses_other_classes_and_missing_labels():
    other = tabulate({"r6": ("c", [0.7, 0.2, 0.1])}, classes=("c", "a", "b"))
    both = scored_rows.concat_tables([other, tabulate(ROWS)])
    assert both.classes == ("a", "b", "c")
    np.testing.assert_allclose(np.exp(both.log_probs[0]), [0.2, 0.1, 0.7], rtol=1e-6)
    assert list(both.ids) == ["r6", *ROWS]
    with pytest.raises(DataError, match="'d'"):
        scored_rows.concat_tables([tabulate(ROWS), tabulate({"x": ("d", [0.1, 0.1, 0.8])}, classes=("a", "b", "d"))])
    with pytest.raises(DataError, match="no labels"):
        scored_rows.concat_tables([replace(other, labels=None)])


def test_write_csv_escapes_formulas_and_writes_six_decimals(tmp_path):
    cells = ["=1+1", "+1", "-1", "@x", "\tx", "plain", "a=b", 'quote " and , comma', "가방"]
    frame = pd.DataFrame({"text": cells, "=whole": range(9), "share": -np.arange(9) / 3})
    scored_rows.write_csv(tmp_path / "t.csv", frame)
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["text", "'=whole", "share"]
    assert [row[0] for row in rows] == ["'=1+1", "+1", "-1", "'@x", "'\tx", *cells[5:]]
    assert rows[1][1:] == ["1", "-0.333333"]
    assert b"\r" not in (tmp_path / "t.csv").read_bytes()


def test_class_can_have_the_name_of_a_column(tmp_path):
    classes = ("class", "true_class", "=x")
    table = tabulate({"r": ("class", [0.1, 0.8, 0.1]), "s": ("=x", [0.1, 0.1, 0.8])}, classes)
    scored = ScoredRows("test", "", "", table, {})
    scored_rows.write_confusion(tmp_path / "c.csv", scored)
    expected = "true_class,class,true_class,'=x\nclass,0,1,0\ntrue_class,0,0,0\n'=x,0,0,1\n"
    assert (tmp_path / "c.csv").read_text() == expected
    scored_rows.write_csv(tmp_path / "p.csv", scored.per_class())
    header, *_, last = (tmp_path / "p.csv").read_text().splitlines()
    assert header == "class,precision,recall,f1,support,predicted"
    assert last == "'=x,1.000000,1.000000,1.000000,1,1"


def test_interval_uses_the_effective_number_of_rows_of_the_groups():
    rows = {f"{group} {n}": ("a", [0.9, 0.1] if group % 3 else [0.1, 0.9]) for group in range(60) for n in range(4)}
    scored = ScoredRows("oof", "", "", tabulate(rows, ("a", "b")), {})
    assert scored.interval() == pytest.approx(wilson_interval(2 / 3, 240))
    grouped = replace(scored, groups={name: name.split()[0] for name in rows})
    assert grouped.interval() == pytest.approx(wilson_interval(2 / 3, 60), abs=0.005)
    partly_grouped = replace(scored, groups=dict.fromkeys(rows, None) | {"0 0": "x", "0 1": "x"})
    assert partly_grouped.interval() == pytest.approx(scored.interval(), abs=0.005)
