import unicodedata

import numpy as np
import pytest

from fivefold.errors import DataError, MissingInputError
from fivefold.evaluation import ground_truth
from fivefold.predictions import Predictions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ID,label\n007,cat\n8,NA\n", {"007": "cat", "8": "NA"}),
        ("\ufeffimage_path,width,TARGET\r\na/1.png,32,cat\r\n", {"a/1.png": "cat"}),
        ("label,class\nx,cat\n", {"x": "cat"}),
        ('id,answer\n"a,b", cat \n\n', {"a,b": "cat"}),
        (f"id,label\n1,{unicodedata.normalize('NFD', '가방')}\n", {"1": "가방"}),
        ("Unnamed: 0,photo,label\n0,3,dog\n1,0,cat\n", {"3": "dog", "0": "cat"}),
        (",label\n3,dog\n0,cat\n", {"3": "dog", "0": "cat"}),
        ("label,Id\ndog,3\ncat,0\n", {"3": "dog", "0": "cat"}),
        ("id,fold,Class\n0,1,dog\n", {"0": "dog"}),
        ("id,category,label\n0,animal,dog\n", {"0": "dog"}),
        ("photo,breed\n0,dog\n", {"0": "dog"}),
        ("\ufeffID;label\r\n007;cat, wild\r\n", {"007": "cat, wild"}),
        ("sep=;\nid;label\n1;do\u200bg\n", {"1": "dog"}),
    ],
)
def test_read_ground_truth_returns_text_for_any_column_names(tmp_path, text, expected):
    (tmp_path / "gt.csv").write_text(text, encoding="utf-8")
    assert ground_truth.read_ground_truth(tmp_path / "gt.csv") == expected


def test_id_column_is_set_by_name_or_contains_the_predicted_ids(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "gt.csv").write_text("number,ImageID,label,class\n0,1,dog,pet\n1,0,cat,pet\n", encoding="utf-8")
    assert ground_truth.read_ground_truth(tmp_path / "gt.csv", "imageid") == {"1": "dog", "0": "cat"}
    assert "'ImageID'" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("'label' (not 'class')")
    assert ground_truth.read_ground_truth(tmp_path / "gt.csv") == {"0": "dog", "1": "cat"}
    (tmp_path / "gt.csv").write_text("ID,image_path,target\n0,b.png,dog\n1,a.png,cat\n", encoding="utf-8")
    by_path = ground_truth.read_ground_truth(tmp_path / "gt.csv", ids=["a.png", "b.png"])
    assert by_path == {"b.png": "dog", "a.png": "cat"}
    assert ground_truth.read_ground_truth(tmp_path / "gt.csv", ids=["x", "y"]) == {"0": "dog", "1": "cat"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id\n1\n", "1 column"),
        (b"id,label\n1,a\n1,a\n", "'1'"),
        (b"id,label\n1,a\n2, \n", "empty class, the first in row 2"),
        (b"id,fold,breed\n1,0,cat\n", "which column is the class: 'fold', 'breed'.*target"),
    ],
)
def test_invalid_ground_truth_is_refused(tmp_path, content, message):
    (tmp_path / "gt.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ground_truth.read_ground_truth(tmp_path / "gt.csv")


def test_ground_truth_file_is_the_only_file_or_found_by_name(tmp_path):
    path = tmp_path / "labels.csv"
    path.touch()
    assert ground_truth.find_ground_truth_file(tmp_path) == ground_truth.find_ground_truth_file(path) == path
    (tmp_path / "test.csv").touch()
    with pytest.raises(MissingInputError, match=r"labels\.csv, test\.csv"):
        ground_truth.find_ground_truth_file(tmp_path)
    for name in ("Ground_Truth.CSV", "ground_truth.csv", "GT.csv", "gt.csv"):
        (tmp_path / name).touch()
        assert ground_truth.find_ground_truth_file(tmp_path) == tmp_path / name


def test_score_labels_scores_answers_and_refuses_other_ids(tmp_path):
    truth = {"1": "a", "2": "b", "3": "b"}
    scores = ground_truth.score_labels({"3": "b", "2": "c", "1": "a"}, truth, tmp_path)
    assert scores == pytest.approx({"accuracy": 2 / 3, "f1_macro": (1 + 2 / 3 + 0) / 3, "n": 3})
    with pytest.raises(DataError, match="1 of the 3 ids"):
        ground_truth.score_labels({"1": "a", "2": "b"}, truth, tmp_path)


def test_add_labels_matches_predictions_by_id(tmp_path):
    table = Predictions(np.array(["1", "2"], object), np.full(2, -1), "s", ("a", "b"), np.log(np.full((2, 2), 0.5)))
    assert ground_truth.add_labels(table, {"2": "a", "1": "b"}, tmp_path).labels.tolist() == ["b", "a"]
    for labels, message in (({"1": "a"}, "1 of the 2 ids"), ({"1": "a", "2": "c"}, ": .*'c'")):
        with pytest.raises(DataError, match=message):
            ground_truth.add_labels(table, labels, tmp_path)
