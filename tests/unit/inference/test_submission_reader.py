from pathlib import Path

import numpy as np
import pytest

from fivefold.data.class_aliases import ClassAliases
from fivefold.errors import DataError
from fivefold.inference.submission_reader import contains_labels, has_labels_only, read_submission, system_name

IDS, CLASSES = ("1", "2"), ("a", "b", "ㄷ")


def write_submission(tmp_path: Path, text: str, name: str = "output_eva.csv") -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    return tmp_path / name


def test_reader_matches_rows_by_id_and_columns_by_class_name(tmp_path):
    path = write_submission(tmp_path, "ID,ㄷ,a,b\n2,.1,.2,.7\n1,1,2,1\n")
    predictions = read_submission(path, IDS, CLASSES).reindex(IDS)
    np.testing.assert_allclose(np.exp(predictions.log_probs), [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]], atol=1e-6)
    assert (predictions.system, predictions.classes) == ("eva", CLASSES)
    assert not contains_labels(predictions)
    assert read_submission(path).classes == CLASSES
    assert [system_name(Path(name)) for name in ("output_eva.csv", "my.csv", "output_.csv")] == ["eva", "my", "output_"]
    assert not has_labels_only(path)
    assert has_labels_only(write_submission(tmp_path, ",ID,target\n0,2,a\n1,1,b\n"))


def test_reader_warns_about_rows_that_sum_neither_to_1_nor_to_100(tmp_path, caplog):
    read_submission(write_submission(tmp_path, "ID,b,a\n1,.25,.75\n2,10,90\n3,.9,.9\n4,3,1\n"))
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "2 rows sum neither to 1 nor to 100, the first in row 3 below the header (to 1.8)" in warning


def test_reader_gives_predicted_classes_probability_1(tmp_path):
    path = write_submission(tmp_path, "ID,image_path,target\n7,./test/2.JPEG,ㄷ\n8,./test/1.JPEG,a\n")
    predictions = read_submission(path, ("./test/1.JPEG", "./test/2.JPEG"), CLASSES)
    assert list(predictions.ids) == ["./test/2.JPEG", "./test/1.JPEG"]
    np.testing.assert_allclose(np.exp(predictions.log_probs), [[0, 0, 1], [1, 0, 0]], atol=1e-14)
    assert np.isfinite(predictions.log_probs).all()
    assert contains_labels(predictions)
    predictions = read_submission(write_submission(tmp_path, "ID,breed\n1,b\n2,a\n"))
    assert (predictions.classes, predictions.log_probs.argmax(axis=1).tolist()) == (("a", "b"), [1, 0])


def test_reader_adds_probabilities_of_merged_classes(tmp_path):
    path = write_submission(tmp_path, "ID,a,b,ㄷ\n1,.5,.3,.2\n2,.1,.1,.8\n")
    predictions = read_submission(path, IDS, ("a", "b"), ClassAliases((("b", "ㄷ"),), "merge"))
    np.testing.assert_allclose(np.exp(predictions.log_probs), [[0.5, 0.5], [0.1, 0.9]], atol=1e-6)
    labels = write_submission(tmp_path, "ID,target\n1,ㄷ\n2,a\n")
    predictions = read_submission(labels, IDS, ("a", "b"), ClassAliases((("b", "ㄷ"),), "merge"))
    assert predictions.log_probs.argmax(axis=1).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ID,a,b,ㄷ\n1,.5,.3,.2\n", r"1 of the 2 ids of the test table are not in .* \('2'\)"),
        ("ID,a,b,ㄷ\n1,.5,.3,.2\n2,.5,.3,.2\n3,.5,.3,.2\n", r"1 of the 3 ids of .* are not in the test table \('3'\)"),
        ("ID,a,b,ㄷ\n1,.5,.3,.2\n1,.5,.3,.2\n", "ids.*'1'"),
        ("ID,a,b,ㄷ\n1,.5,.3,\n2,.5,.3,.2\n", "row 1 .*column 'ㄷ'"),
        ("ID,a,b,ㄷ\n1,.5,.3,.2\n2,nan,.3,.2\n", "1 rows .*first in row 2"),
        ("ID,a,b,ㄷ\n1,.5,.3,-.2\n2,.5,.3,.2\n", "first in row 1"),
        ("ID,a,b,ㄷ\n1,0,0,0\n2,.5,.3,.2\n", "first in row 1"),
        ("ID,a,b\n1,.5,.5\n2,.5,.5\n", "'ㄷ' without a column"),
        ("ID,a,b,ㄷ,e\n1,.5,.3,.2,0\n2,.5,.3,.2,0\n", "'e' unknown to the models"),
        ("ID,target\n1,a\n2,e\n", ": 'e'"),
        ("ID,image_path\n1,x.png\n2,y.png\n", "ID, image_path"),
        ("ID\n1\n", "submission"),
    ],
)
def test_reader_rejects_invalid_files_and_names_the_problem(tmp_path, text, message):
    path = write_submission(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        read_submission(path, IDS, CLASSES)
    assert str(path) in str(caught.value)
