"""Probabilities as text, a hundred million of them: the cells of a submission of a million rows. No torch.

Python's own formatting takes half a microsecond a number. Here the digits of whole arrays are looked
up: three of them, then four, then the exponent, as 1.234567e-02.
"""

import csv
import io
from collections.abc import Iterator, Sequence

import numpy as np

AT_ONCE = 96
"""Rows whose figures are made at a time, so that they stay in the processor's cache."""
LEAST_EXPONENT = -99
"""Smaller numbers have no room for their exponent; they are written as 0."""
LOG_OF_10 = float(np.log(10))
CELL = np.dtype([("comma", "S1"), ("first", "<u4"), ("last", "<u4"), ("exponent", "<u4")])


def _words(texts: Sequence[str]) -> np.ndarray:
    """Texts of four characters, each as one number."""
    return np.frombuffer("".join(texts).encode(), "<u4")


FIRST = _words([f"{number // 100}.{number % 100:02d}" for number in range(1000)])
LAST = _words([f"{number:04d}" for number in range(10_000)])
EXPONENT = _words([f"e{-number:+03d}" if number else "e+00" for number in range(-LEAST_EXPONENT + 1)])


def cells(log_probs: np.ndarray) -> np.ndarray:
    """The probabilities of natural logarithms [N, C] as text, seven digits each, a comma before each: bytes uint8 [N, 13 · C].

    The same as Python's `f",{p:.6e}"` but for halves at the seventh digit; below 1e-99 it is 0.
    """
    logs = log_probs.astype(np.float64)
    exponent = np.floor(np.maximum(logs, -1e6) / LOG_OF_10)
    digits = np.rint(np.exp(logs - exponent * LOG_OF_10) * 1e6)
    over = digits >= 1e7  # 9.9999996 is 1.000000 and one more in the exponent; a quotient may be a hair off too
    exponent += over
    digits[over] = 1e6
    nothing = exponent < LEAST_EXPONENT
    digits[nothing], exponent[nothing] = 0, 0
    first = np.floor(digits / 10_000)
    found = np.empty(logs.shape, CELL)
    found["comma"] = b","
    found["first"] = FIRST[first.astype(np.int32)]
    found["last"] = LAST[(digits - first * 10_000).astype(np.int32)]
    found["exponent"] = EXPONENT[np.maximum(-exponent, 0).astype(np.int32)]
    return found.view(np.uint8).reshape(len(logs), -1)


def lines(ids: Sequence[str], log_probs: np.ndarray) -> Iterator[bytes]:
    """Lines of a CSV, some at a time: each id, quoted where it must be, and the probabilities of its row [N, C]."""
    ids = _quoted(ids) if _any_to_quote(ids) else ids
    width = CELL.itemsize * log_probs.shape[1]
    for start in range(0, len(ids), AT_ONCE):
        text, parts = cells(log_probs[start : start + AT_ONCE]).tobytes(), []
        for at, name in enumerate(ids[start : start + AT_ONCE]):
            parts += (name.encode(), text[at * width : (at + 1) * width], b"\r\n")
        yield b"".join(parts)


def _any_to_quote(ids: Sequence[str]) -> bool:
    together = "".join(ids)
    return any(sign in together for sign in ',"\r\n') or "" in ids


def _quoted(ids: Sequence[str]) -> list[str]:
    found = []
    for name in ids:
        text = io.StringIO(newline="")
        csv.writer(text).writerow([name, ""])
        found.append(text.getvalue().removesuffix(",\r\n"))
    return found
