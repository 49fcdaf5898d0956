"""Readers of what other programs wrote, for tests of several folders."""

import struct
import time
from pathlib import Path

PATIENCE = 300.0


def wandb_records(folder: Path) -> list:
    """The records of the one offline run below `folder`; W&B's own process may still be writing the last of them."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        records = _records(path.read_bytes())
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end after {PATIENCE:.0f} s: {len(records)} records")


def _records(data: bytes) -> list:
    """A LevelDB log with 7 bytes ahead of its first block's records."""
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b":W&B"[: len(data)]
    at, parts, records = 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # what no header fits into is left empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record in one piece, or its last piece
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records
