"""A run that is stopped at any point and resumed ends in the same bytes as an uninterrupted run."""

import os
import random
import signal
from dataclasses import replace

import pytest
import torch

from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.errors import DataError, StoppedError
from fivefold.execution import RUNTIME, PrecisionState
from fivefold.signals import defer_signals
from fivefold.training.checkpoints import Checkpoints
from fivefold.training.trainer import Trainer, _start_or_resume, fit
from toy_training import CPU, SMALL, images_in, run_of

EPOCHS, STEPS = 2, 3
CASES = {
    "everything": {"grad_accum_steps": 2, "max_grad_norm": 1.0, "ema_decay": 0.95, "save_raw_weights": True, "rdrop_alpha": 0.5,
                   "sam_rho": 0.05, "sampler": "balanced"},
    "frozen, step": {"freeze_epochs": 1, "schedule": "step", "lr_step_epochs": 1, "optimizer": "sgd"},
    "cooling": {"optimizer": "muon", "warmup_epochs": 1.0},
    "patience": {"patience": 1, "lr": 1e-9, "epochs": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return images_in(tmp_path_factory.mktemp("images"), 24, transforms=("random_crop", "horizontal_flip"))


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


@pytest.mark.parametrize("case", CASES)
def test_run_stopped_after_every_step_and_during_validation_resumes_to_the_same_bits(case, images, tmp_path):
    reference, expected = make_trainer(case, images)
    best = fit(reference)
    for stop in [*[stop_after] * (STEPS - 1), stop_while_scoring, *[stop_after] * (EPOCHS * STEPS - STEPS)]:
        trainer, _ = make_trainer(case, images, Checkpoints(tmp_path))
        with defer_signals(), pytest.raises(StoppedError) as caught:
            fit(stop(trainer, 1))
        assert caught.value.exit_code == 143
        random.seed()
        torch.manual_seed(99)  # a new process has another random state
    resumed, rows = make_trainer(case, images, Checkpoints(tmp_path))
    results = fit(resumed)
    assert rows == expected
    torch.testing.assert_close(
        {name: [best.epoch, best.scores, best.state] for name, best in results.items()},
        {name: [best.epoch, best.scores, best.state] for name, best in best.items()},
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(resumed.model.state_dict(), reference.model.state_dict(), rtol=0, atol=0)


def test_defect_product_every_epoch_saves_a_checkpoint_and_a_finished_run_does_not_rerun(images, tmp_path):
    """The original saved checkpoints only after epochs that improved."""
    trainer, rows = make_trainer("patience", images, Checkpoints(tmp_path))
    best = fit(trainer)
    assert [path.stem for path in sorted(tmp_path.iterdir())] == ["00000001", "00000002"]
    assert len(rows) == 2
    assert rows[1]["val_logloss"] >= rows[0]["val_logloss"], "the second epoch was no better"
    resumed, resumed_rows = make_trainer("patience", images, Checkpoints(tmp_path))
    again = fit(replace(resumed, update=None))  # a training step would fail
    torch.testing.assert_close(again["raw"].state, best["raw"].state, rtol=0, atol=0)
    assert resumed_rows == rows
    assert Checkpoints(tmp_path).load()[RUNTIME] == {"precision": "fp32", "channels_last": True}
    bf16_state = PrecisionState(replace(CPU, dtype=torch.bfloat16, grouped_fp32=True))
    with pytest.raises(DataError, match=r"trained with .*fp32.*bf16_grouped_fp32"):
        fit(replace(resumed, components={**resumed.components, RUNTIME: bf16_state}))


def test_resume_falls_back_to_the_previous_readable_checkpoint(images, tmp_path, caplog):
    trainer, _ = make_trainer("cooling", images, Checkpoints(tmp_path))
    with defer_signals(), pytest.raises(StoppedError):
        fit(stop_after(trainer, STEPS + 2))
    resumed, _ = make_trainer("cooling", images, Checkpoints(tmp_path))
    moved = replace(resumed, runtime=replace(CPU, device=torch.device("meta")))
    assert [total.device.type for total in _start_or_resume(moved).totals] == ["meta"] * 2
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-1000])
    progress = _start_or_resume(resumed)
    assert (progress.epoch, progress.step, len(progress.rows)) == (2, 0, 1)
    assert f"{newest} cannot be read" in caplog.text
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert Checkpoints(tmp_path).load() is None


def test_checkpoint_of_another_version_raises_a_data_error(images, tmp_path):
    Checkpoints(tmp_path).save({"random": {}, "weights of old": torch.zeros(3)})
    trainer, _ = make_trainer("cooling", images, Checkpoints(tmp_path))
    with pytest.raises(DataError, match=r"KeyError: 'model'"):
        fit(trainer)
