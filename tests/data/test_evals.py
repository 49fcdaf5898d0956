"""Sample submissions as people write them: spelling, rows, columns and ends of lines."""

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from fivefold.data.evals import check_rows, read_eval
from fivefold.errors import DataError

TEST = "ID,img_path\n00,0.png\n01,1.png\n"


def made(root: Path, folder: str = "", **tables: str) -> Path:
    """Two images in a folder, and `test="..."` as test.csv at the root."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        Image.new("L", (2, 2)).save(root / folder / f"{number}.png")
    for name, text in tables.items():
        (root / f"{name}.csv").write_text(text, encoding="utf-8", newline="")
    return root


@pytest.mark.parametrize("name", ["sampleSubmission", "Sample-Submission", "sample submission", "sample_submission"])
def test_a_sample_submission_is_known_however_it_is_spelt(tmp_path, name):
    made(tmp_path, test=TEST, **{name: "ID,label\n00,x\n01,x\n"})
    sample = read_eval(tmp_path).sample
    assert sample is not None
    assert sample.classes == ("label",)
    (tmp_path / "test.csv").unlink()
    assert len(read_eval(tmp_path)) == 2, "it is no table of images"


def test_classes_are_plain_and_the_header_stays_as_it_stands(tmp_path):
    written = ("ID", " dog", unicodedata.normalize("NFD", "é"))
    made(tmp_path, test=TEST, sample_submission=f"{','.join(written)}\n00,0,0\n01,0,0\n")
    sample = read_eval(tmp_path).sample
    assert sample is not None
    assert (sample.classes, tuple(sample.header)) == (("dog", unicodedata.normalize("NFC", "é")), written)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_as_those_of_the_sample(tmp_path, end):
    made(tmp_path, test=TEST, sample_submission=f"ID,label{end}00,x{end}01,x{end}")
    sample = read_eval(tmp_path).sample
    assert sample is not None
    assert sample.end == end


@pytest.mark.parametrize("ids", [("0.png", "1.png"), ("0", "1"), ("test/0.png", "test/1.png"), ("test/0", "test/1")])
def test_ids_without_a_table_may_be_names_or_paths_with_a_suffix_or_none(tmp_path, ids):
    made(tmp_path, "test", sample_submission=f"ID,label\n{ids[1]},x\n{ids[0]},x\n")
    table = read_eval(tmp_path)
    check_rows(table)
    assert (tuple(table.ids), table.paths.tolist()) == (ids, ["test/0.png", "test/1.png"])


@pytest.mark.parametrize("rows", ["0,x\n1,x\n", "00,x\n", "00,x\n01,x\n02,x\n"])
def test_a_sample_of_other_rows_is_refused(tmp_path, rows):
    table = read_eval(made(tmp_path, test=TEST, sample_submission=f"ID,label\n{rows}"))
    with pytest.raises(DataError, match=r"sample submission and the test images name other rows: .*ids"):
        check_rows(table)


def test_a_sample_of_the_same_rows_fits_in_any_order(tmp_path):
    check_rows(read_eval(made(tmp_path, test=TEST, sample_submission="ID,label\n01,x\n00,x\n")))
    check_rows(read_eval(made(tmp_path, test=TEST)))
