from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fivefold.csv_tables import PATH_NAMES, check_same_ids, check_unique, normalize_names, open_csv
from fivefold.errors import DataError, MissingInputError


def write_table(folder: Path, text: str | bytes) -> Path:
    (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "t.csv"


@pytest.mark.parametrize(
    "text",
    [
        "id,text\n007,NA\n1e3,\n",
        "\ufeffid,text\r\n007,NA\r\n1e3,\r\n",
        "id,text\r007,NA\r1e3,",
        "id;text\n007;NA\n1e3;\n",
        "sep=;\r\nid;text\r\n007;NA\r\n1e3;\r\n",
        '"id"\t"text"\n007\tNA\n"1e3"\t""\n',
        "\n \r\nid,text\n\n007,NA\n  \n1e3,\n\n",
        ",id,text\n0,007,NA\n1,1e3,\n",
        "Unnamed: 0,id,text\n0,007,NA\n1,1e3,\n",
    ],
)
def test_all_csv_dialects_are_read_as_the_same_text(tmp_path, text):
    table = open_csv(write_table(tmp_path, text))
    assert table.columns == ("id", "text")
    assert table.read().to_dict("list") == {"id": ["007", "1e3"], "text": ["NA", ""]}
    assert table.read(["text", "id", "text"]).columns.tolist() == ["text", "id"]
    assert (table.has_bom, table.line_end) == (text[0] == "\ufeff", "\r\n" if "text\r\n" in text else "\n")


@pytest.mark.parametrize(
    "text",
    ["id;a, b;c\n1;0,5;0,5\n", "id;a, b;c\n", 'id;"a, b";c\n1;0,5;0,5\n2;0,25;0,75\n', "id\ta, b\tc\n1\t.5\t.5\n"],
)
def test_comma_in_a_column_name_does_not_split_headers_with_other_delimiters(tmp_path, text):
    table = open_csv(write_table(tmp_path, text))
    assert table.columns == ("id", "a, b", "c")


def test_large_table_with_line_breaks_in_cells_is_read_correctly(tmp_path):
    lines = [f'{n},"a, ""note""\nof\n\nlines {n}",x' for n in range(60_000)]
    table = open_csv(write_table(tmp_path, "\n".join(["id,note,label", *lines])))
    expected = [[str(n), f'a, "note"\nof\n\nlines {n}', "x"] for n in range(60_000)]
    assert table.read().values.tolist() == expected


def test_cell_may_be_longer_than_the_limit_of_the_csv_module(tmp_path):
    mask = "1 2 " * 50_000
    table = open_csv(write_table(tmp_path, f"id,mask,label\n1,{mask},x\n"))
    assert table.read(["id", "label"]).values.tolist() == [["1", "x"]]


@pytest.mark.parametrize("text", [",text\n007,NA\n", ",target,text\n1,a,b\n", ",0.5,1\n7,.25,.75\n"])
def test_unnamed_first_column_that_is_no_index_is_kept(tmp_path, text):
    assert open_csv(write_table(tmp_path, text)).columns[0] == ""


def test_column_names_are_matched_case_insensitively(tmp_path):
    table = open_csv(write_table(tmp_path, "ID, Img_Path ,image\n1,2,3\n"))
    assert table.column("", PATH_NAMES) == " Img_Path "
    assert (table.column("id"), table.column("Image"), table.column("no")) == ("ID", "image", None)
    with pytest.raises(DataError, match=r"no column 'no'; it has ID, .*; set data\.key"):
        table.require_column("no", (), "data.key")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n\n", "empty"),
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n\n3\n", "line 4 has 1 cells, the header 2"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells"),
        ('a,b\n1,"2\n3,"4\n', "quote may be missing"),
        ('a,b\n1,"2\n', "quote may be missing"),
        ("a,b,a\n1,2,3\n", "column.* 'a'"),
        ("a,b\n1,고양이\n".encode("cp949"), "UTF-8"),
    ],
)
def test_invalid_table_is_rejected_with_the_place_of_the_fault(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"t\.csv.*{message}"):
        open_csv(write_table(tmp_path, text)).read()
    with pytest.raises(MissingInputError):
        open_csv(tmp_path / "absent.csv")


def test_numbers_accept_decimal_commas_and_reject_other_cells_by_row_and_column(tmp_path):
    for text in ("a,b\n.5,1e-3\n 2 ,nan\n", 'a,b\n"0,5","1e-3"\n2,nan\n', "a;b\n0,5;1e-3\n2;nan\n"):
        table = open_csv(write_table(tmp_path, text))
        np.testing.assert_array_equal(table.numbers(table.read()), [[0.5, 1e-3], [2, np.nan]])
    table = open_csv(write_table(tmp_path, "a,b\n1,2\n3,x\n"))
    with pytest.raises(DataError, match="'x' in row 2 below the header, column 'b'"):
        table.numbers(table.read())


def test_names_are_normalized_and_ids_must_be_unique_and_match():
    assert normalize_names(pd.Series([" e\u0301", "\u00e9 "])).tolist() == ["\u00e9", "\u00e9"]
    with pytest.raises(DataError, match=r"t: .*'id': '7'"):
        check_unique(pd.Series(["7", "8", "7"], name="id"), "t")
    check_same_ids(["7", "8"], "t", ["8", "7"], "u")
    message = r"1 of the 2 ids of t are not in u \('7'\); 2 of the 3 ids of u are not in t \('007', '9'\)"
    with pytest.raises(DataError, match=message):
        check_same_ids(["7", "8"], "t", ["8", "007", "9"], "u")
