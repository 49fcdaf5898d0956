import unicodedata
from pathlib import Path

import pytest

from fivefold.data.readers.user_images import check_labels, labels_from_folders, read_user_images
from fivefold.errors import DataError
from toy_data import write_data

CLASSES = ("dog", unicodedata.normalize("NFC", "été"))
DECOMPOSED = unicodedata.normalize("NFD", "été")


def test_true_classes_of_a_table_are_normalised_and_unknown_ones_are_rejected(tmp_path: Path):
    write_data(tmp_path, list=f"image_path,true_class\na.png,{DECOMPOSED}\nb.png, dog \nc.png,\n")
    images = read_user_images(tmp_path / "list.csv")
    assert tuple(images.labels) == (CLASSES[1], "dog", "")
    check_labels(images, CLASSES)
    with pytest.raises(DataError, match=r"1 of 3 rows have true classes .*: 'dog'; .*leave such cells empty"):
        check_labels(images, CLASSES[1:])


def test_class_folders_with_decomposed_names_give_the_true_classes(tmp_path: Path):
    write_data(tmp_path, "dog/1.png", f"{DECOMPOSED}/1.png")
    assert sorted(labels_from_folders(read_user_images(tmp_path), CLASSES).labels) == sorted(CLASSES)


@pytest.mark.parametrize(
    ("header", "names"),
    [("image_id", ["a", "b"]), ("image", ["images/A.PNG", "images/b.png"]), ("path", ["b.png", "a.png"])],
)
def test_table_names_are_resolved_to_images_in_the_folder(tmp_path: Path, header: str, names: list[str]):
    images = read_user_images(write_data(tmp_path, "images/a.png", "images/b.png", test="\n".join([header, *names])))
    assert list(images.names) == names
    assert all(images.store.read(path) for path in images.paths)
    assert [Path(path).stem for path in images.paths] == [Path(name).stem.lower() for name in names]


def test_id_column_can_name_the_images_next_to_the_table(tmp_path: Path):
    root = write_data(tmp_path / "data", *(f"images/{n}.png" for n in range(4)), test="id,label\n3,dog\n0,dog\n")
    images = read_user_images(root / "test.csv")
    assert [Path(path).name for path in images.paths] == ["3.png", "0.png"]
    assert list(images.labels) == ["dog", "dog"]


def test_sample_submission_is_not_read_as_a_table_of_images(tmp_path: Path):
    sample = "image,label\na.png,x\n"
    write_data(tmp_path, list="image_path\na.png\n", sampleSubmission=sample, Submission=sample)
    assert list(read_user_images(tmp_path).names) == ["a.png"]
