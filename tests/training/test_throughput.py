"""Images a second: what is counted, and that a run tells it."""

import pytest

from fivefold.training.throughput import Throughput


def clock(*times: float):
    return iter(times).__next__


def test_the_median_leaves_the_first_pass_out():
    found = Throughput(clock(0.0, 10.0, 20.0, 21.0, 30.0, 32.0, 40.0, 44.0))
    for _ in range(4):
        with found.of(100):
            pass
    assert found.passes == [10.0, 100.0, 50.0, 25.0]
    assert found.figures() == {"images_per_second": 50.0}


def test_a_single_pass_is_its_own_median_and_none_says_nothing():
    found = Throughput(clock(0.0, 4.0))
    assert found.figures() == {}
    with found.of(100):
        pass
    assert found.figures() == {"images_per_second": 25.0}


def test_a_pass_that_fails_or_has_nothing_left_does_not_count():
    found = Throughput(clock(0.0, 1.0, 2.0))
    with pytest.raises(KeyError), found.of(100):
        raise KeyError
    with found.of(0):
        pass
    assert found.passes == []
