"""Ground truth and submissions as people write them."""

import unicodedata

import numpy as np
import pytest

from fivefold.errors import DataError, MissingInputError
from fivefold.evaluation import truth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ID,label\n007,cat\n8,NA\n", {"007": "cat", "8": "NA"}),
        ("\ufeffimage_path,width,TARGET\r\na/1.png,32,cat\r\n", {"a/1.png": "cat"}),
        ("label,class\nx,cat\n", {"x": "cat"}),
        ('id,answer\n"a,b", cat \n\n', {"a,b": "cat"}),
        (f"id,label\n1,{unicodedata.normalize('NFD', '가방')}\n", {"1": "가방"}),
    ],
)
def test_truth_is_read_as_text_whatever_its_columns_are_called(tmp_path, text, expected):
    (tmp_path / "gt.csv").write_text(text, encoding="utf-8")
    assert truth.read_truth(tmp_path / "gt.csv") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"id\n1\n", "1 column"),
        (b"id,label\n1,\xff\xfe\n", "UTF-8"),
        (b"id,label\n1,\n", "without a class"),
    ],
)
def test_what_is_no_truth_is_refused(tmp_path, content, words):
    (tmp_path / "gt.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        truth.read_truth(tmp_path / "gt.csv")


def test_truth_is_found_by_name_or_because_it_is_alone(tmp_path):
    only = tmp_path / "labels.csv"
    only.touch()
    assert truth.truth_file(tmp_path) == truth.truth_file(only) == only
    (tmp_path / "test.csv").touch()
    with pytest.raises(MissingInputError, match=r"labels\.csv, test\.csv"):
        truth.truth_file(tmp_path)
    (tmp_path / "gt.csv").touch()
    assert truth.truth_file(tmp_path) == tmp_path / "gt.csv"


def test_a_submission_becomes_log_probabilities_in_the_order_of_names(tmp_path):
    (tmp_path / "s.csv").write_text("ID,b,a\n1,3,1\n2,0,1\n", encoding="utf-8")
    found = truth.read_submission(tmp_path / "s.csv")
    assert found.classes == ("a", "b")
    np.testing.assert_allclose(np.exp(found.log_probs), [[0.25, 0.75], [1, 0]], atol=1e-6)
    assert np.isfinite(found.log_probs).all()


@pytest.mark.parametrize("text", ["ID,a,a\n1,.5,.5\n", "ID,a,b\n1,.5,.5\n1,.5,.5\n", "ID,a\n1,1\n", "ID,a,b\n1,0,0\n"])
def test_a_submission_that_contradicts_itself_is_refused(tmp_path, text):
    (tmp_path / "s.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"s\.csv"):
        truth.read_submission(tmp_path / "s.csv")
