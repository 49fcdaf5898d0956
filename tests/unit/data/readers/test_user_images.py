"""True classes beside images that somebody hands over, as they write them."""

import unicodedata
from pathlib import Path

import pytest

from fivefold.data.readers.user_images import check_labels, labels_from_folders, read_user_images
from fivefold.errors import DataError
from toy_data import write_data

CLASSES = ("dog", unicodedata.normalize("NFC", "été"))


DECOMPOSED = unicodedata.normalize("NFD", "été")


def test_true_classes_of_a_table_are_plain(tmp_path: Path):
    text = f"image_path,true_class\na.png,{DECOMPOSED}\nb.png, dog \nc.png,\n"
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    given = read_user_images(tmp_path / "list.csv")
    assert tuple(given.labels) == (CLASSES[1], "dog", "")
    check_labels(given, CLASSES)


def test_folders_in_decomposed_letters_are_the_truth(tmp_path: Path):
    write_data(tmp_path, "dog/1.png", f"{DECOMPOSED}/1.png")
    assert sorted(labels_from_folders(read_user_images(tmp_path), CLASSES).labels) == sorted(CLASSES)


def test_an_unknown_true_class_is_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "list.csv").write_text("image_path,true_class\na.png,cow\nb.png,dog\nc.png,cow\n")
    with pytest.raises(DataError, match=r"2 of 3 rows have true classes .*: 'cow'; .*leave such cells empty"):
        check_labels(read_user_images(tmp_path / "list.csv"), CLASSES)


@pytest.mark.parametrize(
    ("header", "names"),
    [("image_id", ["a", "b"]), ("image", ["images/A.PNG", "images/b.png"]), ("path", ["b.png", "a.png"])],
)
def test_images_of_a_table_are_found_by_their_names_in_the_folder(tmp_path: Path, header: str, names: list[str]):
    root = write_data(tmp_path / "data", "images/a.png", "images/b.png")
    (root / "test.csv").write_text("\n".join([header, *names]) + "\n")
    given = read_user_images(root)
    assert list(given.names) == names
    assert all(given.store.read(path) for path in given.paths)
    assert [Path(path).stem for path in given.paths] == [Path(name).stem.lower() for name in names]


def test_a_table_without_paths_may_name_the_images_beside_it(tmp_path: Path):
    root = write_data(tmp_path / "data", *(f"images/{n}.png" for n in range(4)), test="id,label\n3,dog\n0,dog\n")
    given = read_user_images(root / "test.csv")
    assert [Path(path).name for path in given.paths] == ["3.png", "0.png"]
    assert list(given.labels) == ["dog", "dog"]


def test_a_sample_however_it_is_spelt_is_no_table_of_images(tmp_path: Path):
    (tmp_path / "list.csv").write_text("image_path\na.png\n")
    (tmp_path / "sampleSubmission.csv").write_text("image,label\na.png,x\n")
    (tmp_path / "Submission.csv").write_text("image,label\na.png,x\n")
    assert list(read_user_images(tmp_path).names) == ["a.png"]
