from collections import Counter
from pathlib import Path

import pytest

from fivefold.data.readers.training_rows import LabelledImages
from fivefold.errors import DataError, FivefoldError, SettingsError
from toy_data import load_rows, write_data

HEADER = "id,category_name,main_image,back_image,text_tag_image,neck_tag_image,other"


def read_products(root: Path, *lines: str, header: str = HEADER, **options: object) -> LabelledImages:
    """Return the rows of a folder; with `lines`, first write them as image_data.csv, and images with one-letter names."""
    if lines:
        write_data(root, *(f"{name}.png" for name in "abcdefgh"), image_data="\n".join([f"\ufeff{header}", *lines]))
    return load_rows(root, layout="products", **options)


def test_images_get_the_class_of_their_column_and_their_product_and_category(tmp_path: Path) -> None:
    rows = read_products(tmp_path, "7,상의,a.png&b.png,c.png,d.png,,", '07, 하의 ,"e.png, f.png",,,g.png,h.png')
    columns = [column.to_pylist() for column in (rows.paths, rows.groups, rows.strata)]
    records = zip([rows.classes[code] for code in rows.codes], *columns, strict=True)
    assert list(records) == [
        ("full_shot", "a.png", "7", "상의"),
        ("full_shot", "b.png", "7", "상의"),
        ("full_shot", "c.png", "7", "상의"),
        ("care_label", "d.png", "7", "상의"),
        ("full_shot", "e.png", "07", "하의"),
        ("full_shot", "f.png", "07", "하의"),
        ("neck_label", "g.png", "07", "하의"),
        ("detail_shot", "h.png", "07", "하의"),
    ]
    assert rows.ids.to_pylist() == rows.paths.to_pylist()


def test_products_without_images_and_duplicate_images_in_one_row_are_reported(tmp_path, caplog):
    rows = read_products(tmp_path, "1,x,a.png,,b.png,,", "2,x,,,,, & ", "3,y,c.png,./c.png,,,")
    assert Counter(rows.groups.to_pylist()) == {"1": 2, "3": 1}
    assert "1 products of image_data.csv" in caplog.text
    assert "data: 1 images " in caplog.text


def test_paths_are_relative_to_the_image_root(tmp_path: Path) -> None:
    for base in ("deep/er", f"{tmp_path}/deep/er", "deep\\er/"):
        rows = read_products(tmp_path, "1,x,a.png,,b.png,,", image_root=base, check_files=False)
        assert rows.paths.to_pylist() == ["deep/er/a.png", "deep/er/b.png"]
    with pytest.raises(DataError, match=r"2 of 2 files that do not exist: 'deep/er/a.png'"):
        read_products(tmp_path, image_root="deep/er")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,x,a.png,,b.png,,", "1,x,c.png,,,,"], "ids .*column 'id': '1'"),
        (["1,x,a.png,,b.png,,", "2,x,a.png,,,,"], r"'a.png' is an image of two products, '1', '2'"),
        (["1,x,a.png,,a.png,,"], "'a.png' is an image of two image types, 'full_shot'"),
        (["1,x,a.png,,b.png,,", "2, ,c.png,,,,"], "1 rows with an empty category, the first in row 2 below the header"),
        (["1,x,a.png,,b.png,,", ",x,c.png,,,,"], "1 rows with an empty id, the first in row 2 below the header"),
        (["1,x,a.png,,z.png,,"], "names 1 of 2 files that do not exist: 'z.png'"),
        (["1,x,a.png,,b.png,,", "2,x,,,,,", "3,x,../c.png,,,,"], "c.png'; the first in row 3 below the header"),
        (["1,x,,,,,"], "no image in the columns main_image"),
        (["1,x,a.png,b.png,,,"], r"only 1 class \('full_shot'\)"),
    ],
)  # fmt: skip
def test_contradictory_or_incomplete_product_rows_are_rejected(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_products(tmp_path, *lines)


def test_missing_columns_tables_or_a_second_class_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'other'; it has .*; set data.image_types"):
        read_products(tmp_path, "1,x,a.png,,b.png,", header=HEADER.removesuffix(",other"))
    with pytest.raises(SettingsError, match="fewer than two classes"):
        read_products(tmp_path, image_types={"main_image": "one", "back_image": "one"})
    (tmp_path / "image_data.csv").rename(tmp_path / "other.csv")
    with pytest.raises(DataError, match=r"other.csv .* has no column 'other'"):
        read_products(tmp_path)
    (tmp_path / "other.csv").unlink()
    with pytest.raises(DataError, match=r"no image_data.csv in .*, nor another CSV"):
        read_products(tmp_path)


def test_table_with_another_name_is_identified_by_its_columns_or_the_setting(tmp_path: Path) -> None:
    read_products(tmp_path, "1,x,a.png,,b.png,,")
    (tmp_path / "image_data.csv").rename(tmp_path / "상품.csv")
    assert len(read_products(tmp_path)) == 2
    (tmp_path / "again.csv").write_bytes((tmp_path / "상품.csv").read_bytes())
    with pytest.raises(FivefoldError, match="several tables"):
        read_products(tmp_path)
    assert len(read_products(tmp_path, table="again.csv")) == 2
