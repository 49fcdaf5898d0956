"""Large files written once: their bytes, their digest, and what a full disk says."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fivefold.contract.files import atomic, sha256
from fivefold.contract.streamed import SYNC_EVERY, Streamed
from fivefold.errors import RetryableError


def test_the_bytes_are_those_written_and_so_is_the_digest(tmp_path: Path):
    pieces = [
        b"first",
        bytearray(b"second"),
        memoryview(np.arange(9, dtype=np.int32)),
        pa.py_buffer(b""),
        b"\xff" * 70_000,
    ]
    with Streamed(tmp_path / "a") as file:
        assert [file.write(piece) for piece in pieces] == [5, 6, 36, 0, 70_000]
        assert file.tell() == 70_047
        file.writelines([b"x", b"y"])
    assert (tmp_path / "a").read_bytes() == b"".join(bytes(piece) for piece in pieces) + b"xy"
    assert file.sha256() == sha256(tmp_path / "a")


def test_what_is_brought_to_the_disk_meanwhile_is_whole(tmp_path: Path):
    piece, times = np.random.default_rng(0).bytes(5_000_011), 2 * SYNC_EVERY // 5_000_011 + 3
    with Streamed(tmp_path / "a") as file:
        for _ in range(times):
            file.write(piece)
    assert (tmp_path / "a").stat().st_size == times * len(piece)
    assert file.sha256() == sha256(tmp_path / "a") == hashlib.sha256(piece * times).hexdigest()


def test_a_table_is_the_same_as_in_a_file_of_its_path(tmp_path: Path):
    table = pa.table({"id": [str(n) for n in range(1000)], "p/a": np.random.default_rng(0).random(1000)})
    pq.write_table(table, tmp_path / "plain")
    with Streamed(tmp_path / "streamed") as file:
        pq.write_table(table, file)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "plain").read_bytes()


def test_nothing_is_written_over(tmp_path: Path):
    (tmp_path / "a").write_text("there")
    with pytest.raises(FileExistsError):
        Streamed(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "there"


def test_a_full_disk_says_so_and_leaves_nothing(tiny_disk: Path):
    with pytest.raises(RetryableError, match=r"no space left to write .*a: free some") as found:
        with atomic(tiny_disk / "a") as temporary, Streamed(temporary) as file:
            file.write(bytes(1 << 20))
    assert found.value.__cause__.errno == errno.ENOSPC
    assert list(tiny_disk.iterdir()) == []
