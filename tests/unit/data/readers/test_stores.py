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
from toy_data import zip_folder

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


@pytest.fixture(params=["folder", zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def store(request: pytest.FixtureRequest, folder: Path) -> ImageStore:
    return open_store(folder if request.param == "folder" else zip_folder(folder, request.param))


def write_zip(path: Path, entries: dict[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def replace_size(path: Path, size: int) -> None:
    """Change the declared size of the entry of 1 MiB in a zip."""
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 2**20), struct.pack("<I", size)))


def test_folder_and_zip_contain_the_same_files(store: ImageStore) -> None:
    assert store.names() == sorted(FILES)
    assert {name: store.read(name) for name in store.names()} == FILES
    assert (store.exists("a/0.bin"), store.exists("a/9.bin")) == (True, False)
    assert list_folder(store, "") == (["a", "c d", "나비"], ["top.csv"])
    assert list_folder(store, "a") == ([], [f"{n}.bin" for n in range(4)])


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/passwd", "a/9.bin"])
def test_names_outside_the_root_and_missing_files_are_rejected(store: ImageStore, name: str) -> None:
    with pytest.raises(DataError, match=re.escape(name)):
        store.read(name)


def test_threads_and_forked_workers_read_the_same_bytes(store: ImageStore) -> None:
    names = store.names() * 5
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.read, names)) == [FILES[name] for name in names]
    with get_context("fork").Pool(2) as workers:
        assert workers.map(store.read, names) == [FILES[name] for name in names]


def test_folder_with_a_zip_and_no_images_is_read_as_the_zip(tmp_path: Path) -> None:
    write_zip(tmp_path / "open.zip", {"a.jpg": b""})
    (tmp_path / "gt.csv").write_text("ID,label\n")
    assert isinstance(open_store(tmp_path), ZipStore)
    (tmp_path / "cat.jpg").write_bytes(b"")
    assert isinstance(open_store(tmp_path), FolderStore)


def test_linked_folders_are_followed_but_circular_links_are_not(folder: Path, tmp_path: Path) -> None:
    channel = tmp_path / "links"
    channel.mkdir()
    for name, target in {"linked": folder / "a", "again": channel, "broken": tmp_path / "nowhere"}.items():
        (channel / name).symlink_to(target)
    assert open_store(channel).names() == [f"linked/{n}.bin" for n in range(4)]


def test_zip_names_from_korean_windows_and_macos_are_normalised(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "names.zip", {"NAMES/1.bin": b"cp949", "\u1102\u1161\u1107\u1175/2.bin": b"decomposed"})
    # A zip from Korean Windows: names in cp949, without the UTF-8 flag.
    path.write_bytes(path.read_bytes().replace(b"NAMES", "가".encode("cp949") + "나b".encode("cp949")))
    store = open_store(path)
    assert {name: store.read(name) for name in store.names()} == {"가나b/1.bin": b"cp949", "나비/2.bin": b"decomposed"}
    assert store.read("\u1102\u1161\u1107\u1175/2.bin") == b"decomposed"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        *(
            (["가/1.jpg", same], r"bad\.zip: .*'가/1\.jpg'")
            for same in ("\u1100\u1161/1.jpg", "./가//1.jpg", "가\\1.jpg")
        ),
        *((["fine.jpg", name], r"evil\.jpg.*leads out") for name in ("../evil.jpg", "a/../../evil.jpg")),
        *((["fine.jpg", name], r"evil\.jpg.*leads out") for name in ("/etc/evil.jpg", "C:/evil.jpg", "..\\evil.jpg")),
    ],
)
def test_zip_entries_that_are_equal_or_outside_the_root_are_rejected(tmp_path: Path, names: list[str], message: str):
    write_zip(tmp_path / "bad.zip", dict.fromkeys(names, b""))
    with pytest.raises(DataError, match=message):
        open_store(tmp_path / "bad.zip")


def test_zips_with_links_other_file_types_and_missing_paths_are_rejected(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    write_zip(tmp_path / "link.zip", {link: b"/etc/passwd"})
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
    path = write_zip(tmp_path / "bomb.zip", {"bomb.jpg": bytes(4 * 2**20)})
    assert open_store(path).names() == ["bomb.jpg"]
    with pytest.raises(DataError, match=r"4,194,304 bytes.*data\.max_unpacked_gib=0\.001"):
        open_store(path, max_unpacked_gib=0.001)


def test_too_large_a_file_is_rejected_before_reading(tmp_path: Path) -> None:
    replace_size(write_zip(tmp_path / "bomb.zip", {"bomb.jpg": bytes(2**20)}), MAX_FILE_BYTES + 1)
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
    replace_size(write_zip(tmp_path / "liar.zip", {"liar.jpg": bytes(2**20)}), 10)
    store = open_store(tmp_path / "liar.zip", max_unpacked_gib=0.0001)
    with pytest.raises(DataError, match=r"liar\.jpg.*damaged"):
        store.read("liar.jpg")


def test_broken_and_encrypted_zips_are_rejected(folder: Path) -> None:
    path = zip_folder(folder)
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
