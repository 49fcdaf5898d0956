import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fivefold.contract import files
from fivefold.contract.files import (
    STALE_AFTER_S,
    atomic,
    check_writable,
    join_below,
    lock,
    preallocate,
    remove_stale_temp_files,
    tree_files,
    tree_sha256,
    write_text,
)
from fivefold.errors import DataError, RetryableError, SettingsError

ROOT = pytest.mark.skipif(os.getuid() != 0, reason="needs root: mounts a file system, or takes another user's place")


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_creates_folders_and_keeps_the_old_file_if_its_block_fails(tmp_path: Path):
    path = tmp_path / "a" / "b" / "t.txt"
    write_text(path, "größe")
    with pytest.raises(TypeError), atomic(path) as temporary, open(temporary, "w") as file:
        file.writelines(["half", None])
    assert path.read_bytes() == "größe".encode()
    assert list_names(path.parent) == ["t.txt"]


def test_concurrent_writers_never_mix_their_content(tmp_path: Path):
    path, texts = tmp_path / "t", ("a" * 50_000, "b" * 50_000)
    write_text(path, texts[0])
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write_text, path, text) for text in texts * 50]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in texts
    assert [writer.result() for writer in writers] == [None] * 100
    assert list_names(tmp_path) == ["t"]


def test_temporary_file_is_hidden_and_removed_once_stale(tmp_path: Path):
    killed = atomic(tmp_path / "model.json")
    leftover = killed.__enter__()
    leftover.write_text("half")
    assert leftover.name.startswith(".model.json.")
    assert tree_files(tmp_path) == []
    write_text(tmp_path / "model.json", "whole")
    remove_stale_temp_files(tmp_path)
    assert leftover.exists(), "another process may still be writing a recent file"
    old = time.time() - STALE_AFTER_S - 1
    os.utime(leftover, (old, old))
    remove_stale_temp_files(tmp_path)
    assert list_names(tmp_path) == ["model.json"]


@ROOT
def test_full_disk_is_retryable_and_keeps_the_old_file(tiny_disk: Path):
    write_text(tiny_disk / "t", "old")
    with pytest.raises(RetryableError, match=r"no space left to write .*/t: free some"):
        write_text(tiny_disk / "t", "x" * 100_000)
    with pytest.raises(RetryableError, match="no space left"), atomic(tiny_disk / "w.safetensors") as temporary:
        save_file({"weights": np.zeros(100_000, np.float32)}, temporary)  # reports a full disk as text only
    assert (tiny_disk / "t").read_text() == "old"
    assert list_names(tiny_disk) == ["t"]


@ROOT
def test_check_writable_refuses_a_read_only_disk(tiny_disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(SettingsError, match="Read-only file system; mount it writable"):
        check_writable(tiny_disk)


def make_failing_call(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_file_systems_without_fsync_flock_or_fallocate_are_supported(number, tmp_path, monkeypatch):
    for module, name in ((os, "fsync"), (os, "posix_fallocate"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, make_failing_call(number), raising=False)
    write_text(tmp_path / "t", "text")
    with open(tmp_path / "room", "wb") as file:
        preallocate(file.fileno(), 3000)
        lock(file.fileno())
    assert ((tmp_path / "t").read_text(), (tmp_path / "room").stat().st_size) == ("text", 3000)
    monkeypatch.setattr(os, "fsync", make_failing_call(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "t", "other")
    assert (tmp_path / "t").read_text() == "text"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOTSUP])
def test_check_writable_refuses_a_folder_without_rename(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "replace", make_failing_call(number))
    with pytest.raises(SettingsError, match="cannot write to"):
        check_writable(tmp_path)
    assert list_names(tmp_path) == []


def test_check_writable_refuses_a_file_in_place_of_a_folder(tmp_path: Path):
    write_text(tmp_path / "f", "")
    for folder in (tmp_path / "f", tmp_path / "f" / "below"):
        with pytest.raises(SettingsError, match=f"cannot write to {tmp_path}/f"):
            check_writable(folder)


def test_tree_files_are_sorted_without_hidden_ones_and_follow_links_but_no_cycles(tmp_path: Path):
    root = tmp_path / "root"
    for name in ("b/2.png", "b/1.png", "a.png", "a/z.png", ".hidden", ".git/config", "b/.tmp", "../there/x.png"):
        write_text(root / name, name)
    (root / "linked").symlink_to(tmp_path / "there")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there" / "up").symlink_to(root)
    paths = [path.relative_to(root).as_posix() for path in tree_files(root)]
    assert paths == sorted(["a.png", "a/z.png", "b/1.png", "b/2.png", "linked/x.png"])
    assert tree_files(root / "a.png") == [root / "a.png"]


def test_tree_digest_depends_on_names_and_bytes_only(tmp_path: Path):
    trees = [tmp_path / "one", tmp_path / "other"]
    for tree in trees:
        for name in ("a/1", "a/2", "b/1"):
            write_text(tree / name, name)
    one, other = trees
    digest = tree_sha256(one)
    assert tree_sha256(other) == digest
    os.utime(one / "a/1", (0, 0))
    write_text(one / ".hidden", "x")
    assert tree_sha256(one) == digest
    write_text(one / "stage.json", "x")
    write_text(one / "evaluate.stage.json", "x")
    assert tree_sha256(one, without=("stage.json",)) == digest
    (other / "a" / "1").rename(other / "a" / "3")
    assert tree_sha256(other) != digest
    write_text(one / "a" / "1", "else")
    assert tree_sha256(one, without=("stage.json",)) != digest


def test_tree_digest_accepts_many_files_and_names_that_are_not_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "CHUNK_FILES", 2)
    for number in range(5):
        write_text(tmp_path / str(number), str(number))
    before = tree_sha256(tmp_path)
    (tmp_path / "4").rename(tmp_path / os.fsdecode(b"\xff"))
    assert tree_sha256(tmp_path) != before
    write_text(tmp_path / "3", "other")
    assert tree_sha256(tmp_path) != before


def test_join_below_refuses_paths_outside_the_root(tmp_path: Path):
    for name, path in {"a/b": "a/b", "a/../b": "b", "./a": "a", "..a/b..": "..a/b..", "": "."}.items():
        assert join_below(tmp_path, name) == tmp_path / path
    for name in ("../x", "a/../../x", "/etc/passwd", "..", "a/b/../../../root2/x"):
        with pytest.raises(DataError, match=f"path '{name}' .*root"):
            join_below(tmp_path / "root", name)
