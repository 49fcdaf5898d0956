"""True classes beside images that somebody hands over, as they write them."""

import unicodedata
from pathlib import Path

import pytest

from fivefold.data.given import check_truth, read_given, with_folders_as_truth
from fivefold.errors import DataError
from toy import write_data

CLASSES = ("dog", unicodedata.normalize("NFC", "été"))


DECOMPOSED = unicodedata.normalize("NFD", "été")


def test_true_classes_of_a_table_are_plain(tmp_path: Path):
    text = f"image_path,true_class\na.png,{DECOMPOSED}\nb.png, dog \nc.png,\n"
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    given = read_given(tmp_path / "list.csv")
    assert tuple(given.truth) == (CLASSES[1], "dog", "")
    check_truth(given, CLASSES)


def test_folders_in_decomposed_letters_are_the_truth(tmp_path: Path):
    write_data(tmp_path, "dog/1.png", f"{DECOMPOSED}/1.png")
    assert sorted(with_folders_as_truth(read_given(tmp_path), CLASSES).truth) == sorted(CLASSES)


def test_an_unknown_true_class_is_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "list.csv").write_text("image_path,true_class\na.png,cow\nb.png,dog\nc.png,cow\n")
    with pytest.raises(DataError, match=r"2 of 3 rows have true classes .*: 'cow'; .*leave such cells empty"):
        check_truth(read_given(tmp_path / "list.csv"), CLASSES)


def test_a_sample_however_it_is_spelt_is_no_table_of_images(tmp_path: Path):
    (tmp_path / "list.csv").write_text("image_path\na.png\n")
    (tmp_path / "sampleSubmission.csv").write_text("image,label\na.png,x\n")
    (tmp_path / "Submission.csv").write_text("image,label\na.png,x\n")
    assert list(read_given(tmp_path).shown) == ["a.png"]
