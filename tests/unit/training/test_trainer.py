"""The trainer: model selection, early stopping, errors of failed runs, and what it logs.

`test_defect_…`: a defect of a reference system that must not come back; each fails on the original's behaviour.
"""

import csv
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fivefold.build import one_hot
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.errors import DataError, SettingsError
from fivefold.training.loggers import csv_logger
from fivefold.training.losses import LOSSES, build_loss
from fivefold.training.trainer import Trainer, fit, validate
from toy_training import CPU, images_in, run_of, stand_still


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return images_in(tmp_path_factory.mktemp("images"), 12, size=6, noise=100, tint=120)


def make_trainer(images: ImageDataset, **train) -> tuple[Trainer, list[dict]]:
    return run_of(images, {"batch_size": 4} | train)


@pytest.mark.parametrize("every", [1, 2])
def test_best_validated_epoch_is_kept_with_its_weights(images, every):
    trainer, rows = make_trainer(images, validate_every=every)
    best = fit(trainer)["raw"]
    validated = [(row["val_logloss"], row["epoch"]) for row in rows if row["epoch"] % every == 0]
    assert (best.scores["logloss"], best.epoch) == min(validated)
    assert len(rows) == 4
    trainer, _ = run_of(images, {"lr": 5.0}, select=False)
    last = fit(trainer)["raw"]
    assert last.epoch == 4, "without selection the last epoch is kept regardless of its score"
    assert torch.equal(last.state["head.weight"], trainer.model.state_dict()["head.weight"])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_validation_uses_the_training_loss(images, name):
    trainer, _ = make_trainer(images, loss=name)
    with torch.no_grad():
        trainer.model.head.weight.mul_(30)  # confident, so that logits differ strongly from log-probabilities
        logits = trainer.model.eval()(CPU.images(torch.stack([images.eval_batch(row).images[0] for row in range(12)])))
    expected = build_loss(name)(logits, one_hot(np.arange(12) % 3, 3, CPU.device))
    scores = validate(trainer.model, trainer.valid, trainer)
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-5)
    odds = logits.double().sigmoid() if name in ("bce", "binary_focal") else logits.double().softmax(dim=1)
    probs = odds / odds.sum(dim=1, keepdim=True)
    assert scores["logloss"] == pytest.approx(float(F.nll_loss(probs.log(), torch.arange(12) % 3)), rel=1e-5)


@pytest.mark.parametrize(("patience", "every", "epochs"), [(2, 1, 3), (1, 2, 4)])
def test_patience_stops_at_a_validation_without_improvement(images, patience, every, epochs):
    trainer, rows = run_of(images, {"epochs": 6, "validate_every": every}, patience=patience)
    stand_still(trainer)
    fit(trainer)
    assert len(rows) == epochs


def test_validate_every_skips_epochs_but_not_the_last_and_leaves_training_unchanged(images):
    (every_epoch, rows), (every_third, third_rows) = (run_of(images, {"validate_every": n}) for n in (1, 3))
    fit(every_epoch)
    fit(every_third)
    assert [("val_logloss" in row) for row in third_rows] == [False, False, True, True]
    assert [row["train_loss"] for row in third_rows] == [row["train_loss"] for row in rows]
    assert third_rows[2:] == rows[2:]
    assert torch.equal(every_epoch.model.head.weight, every_third.model.head.weight)


def test_epochs_log_images_per_second_and_metrics_hold_the_median_without_the_first(images, caplog):
    trainer, _ = make_trainer(images)
    with caplog.at_level("INFO"):
        fit(trainer)
    logged = [float(m) for text in caplog.messages for m in re.findall(r"epoch \d/4 .* ([\d.e+]+) images/s", text)]
    assert logged == pytest.approx(trainer.speeds, rel=1e-3)
    assert len(logged) == 4
    assert trainer.speed_metrics() == {"images_per_second": round(np.median(trainer.speeds[1:]), 2)}


def test_non_finite_loss_names_batch_and_epoch_and_full_memory_a_smaller_batch(images):
    def exceed_memory(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer, _ = make_trainer(images)
    with pytest.raises(SettingsError, match=r"train\.batch_size=2 train\.grad_accum_steps=2"):
        fit(replace(trainer, update=exceed_memory))
    trainer.model.head.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite at batch 1 of epoch 1"):
        fit(trainer)


def test_defect_car_convnext_log_grows_each_epoch_and_survives_a_killed_run(images, tmp_path):
    """The original wrote its log only after the last epoch."""
    log, logged_epochs = tmp_path / "train_log.csv", []

    def observe(row):
        with open(log, encoding="utf-8") as file:
            logged_epochs.append([int(line["epoch"]) for line in csv.DictReader(file)])
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(replace(make_trainer(images)[0], observers=[csv_logger(log), observe]))
    assert logged_epochs == [[1], [1, 2], [1, 2, 3]]


def test_defect_car_convnext_train_accuracy_compares_mixed_images_with_mixed_labels(images):
    """The original compared the prediction for a mixed image with the label of one of its two images."""
    trainer, rows = run_of(images, {"epochs": 1}, mix="mixup")
    predictions_and_targets = []

    def watch(batches):
        (result,) = trainer.update(batches)
        predictions_and_targets.append((result.logits.argmax(dim=1), batches[0].targets))
        return [result]

    fit(replace(trainer, update=watch))
    predicted, targets = map(torch.cat, zip(*predictions_and_targets, strict=True))
    against_mixed = targets.gather(1, predicted[:, None]).sum() / targets.sum()
    unmixed = torch.tensor([row % 3 for batch in trainer.batches(1) for _, row in batch])
    assert rows[0]["train_acc"] == pytest.approx(float(against_mixed))
    assert rows[0]["train_acc"] != pytest.approx(float((predicted == unmixed).float().mean()), abs=0.01)


def test_defect_sketch_step_schedule_falls_per_epoch_rather_than_per_batch(images):
    """The original stepped its StepLR after each batch and once more after each epoch."""
    schedule = {"schedule": "step", "lr_step_epochs": 2, "lr_gamma": 0.5, "epochs": 5, "grad_accum_steps": 2}
    trainer, rows = make_trainer(images, **schedule)
    fit(trainer)
    assert [row["lr"] for row in rows] == [0.05, 0.05, 0.025, 0.025, 0.0125]


@pytest.mark.parametrize("options", [{}, {"class_weights": "balanced"}, {"rdrop_alpha": 0.5}])
def test_accumulated_batches_log_the_same_metrics_as_large_ones(images, options):
    """Twelve rows in a step of eight and a step of four, with constant weights."""
    logged = []
    for batching in ({"batch_size": 8}, {"batch_size": 4, "grad_accum_steps": 2}):
        trainer, rows = run_of(images, {"epochs": 1} | batching | options)
        stand_still(trainer)
        fit(trainer)
        logged.append([rows[0]["train_loss"], rows[0]["train_acc"]])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)


def test_balancing_classes_twice_logs_a_warning(images, caplog):
    run_of(images, {"class_weights": "balanced", "sampler": "balanced"})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
