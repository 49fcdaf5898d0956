"""Forms of an answer, and the lines of the counters."""

import json
import re

import numpy as np
import pytest

from fivefold.serving.answers import Said, as_csv, as_json, choose_form
from fivefold.serving.counters import Counters, Histogram
from fivefold.serving.refusals import RefusedError

LOG = np.log(np.array([[0.125, 0.5, 0.375], [0.25, 0.25, 0.5]], np.float32))


def test_the_likeliest_come_first_and_equal_ones_in_the_order_of_the_classes() -> None:
    found = json.loads(as_json(Said(("a", "고양이", "c"), LOG, 3, many=True)))
    assert [list(each["probabilities"].items()) for each in found] == [
        [("고양이", 0.5), ("c", 0.375), ("a", 0.125)],
        [("c", 0.5), ("a", 0.25), ("고양이", 0.25)],
    ]
    assert [(each["predicted_class"], each["confidence"]) for each in found] == [("고양이", 0.5), ("c", 0.5)]


def test_probabilities_keep_seven_digits_however_small_and_never_exceed_one() -> None:
    small = np.array([[1e-6, -20.0, -80.0]], np.float32)
    told = json.loads(as_json(Said(("a", "b", "c"), small, 3, many=False)))["probabilities"]
    assert told == {"a": 1.0, "b": pytest.approx(np.exp(-20), rel=1e-6), "c": pytest.approx(np.exp(-80), rel=1e-6)}


def test_a_table_quotes_what_a_class_may_hold() -> None:
    assert (
        as_csv(Said(('a "b", c', "d"), LOG[:, 1:], 1, many=True))
        == b'predicted_class,confidence\n"a ""b"", c",0.5\nd,0.5\n'
    )


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/csv", "text/csv"),
        ("image/png, Text/CSV;q=0.9", "text/csv"),
        ("application/*", "application/json"),
        ("text/csv, application/json", "text/csv"),
    ],
)
def test_the_first_form_that_is_there_is_taken(accept: str, form: str) -> None:
    assert choose_form(accept) == form


def test_a_form_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        RefusedError, match="Accept is 'image/png, text/html': answers are application/json or text/csv"
    ):
        choose_form("image/png, text/html")


def test_a_histogram_counts_all_below_each_bound() -> None:
    found = Histogram((1, 2.5))
    for value in (0.5, 1, 2, 7):
        found.add(value)
    assert list(found.lines("x")) == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="2.5"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 10.5",
        "x_count 4",
    ]


def test_counters_are_lines_as_prometheus_reads_them() -> None:
    counters = Counters()
    counters.request(200, 0.02)
    counters.request(413, 3)
    counters.batch(5)
    text = counters.text(2)
    assert text.endswith("\n")
    named = set()
    for line in text.splitlines():
        kind = re.fullmatch(r"# (?:HELP (\w+) .+|TYPE (\w+) (?:counter|gauge|histogram))", line)
        value = re.fullmatch(r'(\w+?)(?:_bucket|_sum|_count)?(?:\{\w+="[^"]+"\})? \d+(?:\.\d+)?', line)
        assert kind or value, line
        if kind:
            named.add(kind[1] or kind[2])
        else:
            assert value[1] in named, line
    assert 'fivefold_requests_total{status="413"} 1' in text
    assert "fivefold_images_under_way 2" in text
    assert (counters.images, counters.seconds.count) == (5, 2)
