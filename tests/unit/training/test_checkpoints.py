"""A run that is stopped anywhere and goes on ends in the same bytes as one that is not."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.errors import DataError, RetryableError, StoppedError
from fivefold.execution import RUNTIME, PrecisionState
from fivefold.signals import defer_signals
from fivefold.training.checkpoints import Checkpoints
from fivefold.training.trainer import Trainer, _start_or_resume, fit
from toy_training import CPU, SMALL, images_in, run_of

EPOCHS, STEPS = 4, 3
CASES = {
    "everything": {"grad_accum_steps": 2, "max_grad_norm": 1.0, "ema_decay": 0.95, "save_raw_weights": True, "rdrop_alpha": 0.5,
                   "sam_rho": 0.05, "sampler": "balanced"},
    "frozen, step": {"freeze_epochs": 2, "schedule": "step", "lr_step_epochs": 1, "optimizer": "sgd"},
    "cooling": {"optimizer": "muon", "warmup_epochs": 1.0},
    "patience": {"patience": 1, "lr": 1e-9},
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> ImageDataset:
    return images_in(tmp_path / "images", 24, transforms=("random_crop", "horizontal_flip"))


def made(case: str, images: ImageDataset, checkpoints: Checkpoints | None = None) -> tuple[Trainer, list[dict]]:
    """A fresh loop, as a new process makes it, and the rows of epochs that its observer is told of."""
    train = dict(CASES[case])
    patience, size = train.pop("patience", 0), 24 // STEPS // train.get("grad_accum_steps", 1)
    distill = (
        {"temperature": 2.0, "temperature_decay": 0.9, "alpha_anneal_fraction": 0.7} if case == "cooling" else None
    )
    train = {"epochs": EPOCHS, "batch_size": size, "lr": 0.02} | train
    loop, told = run_of(images, train, SMALL, mix="mixup", distill=distill, patience=patience)
    return replace(loop, checkpoints=checkpoints), told


def stopped_after(loop: Trainer, step: int) -> Trainer:
    """The loop, in which SIGTERM comes within the given step."""
    steps = iter(range(1, 1000))

    def strike() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return replace(loop, after_step=[strike, *loop.after_step])


def stopped_while_scoring(loop: Trainer, call: int) -> Trainer:
    """The loop, in which SIGTERM comes within a validation: the `call`-th time that a loss is taken there."""
    calls = iter(range(1, 1000))

    def mean(logits, targets):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return loop.loss.mean(logits, targets)

    return replace(loop, loss=replace(loop.loss, mean=mean))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def through(case: str, images: ImageDataset, folder: Path, stops: list[Callable[[Trainer], Trainer]]) -> None:
    """Stops one run after the other, then lets one go on to its end, which must be that of a run without a stop."""
    reference, expected = made(case, images)
    best = fit(reference)
    for stop in stops:
        loop, _ = made(case, images, Checkpoints(folder))
        with defer_signals(), pytest.raises(StoppedError) as caught:
            fit(stop(loop))
        assert caught.value.exit_code == 143
        random.seed()
        torch.manual_seed(99)  # whatever a new process has
    last, rows = made(case, images, Checkpoints(folder))
    found = fit(last)
    assert rows == expected, "what an observer is told of epochs"
    for name, kept in best.items():
        assert (found[name].epoch, found[name].scores) == (kept.epoch, kept.scores)
        assert same(found[name].state, kept.state), f"{name}: the kept weights"
    assert same(last.model.state_dict(), reference.model.state_dict()), "the last weights"


EVERY_STEP = [("everything", step) for step in range(1, EPOCHS * STEPS + 1)]
AROUND_AN_EPOCHS_END = [(case, step) for case in ("frozen, step", "cooling") for step in (2, 3, 4, 6, 7)]


@pytest.mark.parametrize(("case", "step"), EVERY_STEP + AROUND_AN_EPOCHS_END)
def test_stopped_within_any_step_it_goes_on_to_the_same_bits(case, step, images, tmp_path):
    through(case, images, tmp_path / "kept", [partial(stopped_after, step=step)])


@pytest.mark.parametrize("case", CASES)
def test_stopped_again_and_again_also_while_it_scores(case, images, tmp_path):
    scoring = partial(stopped_while_scoring, call=1)
    stops = [scoring, partial(stopped_after, step=2), scoring]
    over = case == "patience"  # the second epoch is its last: nothing is left to be stopped after its scores
    through(case, images, tmp_path / "kept", stops[:2] if over else stops)


def test_defect_product_a_checkpoint_follows_every_epoch_and_a_run_that_is_over_is_not_run_again(images, tmp_path):
    """The original wrote one after better epochs alone."""
    loop, rows = made("patience", images, Checkpoints(tmp_path / "kept"))
    best = fit(loop)
    assert [path.stem for path in sorted((tmp_path / "kept").iterdir())] == ["00000001", "00000002"]
    assert len(rows) == 2
    assert rows[1]["val_logloss"] >= rows[0]["val_logloss"], "the second epoch was no better"
    again, told = made("patience", images, Checkpoints(tmp_path / "kept"))
    assert same(fit(replace(again, update=None))["raw"].state, best["raw"].state), "a step would fail"
    assert told == rows
    assert Checkpoints(tmp_path / "kept").load()[RUNTIME] == {"precision": "fp32", "channels_last": True}
    other = PrecisionState(replace(CPU, dtype=torch.bfloat16, grouped_fp32=True))
    again, _ = made("patience", images, Checkpoints(tmp_path / "kept"))
    with pytest.raises(DataError, match=r"trained with .*fp32.*bf16_grouped_fp32"):
        fit(replace(again, components={**again.components, RUNTIME: other}))


def test_what_it_has_summed_up_lies_on_the_device_again(images, tmp_path):
    loop, _ = made("cooling", images, Checkpoints(tmp_path / "kept"))
    with defer_signals(), pytest.raises(StoppedError):
        fit(stopped_after(loop, 2))
    again, _ = made("cooling", images, Checkpoints(tmp_path / "kept"))
    elsewhere = replace(again, runtime=replace(CPU, device=torch.device("meta")))
    assert [each.device.type for each in _start_or_resume(elsewhere).totals] == ["meta"] * 2


def test_one_that_cannot_be_read_gives_way_to_the_one_before(images, tmp_path, caplog):
    folder = tmp_path / "kept"
    reference, _ = made("cooling", images)
    best = fit(reference)
    loop, _ = made("cooling", images, Checkpoints(folder))
    with defer_signals(), pytest.raises(StoppedError):
        fit(stopped_after(loop, 8))
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-1000])
    last, _ = made("cooling", images, Checkpoints(folder))
    assert same(fit(last)["raw"].state, best["raw"].state)
    assert f"{newest} cannot be read" in caplog.text
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert Checkpoints(folder).load() is None


def test_one_of_another_version_is_told_as_such(images, tmp_path):
    Checkpoints(tmp_path / "kept").save({"random": {}, "weights of old": torch.zeros(3)})
    loop, _ = made("cooling", images, Checkpoints(tmp_path / "kept"))
    with pytest.raises(DataError, match=r"does not fit this training \(KeyError: 'model'\).*remove the checkpoints"):
        fit(loop)


def test_nothing_but_plain_values_is_read(tmp_path):
    """A checkpoint may come out of a bucket that others write to: no code of its pickle is run."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (tmp_path / "kept").mkdir()
    torch.save({"x": Evil()}, tmp_path / "kept" / "00000001.pt")
    assert Checkpoints(tmp_path / "kept").load() is None
    assert not (tmp_path / "run").exists()


def test_two_are_kept_and_a_full_disk_leaves_them_be(tiny_disk):
    kept = Checkpoints(tiny_disk / "kept")
    for number in range(4):
        kept.save({"number": number, "weights": torch.zeros(1000)})
    names = sorted(path.name for path in kept.folder.iterdir())
    assert names == ["00000003.pt", "00000004.pt"]
    with pytest.raises(RetryableError, match="no space left"):
        kept.save({"number": 4, "weights": torch.zeros(50_000)})
    assert sorted(path.name for path in kept.folder.iterdir()) == names
    assert kept.load()["number"] == 3


def test_it_is_time_after_so_many_minutes_or_steps(tmp_path):
    now, found = [0.0], []
    kinds = [Checkpoints(tmp_path, *every, clock=lambda: now[0]) for every in ((2, 0), (0, 3), (0, 0))]
    for now[0] in (60.0, 119.0, 120.0, 130.0):
        found.append([each.due() for each in kinds])
        for each, due in zip(kinds, found[-1], strict=True):
            if due:
                each.save({})
    assert found == [[False, False, False], [False, False, False], [True, True, False], [False, False, False]]
