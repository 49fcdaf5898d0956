import base64
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fivefold.serving.protocol import CSV, JSON, RefusedError, is_list, negotiate_type, parse_top, read_list, render

EXAMPLES = settings(
    max_examples=int(os.environ.get("FIVEFOLD_EXAMPLES", "40")), database=None, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=6) | st.sampled_from(["eA==", "eA=", "e A=="]),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=3), below, max_size=3),
)
LOG_PROBS = np.log(np.array([[0.125, 0.5, 0.375], [0.25, 0.25, 0.5]], np.float32))


def test_json_lists_classes_by_probability_and_ties_in_class_order() -> None:
    predictions = json.loads(render(JSON, ("a", "고양이", "c"), LOG_PROBS, 3, True))
    assert [list(prediction["probabilities"].items()) for prediction in predictions] == [
        [("고양이", 0.5), ("c", 0.375), ("a", 0.125)],
        [("c", 0.5), ("a", 0.25), ("고양이", 0.25)],
    ]
    assert (predictions[0]["predicted_class"], predictions[0]["confidence"]) == ("고양이", 0.5)


def test_json_probabilities_keep_seven_digits_and_never_exceed_one() -> None:
    log_probs = np.array([[1e-6, -20.0, -80.0]], np.float32)
    probabilities = json.loads(render(JSON, ("a", "b", "c"), log_probs, 3, False))["probabilities"]
    assert probabilities["a"] == 1.0
    assert list(probabilities.values()) == pytest.approx([1, np.exp(-20), np.exp(-80)], rel=1e-6)


def test_csv_quotes_class_names() -> None:
    table = render(CSV, ('a "b", c', "d"), LOG_PROBS[:, 1:], 1, True)
    assert table == b'predicted_class,confidence\n"a ""b"", c",0.5\nd,0.5\n'


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [("", JSON), ("*/*", JSON), ("image/png, Text/CSV;q=0.9", CSV), ("application/*", JSON), (f"{CSV}, {JSON}", CSV)],
)
def test_first_supported_content_type_is_chosen(accept: str, content_type: str) -> None:
    assert negotiate_type(accept) == content_type


def get_refusal(read: Callable[[], Any]) -> RefusedError | None:
    """Return the refusal, or None if the request is read; any other error fails the test."""
    try:
        read()
    except RefusedError as refusal:
        return refusal
    return None


@EXAMPLES
@given(VALUES, st.binary(max_size=40))
def test_read_list_parses_or_refuses_any_json_and_any_bytes(value, content) -> None:
    refusal = get_refusal(lambda: read_list(content))
    assert refusal is None or refusal.status == 400
    body = json.dumps(value).encode()
    refusal = get_refusal(lambda: read_list(body))
    if refusal is None:
        files = [base64.b64encode(file).decode() for file in read_list(body)]
        assert files == ["".join(text.split()) for text in value]
        return
    assert refusal.status == 400
    assert refusal.content["error"]
    assert not isinstance(value, list) or value[refusal.content["image"]] != "eA=="


WRAPPED_BASE64 = base64.encodebytes(bytes(range(256))).decode()


@pytest.mark.parametrize(
    "text",
    [
        WRAPPED_BASE64,
        WRAPPED_BASE64.replace("\n", "\r\n"),
        f"data:image/png;base64,{WRAPPED_BASE64}",
        f"DATA:image/png;name=a.png;BASE64, {WRAPPED_BASE64}",
    ],
)
def test_base64_accepts_line_breaks_and_data_urls(text: str) -> None:
    assert read_list(json.dumps([text, text]).encode()) == [bytes(range(256))] * 2
    assert read_list(f'["{text}"]'.encode()) == [bytes(range(256))], "with the line breaks as they are"


@pytest.mark.parametrize(
    "text",
    ["data:image/png,eA==", "eA==,eA==", "image/png;base64,eA==", "data:;base64,", "eA==\n=", "data:;base64,###"],
)
def test_invalid_base64_is_refused(text: str) -> None:
    refusal = get_refusal(lambda: read_list(json.dumps(["eA==", text]).encode()))
    assert (refusal.status, refusal.content["image"]) == (400, 1)


@EXAMPLES
@given(st.text(max_size=20), st.text(max_size=12))
def test_any_header_value_is_parsed_or_refused(value, key) -> None:
    readers = {
        415: lambda: is_list(value),
        406: lambda: negotiate_type(value),
        400: lambda: (parse_top({"top": value}, 9), parse_top({key: value}, 9)),
    }
    for status, read in readers.items():
        refusal = get_refusal(read)
        assert refusal is None or refusal.status == status
