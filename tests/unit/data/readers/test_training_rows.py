import logging
from pathlib import Path

import pytest

from fivefold.config.schema import Data
from fivefold.data.readers.stores import open_store
from fivefold.data.readers.training_rows import LabelledImages, read_rows
from fivefold.errors import DataError, MissingInputError
from toy_data import PICTURE, load_rows, write_data, zip_folder


def label_map(rows: LabelledImages) -> dict[str, str]:
    return dict(zip(rows.paths.to_pylist(), [rows.classes[code] for code in rows.codes], strict=True))


CATS_AND_DOGS = {"cat/1.png": "cat", "cat/deep/er/2.png": "cat", "dog/1.png": "dog"}


@pytest.mark.parametrize("prefix", ["", "train/", "wrapper/", "wrapper/train/", "Train/images/", "a/b/c/"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_class_folders_are_found_inside_wrapper_and_train_folders(tmp_path: Path, prefix: str, packed: bool) -> None:
    root = write_data(tmp_path / "data", *(prefix + name for name in CATS_AND_DOGS), f"{prefix}.thumbs/x.png")
    (root / prefix / "cat" / "notes.txt").write_text("no image")
    rows = load_rows(zip_folder(root) if packed else root)
    assert label_map(rows) == {prefix + name: label for name, label in CATS_AND_DOGS.items()}
    assert rows.ids.to_pylist() == rows.paths.to_pylist() == sorted(rows.paths.to_pylist())
    assert rows.groups.null_count == len(rows)


@pytest.mark.parametrize(
    ("folder", "other_files"),
    [
        ("train", "test/1.png test/2.png valid/a/3.png test.csv"),
        ("train_images", "test_images/1.png val_images/2.png"),
        ("training-set/training-set", "test-set/1.png"),
        ("seg_train", "seg_pred/1.png seg_test/a/1.png"),
        (".", "Test/1.png unlabeled/1.png test_images/1.png"),
    ],
)
def test_folders_named_like_split_parts_are_not_classes(tmp_path: Path, folder: str, other_files: str) -> None:
    rows = load_rows(write_data(tmp_path / "data", f"{folder}/a/1.png", f"{folder}/b/1.png", *other_files.split()))
    assert rows.classes == ("a", "b")
    assert rows.paths.to_pylist() == [str(Path(folder, name)) for name in ("a/1.png", "b/1.png")]


CLASSES = ["bus", "test tube", "train station"], ["bus", "fold", "id", "p,q r", "train", "사과"], ["invalid", "valid"]


@pytest.mark.parametrize("classes", CLASSES)
def test_class_names_similar_to_split_parts_remain_classes(tmp_path: Path, classes: list[str]) -> None:
    rows = load_rows(write_data(tmp_path / "data", *(f"{name}/1.png" for name in classes)))
    assert list(rows.classes) == classes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.png", "b/1.png", "test/1.png"], ": 'test'; rename"),
        (["a/1.png", "b/1.png", "cover.png"], "in no class folder"),
        (["a/1.png", "b/x/1.png", "b/y/1.png"], "'b/x', 'b/y'"),
    ],
)
def test_ambiguous_image_folders_cause_a_warning(tmp_path, caplog, names, message):
    assert load_rows(write_data(tmp_path / "data", *names)).classes == ("a", "b")
    assert message in caplog.text


CSV = "image_path,target\na/1.png,cat\nb/2.png,dog\n"


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (["a/1.png", "b/2.png"], CSV),
        (["train/a/1.png", "train/b/2.png"], CSV),
        (["a/1.png", "b/2.png"], CSV.replace("\na/", "\n./a/").replace("\nb/", "\nb\\")),
        (["a/1.png", "b/2.png"], "\ufeffID,img_path,label\n7,a/1.png,cat\n8,b/2.png,dog\n"),
        (["a/1.png", "b/2.png"], "class_name,image_path,target\nx,a/1.png,cat\ny,b/2.png,dog\n"),
        (["a/1.png", "b/2.png"], 'Path, Label \r\n"a/1.png",cat \r\nb/../b/2.png,dog\r\n'),
        (["train_images/a/1.png", "train_images/b/2.png"], CSV.replace("image_path", "image_id")),
        (["images/a/1.png", "images/b/2.png"], CSV.replace("image_path", "Image_Name")),
        (["a/1.png", "b/2.png"], CSV.replace(".png", "")),
        (["train/a/1.PNG", "train/b/2.PNG", "test/3.jpg"], CSV.replace(".png", "").replace("image_path", "image_id")),
        (["a/1.png", "b/2.png"], CSV.replace("a/", " a/").replace("2.png", "2.png\t ")),
    ],
)
def test_columns_and_paths_of_a_csv_are_recognised(tmp_path: Path, names: list[str], table: str) -> None:
    rows = load_rows(write_data(tmp_path / "data", *names, train=table))
    assert list(label_map(rows).values()) == ["cat", "dog"]
    assert rows.paths.to_pylist() == names[:2]
    assert rows.layout == "the CSV train.csv"


def test_paths_may_be_relative_to_the_csv_or_the_root(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", "img/1.png", "img/2.png")
    for start in ("../img", "img", f"{root}/img"):
        write_data(root / "meta", labels=f"path,label\n{start}/1.png,a\n{start}/2.png,b\n")
        assert list(label_map(load_rows(root, table="meta/labels.csv"))) == ["img/1.png", "img/2.png"]


def test_absolute_paths_may_use_a_link_to_the_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_data(tmp_path / "data", "img/1.png", "img/2.png")
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for channel in (root, tmp_path / "link", Path("data"), Path("link")):
        for absolute_root in {root, channel.absolute()}:
            write_data(root, train=f"path,label\n{absolute_root}/img/1.png,a\n{absolute_root}/img/2.png,b\n")
            assert list(label_map(load_rows(channel))) == ["img/1.png", "img/2.png"]
            write_data(root, train="path,label\n1.png,a\n2.png,b\n")
            assert list(label_map(load_rows(channel, image_root=f"{absolute_root}/img"))) == ["img/1.png", "img/2.png"]
    write_data(root, train="path,label\nimg/1.png,a\nimg/2.png,b\n")
    assert len(load_rows(Path("data"), image_root=str(root))) == 2


def test_group_names_are_normalised_like_labels(tmp_path: Path) -> None:
    groups = ["p1", " p1", "p1\t", "caf\u00e9", "cafe\u0301", " ", ""]
    names = [f"{number}.png" for number in range(len(groups))]
    lines = [f'{name},{"ab"[n % 2]},"{group}"' for n, (name, group) in enumerate(zip(names, groups, strict=True))]
    root = write_data(tmp_path / "data", *names, train="\n".join(["path,label,who", *lines]))
    loaded_groups = load_rows(root, group_column="who").groups.to_pylist()
    assert loaded_groups == ["p1", "p1", "p1", "caf\u00e9", "caf\u00e9", None, None]


def test_columns_are_configurable_values_stay_text_and_other_images_are_counted(tmp_path: Path) -> None:
    table = "no,file,kind,who,path,label\n007,1.png,NA,p1,x,x\n7,2.png,1.0,,x,x\n08,3.png,1,p1,x,x\n"
    root = write_data(tmp_path / "data", *(f"{n}.png" for n in range(1, 6)), train=table)
    rows = load_rows(root, id_column="no", path_column="file", label_column="kind", group_column="who")
    assert rows.ids.to_pylist() == ["007", "7", "08"]
    assert (rows.classes, rows.groups.to_pylist()) == (("1", "1.0", "NA"), ["p1", None, "p1"])
    assert rows.ignored == {"not in the table": 2}


def test_a_stray_csv_does_not_hide_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_data(tmp_path / "data", *CATS_AND_DOGS, colours="name,red\na,1\n", sizes="name,wide\na,1\n")
    assert label_map(load_rows(root, layout="folders")) == CATS_AND_DOGS
    assert not caplog.records
    assert label_map(load_rows(root)) == CATS_AND_DOGS
    write_data(root / "train", labels="path,label\n../cat/1.png,a\n../dog/1.png,b\n")
    assert load_rows(root).layout == "the CSV train/labels.csv"
    reported_tables = [record.getMessage().split()[1] for record in caplog.records if record.levelno == logging.WARNING]
    assert reported_tables == ["colours.csv", "sizes.csv"] * 2


@pytest.mark.parametrize(
    ("header", "keys"),
    [
        ("foto,breed", "data.path_column and data.label_column"),
        ("image_id,breed", "data.label_column"),
        ("foto,label", "data.path_column"),
    ],
)
def test_unusable_table_named_train_is_an_error(tmp_path: Path, header: str, keys: str) -> None:
    root = write_data(tmp_path / "data", *CATS_AND_DOGS)
    (root / "Train.csv").write_text(f"{header}\nphoto 1,x\n")
    with pytest.raises(DataError, match=rf"Train\.csv in .* has no column .*set {keys}, or data\.layout=folders"):
        load_rows(root)
    assert label_map(load_rows(root, layout="folders")) == CATS_AND_DOGS


def test_paths_match_files_in_another_unicode_normal_form(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9/\uac00.png", "cafe\u0301/\u1100\u1161.png"
    pairs = [(composed, apart), (apart, composed), ("caf\u00e9/\u1100\u1161.png", apart)]
    for number, (disk, written) in enumerate(pairs):
        root = write_data(tmp_path / str(number), disk, "b.png", train=f"path,label\n{written},a\nb.png,b\n")
        store = open_store(root)
        assert [store.read(path) for path in read_rows(store, Data()).paths.to_pylist()] == [PICTURE, PICTURE]


TABLE = "image_path,target\n1.png,a\n{},b\n"


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        ("", "", "holds no images"),
        ("train.zip test.zip", "", r"content: 2 \.zip"),
        ("cat/1.png cat/2.png", "", r"only 1 class \('cat'\)"),
        ("test/1.png", "", "holds no class folders"),
        ("train_images/1.png test_images/1.png train_masks/1.png", "", "data/train_images holds no class folders"),
        ("1.png", TABLE.format("2.png"), r"names 1 of 2 files.*'2\.png'"),
        ("1.png", TABLE.format("../2.png"), r": '\.\./2\.png'; the first in row 2 below"),
        ("1.png", TABLE.format("/etc/passwd"), ": .*passwd.*the first in row"),
        ("1.png", TABLE.format(""), "empty or .*the first in row"),
        ("1.png", TABLE.format("1.png"), r"ids .*'image_path': '1\.png'"),
        ("1.png", "id,path,label\nx,1.png,a\ny,1.png,b\nx,1.png,b\n", r"ids .*column 'id': 'x'"),
        ("1.png", "picture,target\n", "no column image_path, img_path, path or the like; it has picture, target"),
        ("1.png", "path,kind\n", "no column target, label, class_name or the like; it has path, kind"),
        ("1.png", 'path,note,label\n1.png,"x\n\ny",a\n2.png,,\n', "the first in row 2 below the header"),
        ("1.png", 'path,label\n1.png,"a\n2.png,b"\n', r"row 1 below the header has a line break: 'a\\n2\.png,b'"),
    ],
)
def test_unusable_training_data_are_rejected(tmp_path: Path, names: str, table: str, message: str) -> None:
    root = write_data(tmp_path / "data", *names.split(), **({"train": table} if table else {}))
    with pytest.raises(DataError, match=message):
        load_rows(root)
    if "names 1 of 2 files" in message:
        assert load_rows(root, check_files=False).paths.to_pylist() == ["1.png", "2.png"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"table": "none.csv"}, MissingInputError, "no table none.csv"),
        ({"layout": "csv"}, DataError, "several tables.*set data.table"),
        *(
            ({"table": "a.csv", key: "no"}, DataError, rf"no column 'no'; it has image_path, target; set data\.{key}")
            for key in ("id_column", "path_column", "label_column", "group_column")
        ),
    ],
)
def test_configured_tables_and_columns_must_exist(tmp_path: Path, options: dict, error: type, message: str) -> None:
    root = write_data(tmp_path / "data", "a/1.png", "b/2.png", a=CSV, b=CSV)
    with pytest.raises(error, match=message):
        load_rows(root, **options)
    with pytest.raises(DataError, match="no CSV"):
        load_rows(write_data(tmp_path / "none", "a/1.png"), layout="csv")


def test_selected_rows_keep_only_their_classes(tmp_path: Path) -> None:
    rows = load_rows(write_data(tmp_path / "data", "a/1.png", "b/1.png", "c/1.png"))
    selected = rows.take(rows.codes != 1)
    assert label_map(selected) == {"a/1.png": "a", "c/1.png": "c"}
    assert selected.classes == ("a", "c")
    with pytest.raises(DataError, match="only 1 class"):
        rows.take(rows.codes == 1)


def write_images(root: Path, *folders: str, suffix: str = ".jpg", count: int = 12) -> list[str]:
    """Write images 000.jpg, 001.jpg, … to `folders` in turn; return their names."""
    names = [f"{folders[n % len(folders)]}/{n:03d}{suffix}" for n in range(count)]
    write_data(root, *names)
    return names


def make_table(header: str, count: int = 12, suffix: str = "") -> str:
    return f"{header}\n" + "".join(f"{n:03d}{suffix},{'ab'[n % 2]}\n" for n in range(count))


@pytest.mark.parametrize(
    "folders",
    [
        ["HAM_images_part_1", "HAM_images_part_2"],
        ["images_001/images", "images_002/images", "images_012/images"],
        ["img"], ["photos"], ["jpg"], ["pictures"], ["a/b/c"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("check_files", [True, False])
def test_ids_are_resolved_to_images_in_any_folder(tmp_path: Path, folders: list[str], check_files: bool):
    names = write_images(tmp_path / "data", *folders)
    for suffix in ("", ".jpg", ".JPG"):
        root = write_data(tmp_path / "data", train=make_table("image_id,label", suffix=suffix))
        assert load_rows(root, check_files).paths.to_pylist() == names


def test_paths_match_in_another_case_or_without_suffix(tmp_path: Path) -> None:
    table = "path,label\nimg/a.jpg,x\nIMG/b.png,y\nc,x\nd,y\n"
    root = write_data(tmp_path / "data", "img/a.JPG", "img/b.png", "img/c.jpeg", "img/sub/d.png", train=table)
    assert load_rows(root).paths.to_pylist() == ["img/a.JPG", "img/b.png", "img/c.jpeg", "img/sub/d.png"]


def test_an_image_matches_only_one_row_and_never_a_test_image(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", "x/a.jpg", "x/b.jpg", "test/c.jpg", "test_images/d.jpg")
    for absent in ("A.jpg", "c", "d.jpg"):
        write_data(root, train=f"path,label\nx/a.jpg,1\nx/b.jpg,2\n{absent},1\n")
        with pytest.raises(DataError, match=rf"1 of 3 files that do not exist: '{absent}'.* x \(2\).*data\.image_root"):
            load_rows(root)


def test_error_for_an_ambiguous_image_name_lists_the_candidates(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", "p/1.jpg", "q/1.jpg", "q/2.jpg", train="image_id,label\n1,a\n2,b\n")
    for check_files in (True, False):
        with pytest.raises(DataError, match=r"'1'.*'p/1\.jpg', 'q/1\.jpg'.*data\.image_root"):
            load_rows(root, check_files)


@pytest.mark.parametrize("header", ["id,label", "id,breed", "foto,label", "name,breed"])
@pytest.mark.parametrize(
    ("name", "folders"),
    [("train", ["images"]), ("train", ["photos_1", "photos_2"]), ("labels", ["train"]), ("labels", ["train/images"])],
)
def test_column_that_names_the_images_is_the_path_column(tmp_path, header, folders, name, caplog):
    names = write_images(tmp_path / "data", *folders)
    write_data(tmp_path / "data", "test/900.jpg", "test/901.jpg", **{name: make_table(header)})
    with caplog.at_level(logging.INFO):
        rows = load_rows(tmp_path / "data")
    assert (rows.paths.to_pylist(), rows.classes) == (names, ("a", "b"))
    assert f"the paths are the column {header.split(',')[0]!r}" in caplog.text
    assert ("only other column, 'breed'" in caplog.text) == header.endswith("breed")


def test_path_column_is_recognised_although_one_image_is_missing(tmp_path: Path) -> None:
    names = write_images(tmp_path / "data", "train")
    (tmp_path / "data" / names[3]).unlink()
    root = write_data(tmp_path / "data", train=make_table("id,label"))
    with pytest.raises(DataError, match="003"):
        load_rows(root)


def test_path_column_is_not_guessed_if_ambiguous_or_configured(tmp_path: Path) -> None:
    names = write_images(tmp_path / "data", "train", suffix=".png")
    lines = [f"{n:03d},{(n + 1) % 12:03d},{'ab'[n % 2]}" for n in range(12)]
    root = write_data(tmp_path / "data", train="\n".join(["one,two,label", *lines]))
    with pytest.raises(DataError, match=r"set data\.path_column"):
        load_rows(root)
    assert load_rows(root, path_column="one").paths.to_pylist() == names
    write_data(root, train="\n".join(["id,two,label", *lines]))
    assert load_rows(root).paths.to_pylist() == names
    with pytest.raises(DataError, match=r"no column 'three'"):
        load_rows(root, path_column="three")


EQUIVALENT_LABELS = ["caf\u00e9", "cafe\u0301", " caf\u00e9 ", "caf\u00e9\u200b", "\ufeffcaf\u00e9", "ca\u00adf\u00e9"]


def test_labels_that_differ_only_in_blanks_or_invisible_characters_are_merged_and_logged(tmp_path, caplog):
    names = [f"{n}.png" for n in range(len(EQUIVALENT_LABELS) + 1)]
    lines = [f"{name},{label}" for name, label in zip(names, [*EQUIVALENT_LABELS, "dog"], strict=True)]
    root = write_data(tmp_path / "data", *names, train="\n".join(["path,label", *lines]))
    with caplog.at_level(logging.INFO):
        rows = load_rows(root)
    assert (rows.classes, rows.codes.tolist()) == (("caf\u00e9", "dog"), [0] * len(EQUIVALENT_LABELS) + [1])
    assert r"caf\xe9\u200b" in caplog.text
    folders = write_data(tmp_path / "folders", *(f"{label}/1.png" for label in [*EQUIVALENT_LABELS, "dog"]))
    assert load_rows(folders).classes == rows.classes


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a b", "a\u00a0b"),
        ("ab", "a\u200cb"),
        ("a b", "a  b"),
        ("a\u2600", "a\u2600\ufe0f"),
        ("cat", "\uff43\uff41\uff54"),
    ],
)
def test_error_for_classes_that_look_equal_shows_their_characters(tmp_path: Path, first: str, second: str) -> None:
    root = write_data(tmp_path / "data", "1.png", "2.png", train=f"path,label\n1.png,{first}\n2.png,{second}\n")
    with pytest.raises(DataError) as caught:
        load_rows(root)
    assert ascii(second) in str(caught.value)
    assert ascii(first) in str(caught.value)


def test_classes_that_differ_only_in_case_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_data(tmp_path / "data", *(f"{name}/1.png" for name in ("Cat", "cat", "dog")))
    assert load_rows(root).classes == ("Cat", "cat", "dog")
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "Cat" in warning.getMessage()


def test_label_of_only_invisible_characters_counts_as_empty(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", "1.png", "2.png", train="path,label\n1.png,a\n2.png,\u200b\n")
    with pytest.raises(DataError, match="empty label, the first in row 2"):
        load_rows(root)
