"""The forecast of a run's steps: the order of the Scheduler, limits, and sums that can be computed by hand."""

import math
from pathlib import Path

import pytest

from fivefold.launchers.plan import Inputs, Step, make_plan, without
from fivefold.planning.facts import DataFacts
from fivefold.planning.forecast import (
    Rates,
    describe,
    fine_tuning_seconds,
    fold_seconds,
    forecast_steps,
    other_seconds,
    peak_memory,
    rounds,
    simulate,
)
from fivefold.planning.probe import Speed

FACTS = DataFacts(1000, 5, 10, 100, 100, 0, 100, 200, 0.0, 200_000, 0.003)
SPEED = Speed("timm/tf_efficientnet_lite0", 45.0, 50.0, 90.0, 1280, 1e-8, 2e9, 2e7, 4.0)


def step(name: str, *needs: str) -> Step:
    return Step(name, "train-fold", (), {}, Path(name), needs)


@pytest.mark.parametrize(
    ("parallel", "workers", "expected"),
    [
        (1, 1, {"a": (0, 10), "b": (10, 20), "c": (20, 30), "d": (30, 40)}),
        (3, 3, {"a": (0, 10), "b": (10, 20), "c": (10, 20), "d": (20, 30)}),
        (2, 1, {"a": (0, 10), "b": (10, 30), "c": (10, 30), "d": (30, 40)}),
    ],
)
def test_steps_start_as_the_scheduler_starts_them(parallel: int, workers: int, expected: dict[str, object]) -> None:
    steps = [step("a"), step("b", "a"), step("c", "a"), step("d", "b", "c")]
    assert simulate(steps, dict.fromkeys("abcd", 10.0), Rates(parallel, workers)) == expected


def test_a_step_that_waits_for_a_missing_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="wait for missing ones: a"):
        simulate([step("a", "gone")], {"a": 1.0}, Rates(1, 1))


@pytest.mark.parametrize(("parallel", "workers"), [(1, 1), (2, 2), (3, 2), (5, 5)])
def test_rounds_agree_with_the_simulation(parallel: int, workers: int) -> None:
    steps = [step(str(fold)) for fold in range(5)]
    times = simulate(steps, {each.name: 1.0 for each in steps}, Rates(parallel, workers))
    assert max(end for _, end in times.values()) == pytest.approx(rounds(Rates(parallel, workers), 5))


def plan(*settings: str):
    inputs = Inputs("train", "eval")
    return make_plan(inputs, settings, "r", "runs", "photographs:fine_tune", local=True)


def test_a_limit_shortens_the_folds_alone() -> None:
    run, rates = plan(), Rates(2, 2)
    free = {each.name: each for each in forecast_steps(run.steps, run.settings, FACTS, SPEED, rates)}
    whole = max(each.end for each in free.values())
    limited = {each.name: each for each in forecast_steps(run.steps, run.settings, FACTS, SPEED, rates, whole - 60)}
    assert max(each.end for each in limited.values()) == pytest.approx(whole - 60, abs=0.1)
    for name, each in limited.items():
        shorter = each.end - each.start < free[name].end - free[name].start - 1e-6
        assert shorter == run.step(name).timed
    assert free["fold-0"].end - free["fold-0"].start == pytest.approx(
        fold_seconds(SPEED, FACTS, rates, run.settings.train.epochs)
    )


@pytest.mark.parametrize("rates", [Rates(1, 1), Rates(2, 2), Rates(3, 2)])
def test_the_sums_of_the_rules_agree_with_the_steps(rates: Rates) -> None:
    run = plan()
    left = without(run, ["split"]).steps
    steps = forecast_steps(left, run.settings, FACTS, SPEED, rates)
    ends = max(each.end for each in steps)
    epochs = fine_tuning_seconds(SPEED, FACTS, rates, run.settings.train.epochs)
    assert other_seconds(SPEED, FACTS, rates) + epochs == pytest.approx(ends, rel=0.15)


def test_memory_counts_the_steps_that_run_together() -> None:
    run = plan()
    one, two = (peak_memory(forecast_steps(run.steps, run.settings, FACTS, SPEED, Rates(n, 2))) for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)


def test_the_table_has_every_step_and_the_price() -> None:
    run = plan()
    steps = forecast_steps(run.steps, run.settings, FACTS, SPEED, Rates(2, 2), math.inf)
    text = describe(steps, hourly_price=3600.0)
    assert all(each.name in text for each in steps)
    assert f"{max(each.end for each in steps):.2f}" in text
