import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fivefold.contract.files import tree_files, tree_sha256
from fivefold.data.image_io import decode
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import open_store
from fivefold.data.readers.user_images import read_user_images
from fivefold.data.split.summary import describe_data
from fivefold.errors import DataError
from permissions import let_others_in
from toy_data import load_rows, write_data, zip_folder

IMAGE_FILES = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
SYSTEM_FILES = (
    "cat/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg", "@eaDir/2.png", "#recycle/cow/1.png", "$RECYCLE.BIN/S-1-5/1.png",
    "System Volume Information/1.png", "lost+found/1.png", "__MACOSX/cat/1.png", "dog/@Recycle/x/3.png",
    "~snapshot/cat/1.png", "RECYCLER/1.png", "FOUND.000/1.png", "cat/@__thumb/1.png",
)  # fmt: skip


@pytest.fixture(params=[Path, zip_folder], ids=["folder", "zip"])
def pack(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    return request.param


@contextmanager
def as_unprivileged_user() -> Iterator[None]:
    """Run the block as a user who owns no files."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_in_system_folders_are_ignored_and_counted(tmp_path: Path, pack: Callable[[Path], Path]) -> None:
    root = pack(write_data(tmp_path / "data", *IMAGE_FILES, *SYSTEM_FILES, ".Trash/1.png", "cat/._1.png"))
    rows = load_rows(root)
    assert rows.ignored == {"hidden": 2, "in system folders": len(SYSTEM_FILES)}
    for paths in (rows.paths.to_pylist(), read_eval(open_store(root)).paths, read_user_images(root).paths):
        assert list(paths) == list(IMAGE_FILES)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: takes another user's place")
def test_unreadable_lost_and_found_is_skipped_but_an_unreadable_class_fails(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", *IMAGE_FILES)
    let_others_in(root, root / "cat", root / "dog")
    (root / "lost+found").mkdir(0o700)
    with as_unprivileged_user():
        assert load_rows(root).ignored == {"in system folders": 1}
        assert read_eval(open_store(root)).paths.tolist() == list(IMAGE_FILES)
        assert len(tree_files(root)) == 4
        digest = tree_sha256(root)
    (root / "lost+found").rmdir()
    assert tree_sha256(root) == digest
    (root / "cow").mkdir(0o700)
    with as_unprivileged_user(), pytest.raises(PermissionError):
        load_rows(root)


def test_files_of_other_formats_are_counted_by_suffix(tmp_path: Path, pack: Callable[[Path], Path]) -> None:
    others = ("cat/3.dng", "cat/4.DNG", "dog/3.mp4", "dog/4", "cat/notes.txt", "a.md", "cover.png", "stray.csv")
    root = pack(write_data(tmp_path / "data", *IMAGE_FILES, *others))
    rows = load_rows(root)
    assert rows.paths.to_pylist() == list(IMAGE_FILES)
    counts = {".dng": 2, ".md": 1, ".mp4": 1, ".txt": 1, "without suffix": 1, "in no class folder": 1}
    assert rows.ignored == counts
    image_paths = list(read_user_images(root).paths)
    assert image_paths == sorted([*IMAGE_FILES, "cat/3.dng", "cat/4.DNG", "dog/4", "cover.png"])


@pytest.mark.parametrize("prefix", ["", "train/", "wrapper/"])
def test_warning_names_class_folders_without_images(tmp_path, pack, prefix, caplog):
    root = write_data(tmp_path / "data", *(prefix + name for name in (*IMAGE_FILES, "cow/a.txt", "pig/@eaDir/1.png")))
    for name in ("hen", "valid"):
        (root / prefix / name).mkdir()
    rows = load_rows(pack(root))
    assert (rows.classes, dict(rows.lost)) == (("cat", "dog"), {})
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert [name in warning for name in ("'cow'", "'hen'", "'pig'", "'cat'", "'valid'")] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("names", [["cow/1.dng"], ["cow/1.jpg_large", "cow/2.txt"], ["cow/1"], ["cow/deep/1.cr2"]])
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_classes_without_readable_files_are_reported_as_lost(tmp_path, pack, names, prefix):
    rows = load_rows(pack(write_data(tmp_path / "data", *(prefix + name for name in (*IMAGE_FILES, *names)))))
    assert (rows.classes, list(rows.lost)) == (("cat", "dog"), ["cow"])
    with pytest.raises(DataError, match=r"'cow'.* only 1 class"):
        load_rows(pack(write_data(tmp_path / "alone", "dog/1.png", *names)))


def test_classes_of_broken_links_are_reported_as_lost(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", *IMAGE_FILES, "cow/notes.txt")
    (root / "cow" / "1.png").symlink_to(tmp_path / "annex" / "1.png")
    (root / "hen").symlink_to(tmp_path / "annex")
    assert list(load_rows(root).lost) == ["cow", "hen"]


def test_heic_images_are_read_if_a_decoder_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    root = write_data(tmp_path / "data", *IMAGE_FILES)
    (root / "cow").mkdir()
    for name in ("1.heic", "2.HEIC"):
        Image.new("RGB", (16, 8), "red").save(root / "cow" / name, "HEIF")
    rows = load_rows(root)
    assert (rows.classes, len(rows), rows.ignored) == (("cat", "cow", "dog"), 6, {})
    pixels = decode((root / "cow" / "2.HEIC").read_bytes(), "2.HEIC")
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), [255, 0, 0], atol=4)


def test_report_lists_ignored_files_and_lost_classes_with_numeric_names():
    summary = {"rows": 9, "classes": 2, "left_out": {".heic": 4}, "skipped": [], "lost_classes": ["0", "1"]}
    summary |= {"duplicates": {"sets": 0, "rows": 0}, "conflicting_duplicates": {"sets": 0}}
    described = dict(describe_data(summary))
    assert described.keys() == {"Rows", "Ignored files", "Classes without a readable image"}
    assert described["Classes without a readable image"] == "0, 1"
