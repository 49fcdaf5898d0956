"""The competition's log loss of a file, against scikit-learn's, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

from fivefold.errors import DataError
from fivefold.evaluation.competition import submission_logloss

CLASSES = ("K5", "모닝", "레이")
TRUTH = {"T2": "모닝", "T0": "K5", "T1": "레이", "T3": "K5"}


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "s.csv").write_text(text, encoding="utf-8-sig")
    return tmp_path / "s.csv"


def test_it_is_scikit_learns_after_sorting_renormalising_and_clipping(tmp_path):
    probs = np.array([[0.9, 0.05, 0.3], [0.0, 0.4, 0.4], [1.0, 0.0, 0.0], [0.2, 0.1, 0.1]])
    ids = ["T3", "T1", "T2", "T0"]
    rows = "\n".join(f"{name},{','.join(map(str, row))}" for name, row in zip(ids, probs, strict=True))
    path = write(tmp_path, f"ID,{','.join(CLASSES)}\n{rows}\n")
    shares = np.clip(probs / probs.sum(axis=1, keepdims=True), 1e-15, 1 - 1e-15)
    codes = [CLASSES.index(TRUTH[name]) for name in ids]
    expected = log_loss(codes, shares, labels=[0, 1, 2])
    assert submission_logloss(path, TRUTH) == pytest.approx(expected, rel=1e-12)
    # One certain miss of four rows: a quarter of -ln 1e-15 is in it.
    assert expected > 34.5 / 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ID,K5,모닝,레이\nT0,1,0,0\n", "has 1 rows, the truth 4"),
        ("ID,K5,모닝,레이\nT0,1,0,0\nT1,1,0,0\nT2,1,0,0\nT4,1,0,0\n", "ids are not those of the truth: 'T4'"),
        ("ID,K5,모닝,레이\nT0,1,0,0\nT1,1,0,0\nT2,1,0,0\nT2,1,0,0\n", "ids are not those of the truth: 'T2'"),
        ("ID,K5,모닝\nT0,1,0\nT1,1,0\nT2,1,0\nT3,1,0\n", "no column of 1 true classes: '레이'"),
        ("ID,K5,모닝,레이\nT0,1,0,0\nT1,,0,0\nT2,1,0,0\nT3,1,nan,0\n", "NaN in 2 rows"),
        ("ID,K5,모닝,레이\nT0,1,0,0\nT1,1,0,1.5\nT2,1,0,0\nT3,1,0,0\n", r"1.5, outside \[0, 1\]"),
        ("ID,K5,모닝,레이\nT0,1,0,0\nT1,1,0,-.5\nT2,1,0,0\nT3,1,0,0\n", r"-0.5, outside \[0, 1\]"),
        ("ID,K5,모닝,레이\nT0,1,0,0\nT1,0,0,0\nT2,1,0,0\nT3,1,0,0\n", "1 rows hold zeros alone"),
        ("ID,K5,모닝,레이\nT0,1,0,0\nT1,x,0,0\nT2,1,0,0\nT3,1,0,0\n", "no number"),
    ],
)
def test_what_the_competition_refuses_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        submission_logloss(write(tmp_path, text), TRUTH)
