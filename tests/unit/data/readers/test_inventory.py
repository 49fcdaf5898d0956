"""Every file of a channel is an image that is used, or is counted with the reason."""

import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fivefold.config.schema import Data
from fivefold.contract.files import tree_files, tree_sha256
from fivefold.data.image_io import decode
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import open_store
from fivefold.data.readers.training_rows import LabelledImages, read_rows
from fivefold.data.readers.user_images import read_user_images
from fivefold.data.split.report import describe_data
from fivefold.errors import DataError
from permissions import let_others_in
from toy_data import write_data

OWN = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
OF_SYSTEMS = (
    "cat/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg", "@eaDir/2.png", "#recycle/cow/1.png", "$RECYCLE.BIN/S-1-5/1.png",
    "System Volume Information/1.png", "lost+found/1.png", "__MACOSX/cat/1.png", "dog/@Recycle/x/3.png",
    "~snapshot/cat/1.png", "RECYCLER/1.png", "FOUND.000/1.png", "cat/@__thumb/1.png",
)  # fmt: skip


def rows_of(root: Path, **options: object) -> LabelledImages:
    return read_rows(open_store(root), Data(**options))


def as_zip(root: Path) -> Path:
    """The folder packed, with an entry for each folder in it too."""
    target = root.parent / f"{root.name}.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    return target


@pytest.fixture(params=[Path, as_zip], ids=["folder", "zip"])
def packed(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    return request.param


@contextmanager
def nobody() -> Iterator[None]:
    """Runs the block as a user who owns nothing."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_system_folders_hold_no_images_and_are_counted(tmp_path: Path, packed: Callable[[Path], Path]) -> None:
    root = packed(write_data(tmp_path / "data", *OWN, *OF_SYSTEMS, ".Trash/1.png", "cat/._1.png"))
    rows = rows_of(root)
    assert rows.paths.to_pylist() == list(OWN)
    assert rows.ignored == {"hidden": 2, "in system folders": len(OF_SYSTEMS)}
    assert read_eval(open_store(root)).paths.tolist() == list(OWN)
    assert list(read_user_images(root).paths) == list(OWN)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: takes another user's place")
def test_a_lost_and_found_of_root_is_passed_over_and_a_class_of_root_is_not(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", *OWN)
    let_others_in(root, root / "cat", root / "dog")
    (root / "lost+found").mkdir(0o700)
    with nobody():
        assert rows_of(root).ignored == {"in system folders": 1}
        assert read_eval(open_store(root)).paths.tolist() == list(OWN)
        assert len(tree_files(root)) == 4
        digest = tree_sha256(root)
    (root / "lost+found").rmdir()
    assert tree_sha256(root) == digest
    (root / "cow").mkdir(0o700)
    with nobody(), pytest.raises(PermissionError):
        rows_of(root)


def test_files_of_other_formats_are_counted_by_their_suffix(tmp_path: Path, packed: Callable[[Path], Path]) -> None:
    others = ("cat/3.dng", "cat/4.DNG", "dog/3.mp4", "dog/4", "cat/notes.txt", "a.md", "cover.png", "stray.csv")
    root = packed(write_data(tmp_path / "data", *OWN, *others))
    rows = rows_of(root)
    assert rows.paths.to_pylist() == list(OWN)
    counts = {".dng": 2, ".md": 1, ".mp4": 1, ".txt": 1, "without suffix": 1, "in no class folder": 1}
    assert rows.ignored == counts
    given = list(read_user_images(root).paths)
    assert given == sorted([*OWN, "cat/3.dng", "cat/4.DNG", "dog/4", "cover.png"])


def test_a_link_that_leads_nowhere_or_in_a_circle_is_counted(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", *OWN)
    (root / "cat" / "3.png").symlink_to(tmp_path / "nowhere.png")
    (root / "cat" / "4.png").symlink_to(root / "cat" / "4.png")
    rows = rows_of(root)
    assert (len(rows), rows.ignored) == (4, {"links that lead nowhere": 2})
    assert len(read_user_images(root)) == 6


def test_images_that_no_row_names_are_counted(tmp_path: Path) -> None:
    table = "path,label\ncat/1.png,a\ndog/1.png,b\n"
    assert rows_of(write_data(tmp_path / "data", *OWN, train=table)).ignored == {"not in the table": 2}


@pytest.mark.parametrize("prefix", ["", "train/", "wrapper/"])
def test_a_class_folder_without_any_image_is_named(
    tmp_path: Path, packed: Callable[[Path], Path], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_data(tmp_path / "data", *(prefix + name for name in (*OWN, "cow/a.txt", "pig/@eaDir/1.png")))
    for name in ("hen", "valid"):
        (root / prefix / name).mkdir()
    rows = rows_of(packed(root))
    assert (rows.classes, dict(rows.lost)) == (("cat", "dog"), {})
    (told,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert [name in told for name in ("'cow'", "'hen'", "'pig'", "'cat'", "'valid'")] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("names", [["cow/1.dng"], ["cow/1.jpg_large", "cow/2.txt"], ["cow/1"], ["cow/deep/1.cr2"]])
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_class_that_lost_all_its_files_is_known(
    tmp_path: Path, packed: Callable[[Path], Path], names: list[str], prefix: str
) -> None:
    root = packed(write_data(tmp_path / "data", *(prefix + name for name in (*OWN, *names))))
    rows = rows_of(root)
    assert (rows.classes, list(rows.lost)) == (("cat", "dog"), ["cow"])
    alone = packed(write_data(tmp_path / "alone", "dog/1.png", *names))
    with pytest.raises(DataError, match=r"'cow'.* only 1 class"):
        rows_of(alone)


def test_classes_of_links_that_lead_nowhere_are_lost(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", *OWN, "cow/notes.txt")
    (root / "cow" / "1.png").symlink_to(tmp_path / "annex" / "1.png")
    (root / "hen").symlink_to(tmp_path / "annex")
    assert list(rows_of(root).lost) == ["cow", "hen"]


def test_photographs_of_telephones_are_read_where_a_decoder_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    root = write_data(tmp_path / "data", *OWN)
    (root / "cow").mkdir()
    for name in ("1.heic", "2.HEIC"):
        Image.new("RGB", (16, 8), "red").save(root / "cow" / name, "HEIF")
    rows = rows_of(root)
    assert (rows.classes, len(rows), rows.ignored) == (("cat", "cow", "dog"), 6, {})
    pixels = decode((root / "cow" / "2.HEIC").read_bytes(), "2.HEIC")
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), [255, 0, 0], atol=4)


def test_the_report_names_what_was_counted_and_classes_that_are_numbers():
    summary = {"rows": 9, "classes": 2, "left_out": {".heic": 4}, "skipped": [], "lost_classes": ["0", "1"]}
    summary |= {"duplicates": {"sets": 0, "rows": 0}, "conflicting_duplicates": {"sets": 0}}
    described = dict(describe_data(summary))
    assert described.keys() == {"Rows", "Ignored files", "Classes without a readable image"}
    assert described["Classes without a readable image"] == "0, 1"
