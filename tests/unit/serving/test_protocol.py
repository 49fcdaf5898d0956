"""Forms of an answer; and whatever stands in a request, it is read or refused with a status and words."""

import base64
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fivefold.serving.protocol import (
    Prediction,
    RefusedError,
    as_csv,
    as_json,
    declared_length,
    is_list,
    negotiate_type,
    parse_top,
    read_list,
)

EXAMPLES = settings(
    max_examples=int(os.environ.get("FIVEFOLD_EXAMPLES", "60")), database=None, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=6)
    | st.sampled_from(["eA==", "eA=", "e A=="]),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=3), below, max_size=3),
)
LOG = np.log(np.array([[0.125, 0.5, 0.375], [0.25, 0.25, 0.5]], np.float32))


def test_the_likeliest_come_first_and_equal_ones_in_the_order_of_the_classes() -> None:
    found = json.loads(as_json(Prediction(("a", "고양이", "c"), LOG, 3, is_list=True)))
    assert [list(each["probabilities"].items()) for each in found] == [
        [("고양이", 0.5), ("c", 0.375), ("a", 0.125)],
        [("c", 0.5), ("a", 0.25), ("고양이", 0.25)],
    ]
    assert [(each["predicted_class"], each["confidence"]) for each in found] == [("고양이", 0.5), ("c", 0.5)]


def test_probabilities_keep_seven_digits_however_small_and_never_exceed_one() -> None:
    small = np.array([[1e-6, -20.0, -80.0]], np.float32)
    told = json.loads(as_json(Prediction(("a", "b", "c"), small, 3, is_list=False)))["probabilities"]
    assert told == {"a": 1.0, "b": pytest.approx(np.exp(-20), rel=1e-6), "c": pytest.approx(np.exp(-80), rel=1e-6)}


def test_a_table_quotes_what_a_class_may_hold() -> None:
    assert (
        as_csv(Prediction(('a "b", c', "d"), LOG[:, 1:], 1, is_list=True))
        == b'predicted_class,confidence\n"a ""b"", c",0.5\nd,0.5\n'
    )


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("image/png, Text/CSV;q=0.9", "text/csv"),
        ("application/*", "application/json"),
        ("text/csv, application/json", "text/csv"),
        ("image/png, text/html", 406),
    ],
)
def test_the_first_form_that_is_there_is_taken(accept: str, form: str | int) -> None:
    refusal = refused(lambda: negotiate_type(accept))
    assert (refusal.status if refusal else negotiate_type(accept)) == form


def refused(read: Callable[[], Any]) -> RefusedError | None:
    """Why it is refused, None where it is read; any other error is one of the test."""
    try:
        read()
    except RefusedError as refusal:
        return refusal
    return None


@EXAMPLES
@given(JSON, st.binary(max_size=40))
def test_any_json_and_any_bytes_are_a_list_of_files_or_refused(value, content) -> None:
    refusal = refused(lambda: read_list(content))
    assert refusal is None or refusal.status == 400
    text = json.dumps(value).encode()
    refusal = refused(lambda: read_list(text))
    if refusal is None:
        files = [base64.b64encode(file).decode() for file in read_list(text).files]
        assert files == ["".join(each.split()) for each in value]
        return
    assert refusal.status == 400
    assert refusal.as_json()["error"]
    assert not isinstance(value, list) or value[refusal.image] != "eA=="


WRAPPED = base64.encodebytes(bytes(range(256))).decode()


@pytest.mark.parametrize(
    "text",
    [
        WRAPPED,
        WRAPPED.replace("\n", "\r\n"),
        f"data:image/png;base64,{WRAPPED}",
        f"DATA:image/png;name=a.png;BASE64, {WRAPPED}",
    ],
)
def test_base64_may_have_line_breaks_and_be_a_data_url(text: str) -> None:
    assert read_list(json.dumps([text, text]).encode()).files == [bytes(range(256))] * 2
    assert read_list(f'["{text}"]'.encode()).files == [bytes(range(256))], "with the line breaks as they are"


@pytest.mark.parametrize(
    "text",
    ["data:image/png,eA==", "eA==,eA==", "image/png;base64,eA==", "data:;base64,", "eA==\n=", "data:;base64,###"],
)
def test_what_only_looks_like_base64_is_refused(text: str) -> None:
    refusal = refused(lambda: read_list(json.dumps(["eA==", text]).encode()))
    assert (refusal.status, refusal.image) == (400, 1)


@EXAMPLES
@given(st.text(max_size=20), st.text(max_size=12))
def test_any_words_of_a_head_are_understood_or_refused(words, key) -> None:
    readers = {
        415: lambda: is_list(words),
        406: lambda: negotiate_type(words),
        400: lambda: (parse_top({"top": words}, 9), parse_top({key: words}, 9)),
    }
    for status, read in readers.items():
        refusal = refused(read)
        assert refusal is None or refusal.status == status


@pytest.mark.parametrize(
    ("text", "length"), [("17", 17.0), ("", float("inf")), ("-1", float("inf")), ("1e9", float("inf"))]
)
def test_a_length_that_is_no_number_is_over_every_limit(text, length) -> None:
    assert declared_length({"content-length": text}) == length
    assert declared_length({}) == 0
