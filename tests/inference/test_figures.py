"""Cells of a submission against Python's own formatting, number by number."""

import csv
import io

import numpy as np
import pyarrow as pa
import pytest

from fivefold.inference.figures import CHUNK, cells, lines


def by_python(log_probs: np.ndarray) -> list[bytes]:
    return ["".join(f",{p:.6e}" for p in np.exp(row)).encode() for row in log_probs.astype(np.float64)]


@pytest.mark.parametrize("low", [-1e-6, -3, -40, -220])
def test_the_digits_are_pythons_own(low):
    log_probs = np.random.default_rng(0).uniform(low, 0, (500, 7)).astype(np.float32)
    assert [bytes(row) for row in cells(log_probs)] == by_python(log_probs)


def test_numbers_at_the_edge_of_another_exponent():
    probs = np.array([[1.0, 0.1, 0.01, 1e-9, 0.99999994, 0.099999999, 9.9999996e-5, 1e-98]])
    found = [text.decode() for text in cells(np.log(probs)).tobytes().split(b",")[1:]]
    np.testing.assert_allclose([float(text) for text in found], probs[0], rtol=5e-7)
    assert {len(text) for text in found} == {12}
    assert found[0] == "1.000000e+00"
    assert found[4] == "9.999999e-01"


@pytest.mark.parametrize("exponent", [0, 1, 4, 37, 98])
def test_where_seven_digits_round_up_to_the_next_exponent(exponent):
    probs = (10 - np.array([4e-7, 4.99e-7, 5.01e-7, 6e-7, 1e-6, 9.4e-6])) * 10.0 ** -(exponent + 1)
    log_probs = np.log(probs)[None]
    expected = "".join(f",{p:.6e}" for p in np.exp(log_probs[0])).encode()
    assert cells(log_probs).tobytes() == expected
    assert b"10.0" not in expected
    assert expected.startswith(f",1.000000e{-exponent:+03d},1.000000e".encode())


def test_confident_rows_and_any_layout():
    logits = np.random.default_rng(0).normal(0, 40, (300, 700)).astype(np.float32)
    log_probs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    assert (log_probs == 0).any()
    expected = by_python(np.where(log_probs < -227.95, -np.inf, log_probs))
    for layout in (log_probs, np.asfortranarray(log_probs), np.repeat(log_probs, 2, axis=1)[:, ::2]):
        assert [bytes(row) for row in cells(layout)] == expected


def test_nothing_and_next_to_nothing_are_zero_and_a_hair_above_one_is_one():
    assert cells(np.array([[-np.inf, -708.0, -228.0]])).tobytes() == b",0.000000e+00" * 3
    assert cells(np.array([[1e-8]], np.float32)).tobytes() == b",1.000000e+00"


@pytest.mark.parametrize("classes", [1, 2, 100, 40_000])
def test_lines_of_several_chunks_are_whole(classes):
    rows = CHUNK // (13 * classes) * 2 + 7 if classes > 2 else 9000
    ids = pa.array([f"{n}" for n in range(rows + 5)]).slice(5)
    log_probs = np.random.default_rng(0).uniform(-20, 0, (classes, rows)).astype(np.float32).T
    found = b"".join(lines(ids, log_probs)).split(b"\n")
    assert found.pop() == b""
    texts = cells(log_probs)
    assert found == [name.encode() + bytes(text) for name, text in zip(ids.to_pylist(), texts, strict=True)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_those_of_a_csv_whatever_the_ids(end):
    ids = ["plain", 'a "quoted" one', "with, comma", "", "이름", "two\nlines"] * 40
    log_probs = np.log(np.random.default_rng(0).dirichlet(np.ones(3), len(ids)))
    text = b"".join(lines(pa.array(ids), log_probs, end.encode())).decode()
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [row[0] for row in rows] == ids
    np.testing.assert_allclose(np.array([row[1:] for row in rows], float), np.exp(log_probs), rtol=5e-7)
    expected = io.StringIO(newline="")
    csv.writer(expected, lineterminator=end).writerows(
        [name, *(f"{p:.6e}" for p in np.exp(row))] for name, row in zip(ids, log_probs, strict=True)
    )
    assert text == expected.getvalue()
