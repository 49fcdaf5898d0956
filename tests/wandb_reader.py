"""Reader for offline runs of Weights & Biases."""

import struct
import time
from pathlib import Path

TIMEOUT_SECONDS = 300.0


def wandb_records(folder: Path) -> list:
    """Return the records of the one offline run below `folder`; wait for W&B's own process to write the last of them."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        records = _parse_records(path.read_bytes())
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end after {TIMEOUT_SECONDS:.0f} s: {len(records)} records")


def _parse_records(data: bytes) -> list:
    """Parse a LevelDB log with 7 bytes before the records of its first block."""
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b":W&B"[: len(data)]
    position, parts, records = 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a rest too short for a header is empty
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a record in one piece, or its last piece
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records
