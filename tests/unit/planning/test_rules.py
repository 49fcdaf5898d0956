"""The rules of a planned recipe: each depends on the facts or on the measured speed as its reason says."""

import math
from dataclasses import replace

import pytest

from fivefold.errors import SettingsError
from fivefold.planning.facts import DataFacts
from fivefold.planning.forecast import Rates, fine_tuning_seconds, linear_seconds, other_seconds
from fivefold.planning.probe import Speed
from fivefold.planning.rules import (
    BATCH_SIZE,
    FEW_ROWS,
    HEAD_EPOCHS,
    MIN_EPOCHS,
    PLANNING_S,
    STEPS,
    choose,
    count_epochs,
    training_size,
)

FACTS = DataFacts(3409, 5, 10, 100, 800, 500, 372, 200, 0.0, 200_000, 0.003)
RATES = Rates(parallel=2, workers=2)
FAST = Speed("timm/tf_efficientnet_lite0", 45.0, 50.0, 90.0, 1280, 1e-8, 2e9, 2e7, 4.0)
SLOW = replace(FAST, backbone="timm/tf_efficientnet_lite2", train=20.0, predict=25.0, frozen=45.0)


def values(speeds: list[Speed], facts: DataFacts = FACTS, limit: float = math.inf) -> dict[str, object]:
    return {choice.key: choice.value for choice in choose(speeds, facts, RATES, limit, f"time={limit:g}s")}


def time_for(speed: Speed, epochs: float, facts: DataFacts = FACTS) -> float:
    """Return the seconds of a run with so many epochs, by the parts of the forecast."""
    return PLANNING_S + other_seconds(speed, facts, RATES) + fine_tuning_seconds(speed, facts, RATES, epochs)


def test_the_most_accurate_backbone_whose_epochs_fit_is_chosen() -> None:
    limit = time_for(SLOW, 4)
    assert values([FAST, SLOW], limit=limit + 1)["model.backbone"] == SLOW.backbone
    assert values([FAST, SLOW], limit=limit / 3)["model.backbone"] == FAST.backbone
    assert values([FAST], limit=10 * limit)["model.backbone"] == FAST.backbone


@pytest.mark.parametrize(
    ("epochs", "method"),
    [(MIN_EPOCHS - 0.05, "linear_probe"), (MIN_EPOCHS + 0.05, "lp_ft"), (HEAD_EPOCHS + 0.05, "fine_tune")],
)
def test_the_epochs_that_fit_decide_the_method(epochs: float, method: str) -> None:
    chosen = values([FAST], limit=time_for(FAST, epochs))
    assert chosen["train.method"] == method
    assert chosen.get("train.linear_first", False) == (method != "linear_probe")


@pytest.mark.parametrize(("rows", "epochs"), [(100, 30), (1000, 11), (2700, 4), (50_000, 4)])
def test_fewer_rows_get_more_epochs(rows: int, epochs: int) -> None:
    assert count_epochs(rows) == epochs
    if 4 < epochs < 30:
        assert epochs * rows / BATCH_SIZE == pytest.approx(STEPS, rel=0.1)


@pytest.mark.parametrize(("rows", "method"), [(FEW_ROWS, "linear_probe"), (2 * FEW_ROWS, "fine_tune")])
def test_few_rows_are_not_fine_tuned(rows: int, method: str) -> None:
    assert values([FAST], replace(FACTS, rows=rows))["train.method"] == method


def test_too_little_time_for_linear_probes_names_the_least_that_would_do() -> None:
    needed = linear_seconds(FAST, FACTS, RATES)
    with pytest.raises(SettingsError, match=rf"time={math.ceil(1.2 * needed + PLANNING_S)}s"):
        values([FAST], limit=needed / 2)
    assert values([FAST], limit=1.2 * needed + PLANNING_S)["train.method"] == "linear_probe"


def test_without_a_limit_a_slow_machine_gets_linear_probes() -> None:
    slow = replace(FAST, train=1.0)
    assert values([slow])["train.method"] == "linear_probe"
    assert values([slow], limit=1e6)["train.method"] == "fine_tune"


@pytest.mark.parametrize(("size", "expected"), [(224, 160), (240, 160), (260, 192), (288, 192), (32, 32)])
def test_training_sizes_are_multiples_of_32(size: int, expected: int) -> None:
    assert training_size(size) == expected


def test_a_smaller_batch_keeps_the_images_of_a_step() -> None:
    chosen = {choice.key: choice.value for choice in choose([FAST], FACTS, RATES, math.inf, "", batch=8)}
    assert chosen["train.batch_size"] * chosen["train.grad_accum_steps"] == BATCH_SIZE


def test_every_choice_has_a_reason() -> None:
    chosen = choose([FAST, SLOW], replace(FACTS, smallest_class=2), RATES, 1e4, "time=10000s")
    assert all(len(choice.reason) > 10 for choice in chosen)
    assert len({choice.key for choice in chosen}) == len(chosen)
