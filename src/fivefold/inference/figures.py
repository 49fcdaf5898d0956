"""Probabilities as text, a hundred million of them: the cells of a submission of a million rows. No torch.

Python's own formatting takes half a microsecond a number. Here the digits of whole arrays are looked
up: three of them, then four, then the exponent, as 1.234567e-02.
"""

import csv
import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

AT_ONCE = 48_000
"""Numbers that are turned to text at a time, so that they stay in the processor's cache."""
CHUNK = 2 << 20
"""Bytes of lines that are given at a time: in small pieces a file takes twice the time to be written."""
LEAST_EXPONENT = -99
"""Smaller numbers have no room for their exponent; they are written as 0."""
LEAST_LOG = -240.0
"""A logarithm that is surely written as 0; those below it, down to -inf, count as this one."""
CELL = np.dtype([("comma", "S1"), ("first", "<u4"), ("last", "<u4"), ("exponent", "<u4")])
PER_EXPONENT = -1 / float(np.log(10))
ROUNDED_UP = 1 - 2.17148e-8
"""A number's negative exponent is its -log10 plus 1, cut off; less than 1, because from 9.9999995 on it rounds to the next."""


def _words(texts: Sequence[str]) -> np.ndarray:
    """Texts of four characters, each as one number."""
    return np.frombuffer("".join(texts).encode(), "<u4")


FIRST = _words([f"{number // 100}.{number % 100:02d}" for number in range(1000)])
LAST = _words([f"{number:04d}" for number in range(10_000)])
EXPONENT = _words([f"e{-number:+03d}" if number else "e+00" for number in range(-LEAST_EXPONENT + 1)] + ["e+00"])
SCALE = np.array([float(f"1e{number + 6}") for number in range(-LEAST_EXPONENT + 1)] + [0.0])
"""What makes seven digits of a number of each negative exponent; 0 for those that have no room."""


def cells(log_probs: np.ndarray) -> np.ndarray:
    """The probabilities of natural logarithms [N, C] as text, seven digits each, a comma before each: bytes uint8 [N, 13 · C].

    The same as Python's `f",{p:.6e}"` but for halves at the seventh digit; below 1e-99 it is 0.
    """
    text = np.empty((len(log_probs), CELL.itemsize * log_probs.shape[1]), np.uint8)
    _write_cells(log_probs, text.view(CELL))
    return text


def _write_cells(log_probs: np.ndarray, found: np.ndarray) -> None:
    """Writes the probabilities of log_probs [n, C], in any layout, as cells into `found` [n, C]."""
    probs = np.empty(log_probs.shape)
    np.copyto(probs, log_probs)
    np.maximum(probs, LEAST_LOG, out=probs)
    scale = probs * PER_EXPONENT
    scale += ROUNDED_UP
    exponent = scale.astype(np.intp)
    np.exp(probs, out=probs)
    probs *= np.take(SCALE, exponent, out=scale, mode="clip")
    digits = np.rint(probs, out=probs).astype(np.uint32)
    first = digits // np.uint32(10_000)
    found["comma"] = b","
    found["first"] = np.take(FIRST, first, mode="clip")
    first *= np.uint32(10_000)
    digits -= first
    found["last"] = np.take(LAST, digits, mode="clip")
    found["exponent"] = np.take(EXPONENT, exponent, mode="clip")


def lines(ids: pa.Array, log_probs: np.ndarray, end: bytes = b"\n") -> Iterator[memoryview]:
    """Lines of a CSV, about CHUNK bytes at a time: each of `ids` [N], quoted where it must be, the probabilities
    of its row of log_probs [N, C], in any layout, and the `end`.
    """
    if any(pc.any(pc.match_substring(ids, sign)).as_py() for sign in ',"\r\n'):
        ids = pa.array(_quoted(ids.to_pylist()), pa.string())
    rows = max(1, CHUNK // (CELL.itemsize * log_probs.shape[1]))
    for start in range(0, len(ids), rows):
        yield _joined(ids.slice(start, rows), _endings(log_probs[start : start + rows], end))


def _endings(log_probs: np.ndarray, end: bytes) -> np.ndarray:
    """The cells of rows [n, C] and the end of their lines: bytes uint8 [n, 13 · C + len(end)]."""
    count, classes = log_probs.shape
    text = np.empty((count, CELL.itemsize * classes + len(end)), np.uint8)
    text[:, -len(end) :] = np.frombuffer(end, np.uint8)
    found, rows = text[:, : -len(end)].view(CELL), max(1, AT_ONCE // classes)
    for start in range(0, count, rows):
        _write_cells(log_probs[start : start + rows], found[start : start + rows])
    return text


def _joined(ids: pa.Array, endings: np.ndarray) -> memoryview:
    """Each id [n] with what follows it in its line [n, W], one line after the other."""
    offsets = np.arange(len(endings) + 1, dtype=np.int32) * np.int32(endings.shape[1])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(endings)]
    follows = pa.Array.from_buffers(pa.binary(), len(endings), buffers)
    together = pc.binary_join_element_wise(ids.cast(pa.binary()), follows, b"")
    _, ends, text = together.buffers()
    return memoryview(text)[: np.frombuffer(ends, np.int32)[len(endings)]]


def _quoted(ids: Sequence[str]) -> list[str]:
    found = []
    for name in ids:
        text = io.StringIO(newline="")
        csv.writer(text).writerow([name, ""])
        found.append(text.getvalue().removesuffix(",\r\n"))
    return found
