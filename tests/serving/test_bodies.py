"""Whatever stands in a request, it is read or refused with a status and words: nothing of foreign bytes is an error of ours."""

import base64
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fivefold.serving.answers import choose_form
from fivefold.serving.bodies import count_wanted, declared_length, is_list, read_list
from fivefold.serving.refusals import RefusedError

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


def refused(read: Callable[[], Any]) -> RefusedError | None:
    """Why it is refused, None where it is read; any other error is one of the test."""
    try:
        read()
    except RefusedError as refusal:
        return refusal
    return None


@EXAMPLES
@given(JSON)
def test_any_json_is_a_list_of_files_or_refused(value) -> None:
    text = json.dumps(value).encode()
    refusal = refused(lambda: read_list(text))
    if refusal is None:
        assert [base64.b64encode(file).decode() for file in read_list(text).files] == value
        return
    assert refusal.status == 400
    assert refusal.as_json()["error"]
    assert not isinstance(value, list) or value[refusal.image] != "eA=="


@EXAMPLES
@given(st.binary(max_size=40))
def test_any_bytes_are_a_list_of_files_or_refused(content) -> None:
    refusal = refused(lambda: read_list(content))
    assert refusal is None or refusal.status == 400


@EXAMPLES
@given(st.text(max_size=20), st.text(max_size=12))
def test_any_words_of_a_head_are_understood_or_refused(words, key) -> None:
    readers = {
        415: lambda: is_list(words),
        406: lambda: choose_form(words),
        400: lambda: (count_wanted({"top": words}, 9), count_wanted({key: words}, 9)),
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
