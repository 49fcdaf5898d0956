"""Folder and zip stores: comparison with plain file access, and zips that must be rejected."""

import os
import re
import stat
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from fivefold.contract.files import MAX_FILE_BYTES, MAX_TABLE_BYTES
from fivefold.data.readers.layout_detection import list_folder
from fivefold.data.readers.stores import FolderStore, ImageStore, ZipStore, open_store
from fivefold.data.readers.user_images import InMemoryStore
from fivefold.errors import DataError, MissingInputError

FILES = {f"{kind}/{n}.bin": os.urandom(50 + 400 * n) for kind in ("a", "나비", "c d") for n in range(4)} | {
    "top.csv": b"x\n"
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**FILES, ".hidden": b"", "a/.DS_Store": b"", "__MACOSX/a/0.bin": b""}.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "files"


def make_zip(folder: Path, target: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder).as_posix())
    return target


@pytest.fixture(params=["folder", "deflated", "stored"])
def store(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> ImageStore:
    if request.param == "folder":
        return open_store(folder)
    method = zipfile.ZIP_DEFLATED if request.param == "deflated" else zipfile.ZIP_STORED
    return open_store(make_zip(folder, tmp_path / "files.zip", method))


def read_all(store: ImageStore) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.names()}


def test_folder_and_zip_contain_the_same_files(store: ImageStore) -> None:
    assert store.names() == sorted(FILES)
    assert read_all(store) == FILES
    assert store.exists("a/0.bin")
    assert not store.exists("a/9.bin")
    assert list_folder(store, "") == (["a", "c d", "나비"], ["top.csv"])
    assert list_folder(store, "a") == ([], [f"{n}.bin" for n in range(4)])


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/passwd"])
def test_names_outside_the_root_are_rejected(store: ImageStore, name: str) -> None:
    with pytest.raises(DataError, match=f"'{name}'"):
        store.read(name)
    with pytest.raises(DataError, match=r"a/9\.bin"):
        store.read("a/9.bin")


def test_threads_and_forked_workers_read_the_same_bytes(store: ImageStore) -> None:
    names = store.names() * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.read, names)) == [FILES[name] for name in names]
    with get_context("fork").Pool(2) as workers:
        assert workers.map(store.read, names) == [FILES[name] for name in names]


def test_folder_with_a_zip_and_no_images_is_read_as_the_zip(folder: Path, tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    channel.mkdir()
    make_zip(folder, channel / "open.zip")
    (channel / "gt.csv").write_text("ID,label\n")
    assert isinstance(open_store(channel), ZipStore)
    (channel / "cat.jpg").write_bytes(b"")
    assert isinstance(open_store(channel), FolderStore)


def test_linked_folders_are_followed_but_circular_links_are_not(folder: Path, tmp_path: Path) -> None:
    channel = tmp_path / "links"
    channel.mkdir()
    (channel / "linked").symlink_to(folder / "a")
    (channel / "again").symlink_to(channel)
    (channel / "broken").symlink_to(tmp_path / "nowhere")
    assert open_store(channel).names() == [f"linked/{n}.bin" for n in range(4)]


def test_zip_names_from_korean_windows_and_macos_are_normalised(tmp_path: Path) -> None:
    path = tmp_path / "names.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("NAMES/1.bin", b"cp949")
        archive.writestr("\u1102\u1161\u1107\u1175/2.bin", b"decomposed")
    # A zip from Korean Windows: names in cp949, without the UTF-8 flag.
    path.write_bytes(path.read_bytes().replace(b"NAMES", "가".encode("cp949") + "나b".encode("cp949")))
    store = open_store(path)
    assert read_all(store) == {"가나b/1.bin": b"cp949", "나비/2.bin": b"decomposed"}
    assert store.read("\u1102\u1161\u1107\u1175/2.bin") == b"decomposed"


@pytest.mark.parametrize("duplicate", ["가/1.jpg", "\u1100\u1161/1.jpg", "./가//1.jpg", "가\\1.jpg"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_entries_with_equal_normalised_names_are_rejected(tmp_path: Path, duplicate: str) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("가/1.jpg", b"one")
        archive.writestr(duplicate, b"two")
    with pytest.raises(DataError, match=r"twice\.zip: .*'가/1\.jpg'"):
        open_store(tmp_path / "twice.zip")


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "C:/evil.jpg", "..\\evil.jpg"])
def test_zip_entries_outside_the_root_are_rejected(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("fine.jpg", b"")
        archive.writestr(name, b"")
    with pytest.raises(DataError, match=r"evil\.jpg.*leads out"):
        open_store(tmp_path / "evil.zip")


def test_zips_with_links_other_file_types_and_missing_paths_are_rejected(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    for name, message in (
        ("link.zip", r"link\.jpg.*symbolic link"),
        ("Labels.csv", r"Labels\.csv .*data\.table="),
        ("photos.tar.gz", r"photos\.tar\.gz is neither a folder nor a .*\.zip"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=message):
            open_store(tmp_path / name)
    with pytest.raises(MissingInputError, match="nowhere"):
        open_store(tmp_path / "nowhere")


def test_zip_that_expands_past_the_limit_is_rejected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(4 * 2**20))
    assert open_store(tmp_path / "bomb.zip").names() == ["bomb.jpg"]
    with pytest.raises(DataError, match=r"4,194,304 bytes.*data\.max_unpacked_gib=0\.001"):
        open_store(tmp_path / "bomb.zip", max_unpacked_gib=0.001)


def test_too_large_a_file_is_rejected_before_reading(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(2**20))
    packed, size = (tmp_path / "bomb.zip").read_bytes(), struct.pack("<I", 2**20)
    (tmp_path / "bomb.zip").write_bytes(packed.replace(size, struct.pack("<I", MAX_FILE_BYTES + 1)))
    (tmp_path / "files").mkdir()
    for name, limit in (("bomb.jpg", MAX_FILE_BYTES), ("bomb.CSV", MAX_TABLE_BYTES)):
        with open(tmp_path / "files" / name, "wb") as file:
            file.truncate(limit + 1)
    for path, name in (("bomb.zip", "bomb.jpg"), ("files", "bomb.jpg"), ("files", "bomb.CSV")):
        with pytest.raises(DataError, match=r"bomb\.(jpg|CSV) has [0-9,]+ bytes"):
            open_store(tmp_path / path).read(name)


def test_devices_and_pipes_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("zero.jpg", "pipe.jpg"):
        for store in (open_store(tmp_path), InMemoryStore({name: tmp_path / name})):
            with pytest.raises(DataError, match="is a device or a pipe"):
                store.read(name)


def test_zip_entry_larger_than_declared_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("liar.jpg", bytes(2**20))
    size = struct.pack("<I", 2**20)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 10)))
    store = open_store(path, max_unpacked_gib=0.0001)
    with pytest.raises(DataError, match=r"liar\.jpg.*damaged"):
        store.read("liar.jpg")


def test_broken_and_encrypted_zips_are_rejected(folder: Path, tmp_path: Path) -> None:
    path = make_zip(folder, tmp_path / "files.zip")
    original = path.read_bytes()
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(DataError, match=r"nor a complete \.zip"):
        open_store(path)
    path.write_bytes(original.replace(FILES["a/3.bin"], FILES["a/3.bin"][::-1]))
    with pytest.raises(DataError, match=r"a/3\.bin.*damaged"):
        open_store(path).read("a/3.bin")
    path.write_bytes(re.sub(b"(?s)(PK\x01\x02....).", rb"\g<1>" + b"\x01", original))
    with pytest.raises(DataError, match="encrypted"):
        open_store(path)
