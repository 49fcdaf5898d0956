"""A run that must end at a given time: the learning rate falls with the time, and the last epoch ends early."""

import math
from dataclasses import replace

import pytest

from fivefold.training.optim import Schedule
from fivefold.training.time_limit import EXIT_SECONDS, FORWARD_SHARE, TimeLimit
from fivefold.training.trainer import Trainer, fit
from toy_training import images_in, run_of


class Clock:
    """A clock that advances by `step` seconds at each reading."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 1000.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def limited(trainer: Trainer, limit: TimeLimit) -> Trainer:
    old = trainer.schedule
    schedule = Schedule("cosine", old.optimizer, 12, 3, passed=lambda: limit.progress)
    return replace(
        trainer,
        limit=limit,
        schedule=schedule,
        after_step=[schedule],
        components={**trainer.components, "schedule": schedule, "limit": limit},
    )


def test_progress_is_the_share_of_the_time_without_the_predictions_at_the_end():
    clock = Clock()
    limit = TimeLimit(clock.now + EXIT_SECONDS + 100, images_after=50, clock=clock)
    assert limit.progress == 0
    clock.now += 20
    assert limit.progress == pytest.approx(0.2)
    limit.count(40)  # half a second an image
    assert limit.progress == pytest.approx(20 / (100 - FORWARD_SHARE * 0.5 * 50))
    for _ in range(2):
        clock.now += 4
        limit.count(40)  # a tenth of a second: the first step warmed up
    assert limit.progress == pytest.approx(28 / (100 - FORWARD_SHARE * 0.1 * 50))
    clock.now += 90
    assert limit.progress == 1


def test_a_slow_first_step_does_not_end_the_run():
    clock = Clock()
    limit = TimeLimit(clock.now + EXIT_SECONDS + 100, images_after=5000, clock=clock)
    clock.now += 10
    limit.count(32)
    assert limit.progress < 0.3


def test_without_a_deadline_nothing_changes():
    limit = TimeLimit()
    limit.count(10)
    assert (limit.deadline, limit.progress) == (math.inf, 0)


def test_a_resumed_run_goes_on_from_its_progress():
    clock = Clock()
    limit = TimeLimit(clock.now + EXIT_SECONDS + 100, 0, clock)
    clock.now += 60
    again = TimeLimit(clock.now + EXIT_SECONDS + 50, 0, clock)
    again.load_state_dict(limit.state_dict())
    assert again.progress == pytest.approx(0.6)
    clock.now += 25
    assert again.progress == pytest.approx(0.8)


def test_training_ends_in_time_at_rate_zero_and_keeps_its_last_weights(tmp_path):
    images = images_in(tmp_path / "images", 12, size=6)
    for select in (True, False):
        trainer, rows = run_of(images, {"batch_size": 4, "validate_every": 9}, select=select)
        clock = Clock(step=1.0)
        trainer = limited(trainer, TimeLimit(clock.now + EXIT_SECONDS + 22, 0, clock))
        best = fit(trainer)["raw"]
        assert 1 <= len(rows) < 4
        assert "val_logloss" in rows[-1]
        assert best.epoch == len(rows)
        assert best.state["head.weight"].equal(trainer.model.state_dict()["head.weight"])
        assert trainer.schedule.lr < 0.1 * trainer.schedule.base_lrs[0]


def test_a_run_whose_time_is_over_makes_one_step(tmp_path):
    trainer, rows = run_of(images_in(tmp_path / "images", 12, size=6), {"batch_size": 4})
    trainer = limited(trainer, TimeLimit(0.0))
    assert fit(trainer)["raw"].epoch == 1
    assert len(rows) == 1
