"""Ground truth and submissions as people write them."""

import unicodedata

import numpy as np
import pytest

from fivefold.data.tables import ANSWER_NAMES, LABEL_NAMES
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
        (",ID,label\n0,3,dog\n1,0,cat\n", {"3": "dog", "0": "cat"}),
        ("Unnamed: 0,photo,label\n0,3,dog\n1,0,cat\n", {"3": "dog", "0": "cat"}),
        (",label\n3,dog\n0,cat\n", {"3": "dog", "0": "cat"}),
        ("label,Id\ndog,3\ncat,0\n", {"3": "dog", "0": "cat"}),
        ("id,fold,Class\n0,1,dog\n", {"0": "dog"}),
        ("id,fold,class_name\n0,1,dog\n", {"0": "dog"}),
        ("id,category,label\n0,animal,dog\n", {"0": "dog"}),
        ("photo,breed\n0,dog\n", {"0": "dog"}),
    ],
)
def test_truth_is_read_as_text_whatever_its_columns_are_called(tmp_path, text, expected):
    (tmp_path / "gt.csv").write_text(text, encoding="utf-8")
    assert truth.read_truth(tmp_path / "gt.csv") == expected


def test_ids_are_the_column_that_is_called_so_or_that_has_the_predicted_ids(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "gt.csv").write_text("number,ImageID,label,class\n0,1,dog,pet\n1,0,cat,pet\n", encoding="utf-8")
    assert truth.read_truth(tmp_path / "gt.csv", "imageid") == {"1": "dog", "0": "cat"}
    assert caplog.messages[-1].endswith("ids are its column 'ImageID', classes 'label' (not 'class')")
    assert truth.read_truth(tmp_path / "gt.csv") == {"0": "dog", "1": "cat"}
    (tmp_path / "gt.csv").write_text("ID,image_path,target\n0,b.png,dog\n1,a.png,cat\n", encoding="utf-8")
    assert truth.read_truth(tmp_path / "gt.csv", ids=["a.png", "b.png"]) == {"b.png": "dog", "a.png": "cat"}
    assert truth.read_truth(tmp_path / "gt.csv", ids=["x", "y"]) == {"0": "dog", "1": "cat"}


def test_every_name_of_a_class_column_is_one_of_the_truth():
    assert (*LABEL_NAMES, *ANSWER_NAMES) == truth.LABEL_COLUMNS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"id\n1\n", "1 column"),
        (b"id,label\n1,\xff\xfe\n", "UTF-8"),
        (b"id,label\n1,\n", "without a class"),
        (b"id,fold,breed\n1,0,cat\n", "which column is the class: 'fold', 'breed'.*target, label"),
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
    for name in ("Ground_Truth.CSV", "ground_truth.csv", "GT.csv", "gt.csv"):
        (tmp_path / name).touch()
        assert truth.truth_file(tmp_path) == tmp_path / name


def test_a_submission_becomes_log_probabilities_in_the_order_of_names(tmp_path):
    (tmp_path / "s.csv").write_text("ID,b,a\n1,3,1\n2,0,1\n", encoding="utf-8")
    found = truth.read_submission(tmp_path / "s.csv")
    assert found.classes == ("a", "b")
    np.testing.assert_allclose(np.exp(found.log_probs), [[0.25, 0.75], [1, 0]], atol=1e-6)
    assert np.isfinite(found.log_probs).all()


@pytest.mark.parametrize("header", [",ID,b,a", "Unnamed: 0,image_path,b,a", ",ImageID,b,a"])
def test_the_index_of_pandas_is_no_class_and_no_id(tmp_path, header):
    (tmp_path / "s.csv").write_text(
        f"{header}\n0,7,.25,.75\n1,8,1,0\n".replace("7,", "7x," if "path" in header else "7,")
    )
    found = truth.read_submission(tmp_path / "s.csv")
    assert (found.classes, found.ids.tolist()[1]) == (("a", "b"), "8")
    np.testing.assert_allclose(np.exp(found.log_probs), [[0.75, 0.25], [0, 1]], atol=1e-6)


def test_ids_without_a_name_stay_ids(tmp_path):
    (tmp_path / "s.csv").write_text(",b,a\n7,.25,.75\n8,1,0\n", encoding="utf-8")
    assert truth.read_submission(tmp_path / "s.csv").ids.tolist() == ["7", "8"]


def test_rows_that_are_no_shares_of_one_or_of_a_hundred_are_told(tmp_path, caplog):
    (tmp_path / "s.csv").write_text("ID,b,a\n1,.25,.75\n2,10,90\n3,.9,.9\n4,3,1\n", encoding="utf-8")
    truth.read_submission(tmp_path / "s.csv")
    (warned,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "2 rows sum neither to 1 nor to 100, the first in line 4 (to 1.8)" in warned


@pytest.mark.parametrize("text", ["ID,a,a\n1,.5,.5\n", "ID,a,b\n1,.5,.5\n1,.5,.5\n", "ID,a\n1,1\n", "ID,a,b\n1,0,0\n"])
def test_a_submission_that_contradicts_itself_is_refused(tmp_path, text):
    (tmp_path / "s.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"s\.csv"):
        truth.read_submission(tmp_path / "s.csv")
