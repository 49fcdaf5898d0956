"""Atomic writes, digests of trees, and errors for folders that cannot be written."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fivefold.contract.files import (
    CHUNK_FILES,
    STALE_AFTER_S,
    atomic,
    check_writable,
    join_below,
    lock,
    preallocate,
    read_json,
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


@pytest.mark.parametrize("content", [b"{", b"", b'"\xff"'])
def test_read_json_names_the_file_that_is_not_json(content: bytes, tmp_path: Path):
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(DataError, match=r"v\.json is not JSON"):
        read_json(tmp_path / "v.json")


WRITER = """
import sys
from pathlib import Path
from fivefold.contract.files import write_text
for _ in range(300):
    write_text(Path(sys.argv[1]), sys.argv[2] * 50_000)
"""


def test_concurrent_writers_never_mix_their_content(tmp_path: Path):
    path = tmp_path / "t"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, letter]) for letter in "ab"]
    seen_letters = set()
    while any(writer.poll() is None for writer in writers):
        if path.is_file():
            text = path.read_text()
            assert text in ("a" * 50_000, "b" * 50_000)
            seen_letters.add(text[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen_letters
    assert list_names(tmp_path) == ["t"]


def test_temporary_file_of_a_killed_process_is_hidden_and_removed_once_stale(tmp_path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path; from fivefold.contract.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "model.json"])
    assert killed.returncode == -9
    (leftover,) = tmp_path.iterdir()
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
    with pytest.raises(RetryableError, match=r"no space left to write .*/t: free some") as caught:
        write_text(tiny_disk / "t", "x" * 100_000)
    assert caught.value.exit_code == 75
    with pytest.raises(RetryableError, match="no space left"), atomic(tiny_disk / "w.safetensors") as temporary:
        save_file({"weights": np.zeros(100_000, np.float32)}, temporary)  # reports a full disk as text only
    assert (tiny_disk / "t").read_text() == "old"
    assert list_names(tiny_disk) == ["t"]


@ROOT
def test_check_writable_refuses_a_full_or_read_only_disk(tiny_disk: Path):
    (tiny_disk / "filler").write_bytes(b"x" * 64 * 1024)
    with pytest.raises(RetryableError, match=r"no space left in .*/disk: free some"):
        check_writable(tiny_disk)
    assert list_names(tiny_disk) == ["filler"]
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(SettingsError, match="Read-only file system; mount it writable"):
        check_writable(tiny_disk)


def make_failing_call(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_file_systems_without_fsync_flock_or_fallocate_are_supported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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
        with pytest.raises(SettingsError, match=f"cannot write to {tmp_path}/f.*: a file "):
            check_writable(folder)


def test_tree_files_are_sorted_and_exclude_hidden_ones(tmp_path: Path):
    for name in ("b/2.png", "b/1.png", "a.png", "a/z.png", ".hidden", ".git/config", "b/.tmp"):
        write_text(tmp_path / name, name)
    paths = [path.relative_to(tmp_path).as_posix() for path in tree_files(tmp_path)]
    assert paths == sorted(["a.png", "a/z.png", "b/1.png", "b/2.png"])
    assert tree_files(tmp_path / "a.png") == [tmp_path / "a.png"]


def test_tree_files_follows_links_but_not_cycles(tmp_path: Path):
    write_text(tmp_path / "there" / "x.png", "x")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "there")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there" / "up").symlink_to(root)
    assert [path.relative_to(root).as_posix() for path in tree_files(root)] == ["linked/x.png"]


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


def test_tree_digest_accepts_many_files_and_names_that_are_not_unicode(tmp_path: Path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(CHUNK_FILES + 2):
        (folder / f"{number:05}").touch()
    before = tree_sha256(folder)
    (folder / "04097").rename(folder / os.fsdecode(b"\xff"))
    assert tree_sha256(folder) != before


def test_join_below_refuses_paths_outside_the_root(tmp_path: Path):
    for name, path in {"a/b": "a/b", "a/../b": "b", "./a": "a", "..a/b..": "..a/b..", "": "."}.items():
        assert join_below(tmp_path, name) == tmp_path / path
    for name in ("../x", "a/../../x", "/etc/passwd", "..", "a/b/../../../root2/x"):
        with pytest.raises(DataError, match=f"path '{name}' .*root"):
            join_below(tmp_path / "root", name)
