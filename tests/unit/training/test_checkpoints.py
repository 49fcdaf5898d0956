"""A run that is stopped at any point and resumed ends in the same bytes as an uninterrupted run."""

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


def make_trainer(case: str, images: ImageDataset, checkpoints: Checkpoints | None = None) -> tuple[Trainer, list[dict]]:
    """Return a new trainer, as in a new process, and the list that receives its epoch rows."""
    train = dict(CASES[case])
    patience, size = train.pop("patience", 0), 24 // STEPS // train.get("grad_accum_steps", 1)
    distill = (
        {"temperature": 2.0, "temperature_decay": 0.9, "alpha_anneal_fraction": 0.7} if case == "cooling" else None
    )
    train = {"epochs": EPOCHS, "batch_size": size, "lr": 0.02} | train
    trainer, rows = run_of(images, train, SMALL, mix="mixup", distill=distill, patience=patience)
    return replace(trainer, checkpoints=checkpoints), rows


def stop_after(trainer: Trainer, step: int) -> Trainer:
    """Return the trainer with a SIGTERM in the given step."""
    steps = iter(range(1, 1000))

    def send_sigterm() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return replace(trainer, after_step=[send_sigterm, *trainer.after_step])


def stop_while_scoring(trainer: Trainer, call: int) -> Trainer:
    """Return the trainer with a SIGTERM during validation, in the `call`-th computation of the loss."""
    calls = iter(range(1, 1000))

    def mean(logits, targets):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return trainer.loss.mean(logits, targets)

    return replace(trainer, loss=replace(trainer.loss, mean=mean))


def equal_states(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def check_resume(case: str, images: ImageDataset, folder: Path, stops: list[Callable[[Trainer], Trainer]]) -> None:
    """Stop one run after another, then finish one: the result must equal that of an uninterrupted run."""
    reference, expected = make_trainer(case, images)
    best = fit(reference)
    for stop in stops:
        trainer, _ = make_trainer(case, images, Checkpoints(folder))
        with defer_signals(), pytest.raises(StoppedError) as caught:
            fit(stop(trainer))
        assert caught.value.exit_code == 143
        random.seed()
        torch.manual_seed(99)  # a new process has another random state
    resumed, rows = make_trainer(case, images, Checkpoints(folder))
    results = fit(resumed)
    assert rows == expected, "epoch rows"
    for name, expected_best in best.items():
        assert (results[name].epoch, results[name].scores) == (expected_best.epoch, expected_best.scores)
        assert equal_states(results[name].state, expected_best.state), f"{name}: the best weights"
    assert equal_states(resumed.model.state_dict(), reference.model.state_dict()), "the last weights"


ALL_STEPS = [("everything", step) for step in range(1, EPOCHS * STEPS + 1)]
STEPS_AROUND_EPOCH_ENDS = [(case, step) for case in ("frozen, step", "cooling") for step in (2, 3, 4, 6, 7)]


@pytest.mark.parametrize(("case", "step"), ALL_STEPS + STEPS_AROUND_EPOCH_ENDS)
def test_run_stopped_in_any_step_resumes_to_the_same_bits(case, step, images, tmp_path):
    check_resume(case, images, tmp_path / "kept", [partial(stop_after, step=step)])


@pytest.mark.parametrize("case", CASES)
def test_run_stopped_repeatedly_and_during_validation_resumes_to_the_same_bits(case, images, tmp_path):
    scoring = partial(stop_while_scoring, call=1)
    stops = [scoring, partial(stop_after, step=2), scoring]
    ends_early = case == "patience"  # the second epoch is the last: its validation cannot be followed by another stop
    check_resume(case, images, tmp_path / "kept", stops[:2] if ends_early else stops)


def test_defect_product_every_epoch_saves_a_checkpoint_and_a_finished_run_does_not_rerun(images, tmp_path):
    """The original saved checkpoints only after epochs that improved."""
    trainer, rows = make_trainer("patience", images, Checkpoints(tmp_path / "kept"))
    best = fit(trainer)
    assert [path.stem for path in sorted((tmp_path / "kept").iterdir())] == ["00000001", "00000002"]
    assert len(rows) == 2
    assert rows[1]["val_logloss"] >= rows[0]["val_logloss"], "the second epoch was no better"
    resumed, resumed_rows = make_trainer("patience", images, Checkpoints(tmp_path / "kept"))
    assert equal_states(fit(replace(resumed, update=None))["raw"].state, best["raw"].state), (
        "without update, a training step would fail"
    )
    assert resumed_rows == rows
    assert Checkpoints(tmp_path / "kept").load()[RUNTIME] == {"precision": "fp32", "channels_last": True}
    bf16_state = PrecisionState(replace(CPU, dtype=torch.bfloat16, grouped_fp32=True))
    resumed, _ = make_trainer("patience", images, Checkpoints(tmp_path / "kept"))
    with pytest.raises(DataError, match=r"trained with .*fp32.*bf16_grouped_fp32"):
        fit(replace(resumed, components={**resumed.components, RUNTIME: bf16_state}))


def test_resumed_totals_are_moved_to_the_device(images, tmp_path):
    trainer, _ = make_trainer("cooling", images, Checkpoints(tmp_path / "kept"))
    with defer_signals(), pytest.raises(StoppedError):
        fit(stop_after(trainer, 2))
    resumed, _ = make_trainer("cooling", images, Checkpoints(tmp_path / "kept"))
    moved = replace(resumed, runtime=replace(CPU, device=torch.device("meta")))
    assert [total.device.type for total in _start_or_resume(moved).totals] == ["meta"] * 2


def test_resume_falls_back_to_the_previous_readable_checkpoint(images, tmp_path, caplog):
    folder = tmp_path / "kept"
    reference, _ = make_trainer("cooling", images)
    best = fit(reference)
    trainer, _ = make_trainer("cooling", images, Checkpoints(folder))
    with defer_signals(), pytest.raises(StoppedError):
        fit(stop_after(trainer, 8))
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-1000])
    resumed, _ = make_trainer("cooling", images, Checkpoints(folder))
    assert equal_states(fit(resumed)["raw"].state, best["raw"].state)
    assert f"{newest} cannot be read" in caplog.text
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert Checkpoints(folder).load() is None


def test_checkpoint_of_another_version_raises_a_data_error(images, tmp_path):
    Checkpoints(tmp_path / "kept").save({"random": {}, "weights of old": torch.zeros(3)})
    trainer, _ = make_trainer("cooling", images, Checkpoints(tmp_path / "kept"))
    with pytest.raises(DataError, match=r"does not fit this training \(KeyError: 'model'\).*remove the checkpoints"):
        fit(trainer)


def test_checkpoint_that_contains_code_is_not_loaded(tmp_path):
    """Others may write to the bucket of a checkpoint, so no code in its pickle may run."""

    class MaliciousObject:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (tmp_path / "kept").mkdir()
    torch.save({"x": MaliciousObject()}, tmp_path / "kept" / "00000001.pt")
    assert Checkpoints(tmp_path / "kept").load() is None
    assert not (tmp_path / "run").exists()


def test_last_two_checkpoints_are_kept_and_survive_a_full_disk(tiny_disk):
    checkpoints = Checkpoints(tiny_disk / "kept")
    for number in range(4):
        checkpoints.save({"number": number, "weights": torch.zeros(1000)})
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["00000003.pt", "00000004.pt"]
    with pytest.raises(RetryableError, match="no space left"):
        checkpoints.save({"number": 4, "weights": torch.zeros(50_000)})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == names
    assert checkpoints.load()["number"] == 3


def test_checkpoints_are_due_after_the_set_minutes_or_steps(tmp_path):
    now, due_by_time = [0.0], []
    all_checkpoints = [Checkpoints(tmp_path, *limits, clock=lambda: now[0]) for limits in ((2, 0), (0, 3), (0, 0))]
    for now[0] in (60.0, 119.0, 120.0, 130.0):
        due_by_time.append([checkpoints.due() for checkpoints in all_checkpoints])
        for checkpoints, due in zip(all_checkpoints, due_by_time[-1], strict=True):
            if due:
                checkpoints.save({})
    assert due_by_time == [[False, False, False], [False, False, False], [True, True, False], [False, False, False]]
