import unicodedata
from pathlib import Path

import pytest

from fivefold.data.readers.eval_images import check_rows, read_eval
from fivefold.data.readers.stores import open_store
from fivefold.errors import DataError
from toy_data import write_data

TEST = "ID,img_path\n00,0.png\n01,1.png\n"


def write_test_data(root: Path, folder: str = ".", **tables: str) -> Path:
    """Write two images to a folder, and `test="..."` as test.csv at the root."""
    return write_data(root, f"{folder}/0.png", f"{folder}/1.png", **tables)


@pytest.mark.parametrize("name", ["sampleSubmission", "Sample-Submission", "sample submission", "sample_submission"])
def test_sample_submission_is_recognised_in_every_spelling(tmp_path, name):
    write_test_data(tmp_path, test=TEST, **{name: "ID,label\n00,x\n01,x\n"})
    assert read_eval(tmp_path).sample.classes == ("label",)
    (tmp_path / "test.csv").unlink()
    assert len(read_eval(tmp_path)) == 2, "a sample submission is not a table of images"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sample_classes_are_normalised_but_header_and_line_endings_are_kept(tmp_path, end):
    header = ("ID", " dog", unicodedata.normalize("NFD", "é"))
    write_test_data(tmp_path, test=TEST, sample_submission=end.join([",".join(header), "01,0,0", "00,0,0", ""]))
    table = read_eval(tmp_path)
    check_rows(table)  # the sample has the same rows in another order
    classes = ("dog", unicodedata.normalize("NFC", "é"))
    assert (table.sample.classes, tuple(table.sample.header), table.sample.line_ending) == (classes, header, end)


@pytest.mark.parametrize("ids", [("0.png", "1.png"), ("0", "1"), ("test/0.png", "test/1.png"), ("test/0", "test/1")])
def test_sample_ids_may_be_names_or_paths_with_or_without_suffix(tmp_path, ids):
    write_test_data(tmp_path, "test", sample_submission=f"ID,label\n{ids[1]},x\n{ids[0]},x\n")
    table = read_eval(tmp_path)
    check_rows(table)
    assert (tuple(table.ids), table.paths.tolist()) == (ids, ["test/0.png", "test/1.png"])


SAMPLE = "\ufeffID,cat,dog\nT_2,.5,.5\nT_1,.5,.5\n"


def test_table_with_ids_and_a_sample_submission_is_read(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", "test/T_1.png", "test/T_2.png", "train/cat/1.png")
    test = "\ufeffID,img_path\nT_2,./test/T_2.png\nT_1,./test/T_1.png\n"
    write_data(root, test=test, train="path,label\n", gt="ID,label\n", sample_submission=SAMPLE)
    for source in (root, open_store(root)):
        table = read_eval(source)
        assert (table.id_column, table.ids.tolist()) == ("ID", ["T_2", "T_1"])
        assert table.paths.tolist() == ["test/T_2.png", "test/T_1.png"]
        assert (table.sample.id_column, table.sample.classes) == ("ID", ("cat", "dog"))
        assert table.sample.ids.tolist() == ["T_2", "T_1"]
        assert table.with_label_column("target", "ID").sample == table.sample  # a sample submission takes precedence


def test_table_paths_may_be_relative_to_the_test_folder(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", "test/1.png", "test/0.png", test="image_path\n1.png\n0.png\n")
    table = read_eval(root)
    assert (table.id_column, table.ids.tolist()) == ("image_path", ["1.png", "0.png"])
    assert table.paths.tolist() == ["test/1.png", "test/0.png"]
    assert table.sample is None
    kaggle = write_data(tmp_path / "kaggle", "test_images/1.png", "train_images/1.png", test="image_id\n1.png\n")
    assert read_eval(kaggle).paths.tolist() == ["test_images/1.png"]
    sample = table.with_label_column("target", "ID").sample
    assert (sample.row_number_column, sample.id_column, sample.classes) == ("ID", "image_path", ("target",))
    assert (sample.ids.tolist(), table.with_label_column("").sample) == (["1.png", "0.png"], None)


def test_image_folder_is_read_without_a_table(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", "test/T_1.png", "test/T_2.png", "train/cat/1.png")
    assert read_eval(root).ids.tolist() == ["T_1.png", "T_2.png"]
    table = read_eval(write_data(root, sample_submission=SAMPLE))
    assert (table.ids.tolist(), table.paths.tolist()) == (["T_1", "T_2"], ["test/T_1.png", "test/T_2.png"])
    for train, test in (("Training", "Testing"), ("train_images", "test_images"), ("seg_train", "seg_test")):
        root_with_train = write_data(tmp_path / test, f"{train}/a/1.png", f"{test}/a/2.png", f"{test}/b/3.png")
        assert read_eval(root_with_train).paths.tolist() == [f"{test}/a/2.png", f"{test}/b/3.png"]
    flat = write_data(tmp_path / "flat", "b.png", "a.png")
    assert read_eval(flat).ids.tolist() == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("names", "tables", "message"),
    [
        ([], {}, "no test.csv and no images"),
        (["1.png"], {"test": "ID,img_path\na,1.png\nb,2.png\n"}, r"1 of 2 files .*'2\.png'"),
        (["1.png"], {"test": "ID,img_path\na,../1.png\n"}, r"'\.\./1\.png'"),
        (["1.png"], {"test": "ID,img_path\na,1.png\na,1.png\n"}, "ids .*'ID': 'a'"),
        (
            ["1.png"],
            {"test": "ID,name\na,b.png\n"},
            "no column image_path, img_path, path or the like; it has ID, name",
        ),
    ],
)
def test_missing_images_and_invalid_tables_are_rejected(tmp_path: Path, names: list[str], tables: dict, message: str):
    with pytest.raises(DataError, match=message):
        read_eval(write_data(tmp_path, *names, **tables))


def test_table_may_use_the_configured_columns_or_standard_ones(tmp_path: Path) -> None:
    write_data(tmp_path, "a.png")
    for header, ids in (("foto,nummer", ["7"]), ("img_path,ID", ["7"]), ("foto,img_path", ["a.png"])):
        second = "a.png" if header == "foto,img_path" else "7"
        (tmp_path / "test.csv").write_text(f"{header}\na.png,{second}\n")
        table = read_eval(tmp_path, id_column="nummer", path_column="foto")
        assert (table.ids.tolist(), table.paths.tolist()) == (ids, ["a.png"])


def test_path_column_is_the_one_that_names_images_outside_the_training_folder(tmp_path: Path) -> None:
    root = write_data(tmp_path, "x/1.jpg", "y/2.jpg", "train/3.jpg", test="ID,size\n2,7\n1,8\n")
    table = read_eval(root)
    assert (table.ids.tolist(), table.paths.tolist()) == (["2", "1"], ["y/2.jpg", "x/1.jpg"])
    with pytest.raises(DataError, match="no column"):
        read_eval(write_data(root, test="ID,size\n3,7\n"))


@pytest.mark.parametrize(("delimiter", "value", "decimal"), [(";", "0,5", ","), (";", "0.5", "."), ("\t", "0", ".")])
def test_sample_delimiter_and_decimal_comma_are_kept(tmp_path, delimiter, value, decimal):
    lines = [["ID", "cat", "dog"], ["00", value, value], ["01", value, value]]
    text = "".join(delimiter.join(line) + "\n" for line in lines)
    sample = read_eval(write_test_data(tmp_path, test=TEST.replace(",", ";"), sample_submission=text)).sample
    assert (sample.delimiter, sample.decimal, sample.classes) == (delimiter, decimal, ("cat", "dog"))


def test_sample_decimal_comma_is_detected_in_any_column(tmp_path):
    for text in ("ID;cat;dog\n00;1;0\n01;0,5;0\n", 'ID,cat,dog\n00,"0,5","1"\n01,"0,5",0\n'):
        sample = read_eval(write_test_data(tmp_path, test=TEST, sample_submission=text)).sample
        assert sample.decimal == ","
