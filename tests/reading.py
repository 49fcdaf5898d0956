"""Readers of what other programs wrote, for tests of several folders."""

import struct
from pathlib import Path


def wandb_records(folder: Path) -> list:
    """The records of the one offline run below `folder`: a LevelDB log, 7 bytes ahead of its first block's records."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # what no header fits into is left empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record in one piece, or its last piece
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records
