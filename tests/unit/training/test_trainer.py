"""The trainer: model selection, early stopping, errors of failed runs, and all training options combined.

`test_defect_…`: a defect of a reference system that must not come back; each fails on the original's behaviour.
"""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fivefold.build import one_hot
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.errors import DataError, SettingsError
from fivefold.inference.predictor import make_runtime
from fivefold.training.loggers import csv_logger
from fivefold.training.losses import LOSSES, build_loss, cross_entropy
from fivefold.training.objectives import MicroBatch, label_loss, single_pass
from fivefold.training.steps import plain_step
from fivefold.training.trainer import Throughput, Trainer, fit, validate
from toy_training import CPU, SMALL, images_in, run_of, stand_still


@pytest.fixture
def images(tmp_path: Path) -> ImageDataset:
    return images_in(tmp_path / "images", 12, size=6, noise=100, tint=120)


@pytest.fixture
def hard_images(tmp_path: Path) -> ImageDataset:
    """Images of classes that are harder to distinguish."""
    return images_in(tmp_path / "hard", 24, size=6, noise=180, tint=30)


def make_trainer(images: ImageDataset, **train) -> tuple[Trainer, list[dict]]:
    return run_of(images, {"batch_size": 4} | train)


@pytest.mark.parametrize("every", [1, 2])
def test_best_validated_epoch_is_kept_with_its_weights(images, every):
    trainer, rows = make_trainer(images, validate_every=every)
    best = fit(trainer)["raw"]
    assert (best.scores["logloss"], best.epoch) == min(
        (row["val_logloss"], row["epoch"]) for row in rows if row["epoch"] % every == 0
    )
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


@pytest.mark.parametrize(("patience", "every", "epochs"), [(2, 1, 3), (1, 3, 6)])
def test_patience_stops_at_a_validation_without_improvement(images, patience, every, epochs):
    trainer, rows = run_of(images, {"epochs": 9, "validate_every": every}, patience=patience)
    stand_still(trainer)
    fit(trainer)
    assert len(rows) == epochs


def test_validate_every_skips_epochs_but_not_the_last_and_leaves_training_unchanged(images):
    (every_epoch, rows), (every_third, third_rows) = (
        run_of(images, {"validate_every": every}, select=False) for every in (1, 3)
    )
    best = [fit(trainer)["raw"] for trainer in (every_epoch, every_third)]
    assert [("val_logloss" in row) for row in third_rows] == [False, False, True, True]
    assert [row["train_loss"] for row in third_rows] == [row["train_loss"] for row in rows]
    assert third_rows[2:] == rows[2:]
    assert torch.equal(best[0].state["head.weight"], best[1].state["head.weight"])


def test_epochs_log_images_per_second_and_metrics_hold_the_median_without_the_first(images, caplog):
    trainer, _ = make_trainer(images)
    with caplog.at_level("INFO"):
        fit(trainer)
    logged = [float(m) for text in caplog.messages for m in re.findall(r"epoch \d/4 .* ([\d.e+]+) images/s", text)]
    assert logged == pytest.approx(trainer.throughput.passes, rel=1e-3)
    assert len(logged) == 4
    assert trainer.throughput.metrics() == {"images_per_second": round(np.median(trainer.throughput.passes[1:]), 2)}


def test_throughput_ignores_failed_and_empty_passes():
    throughput = Throughput()
    with pytest.raises(KeyError), throughput.measure(100):
        raise KeyError
    with throughput.measure(0):
        pass
    assert throughput.metrics() == {}
    with throughput.measure(100):
        pass
    assert throughput.metrics() == {"images_per_second": round(throughput.passes[0], 2)}


def test_non_finite_loss_error_names_batch_and_epoch(images):
    trainer, _ = make_trainer(images)
    with torch.no_grad():
        trainer.model.head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite at batch 1 of epoch 1"):
        fit(trainer)


def test_out_of_memory_error_suggests_a_smaller_batch(images):
    def too_large(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SettingsError, match=r"train\.batch_size=2 train\.grad_accum_steps=2"):
        fit(replace(make_trainer(images)[0], update=too_large))


def test_defect_car_b5_scaled_gradient_is_unscaled_before_clipping():
    """The original clipped the gradient while fp16's loss scale multiplied it, which left almost nothing of it.

    A gradient of norm 1.4, scaled by 65536, clipped to 1 and then unscaled, would move the weights by 1/65536.
    """
    fp16 = make_runtime(torch.device("cpu"), torch.float16, False, [0.5] * 3, [0.5] * 3)
    weight_changes = {}
    for runtime in (CPU, fp16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        before = model[1].weight.detach().clone()
        rows = MicroBatch(torch.full((4, 3, 2, 2), 0.5), nn.functional.one_hot(torch.zeros(4).long(), 3).float())
        optimizer = torch.optim.SGD(model[1:].parameters(), lr=1.0)
        plain_step(model, single_pass(label_loss(cross_entropy(0.0))), optimizer, runtime, clip=1.0)([rows])
        weight_changes[runtime.dtype] = model[1].weight.detach() - before
    assert float(weight_changes[None].norm()) > 0.5
    torch.testing.assert_close(weight_changes[torch.float16], weight_changes[None], rtol=1e-2, atol=1e-2)


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
    header = log.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header[:6] == ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss"]


def test_defect_car_convnext_train_accuracy_compares_mixed_images_with_mixed_labels(hard_images):
    """The original compared the prediction for a mixed image with the label of one of its two images."""
    (trainer, rows), predictions_and_targets = (
        run_of(hard_images, {"epochs": 1, "schedule": "constant"}, mix="mixup"),
        [],
    )

    def watch(batches):
        results = trainer.update(batches)
        predictions_and_targets.extend(
            (result.logits.argmax(dim=1), batch.targets) for result, batch in zip(results, batches, strict=True)
        )
        return results

    fit(replace(trainer, update=watch))
    predicted, targets = (torch.cat(tensors) for tensors in zip(*predictions_and_targets, strict=True))
    against_mixed = targets.gather(1, predicted[:, None]).sum() / targets.sum()
    unmixed = torch.cat(
        [trainer.train.targets[[row for _, row in batch]].argmax(dim=1) for batch in trainer.batches(1)]
    )
    assert rows[0]["train_acc"] == pytest.approx(float(against_mixed))
    assert rows[0]["train_acc"] != pytest.approx(float((predicted == unmixed).float().mean()), abs=0.01)


def test_defect_car_convnext_raw_and_ema_weights_are_selected_by_their_own_scores(hard_images):
    """The original kept the raw weights of the epoch in which the average was best."""
    noisy_codes = (np.arange(24) + (np.arange(24) < 8)) % 3  # wrong labels, so that overconfidence soon raises the loss
    ema_settings = {"ema_decay": 0.98, "lr": 0.01, "epochs": 8, "schedule": "constant"}
    assert list(fit(run_of(hard_images, ema_settings | {"epochs": 1})[0])) == ["ema"]
    trainer, _ = run_of(hard_images, ema_settings | {"save_raw_weights": True}, valid_codes=noisy_codes)
    scores = {"ema": [], "raw": []}

    def observe(row):
        for name, model in trainer.scored_models.items():
            scores[name].append(validate(model, trainer.valid, trainer)["logloss"])

    best = fit(replace(trainer, observers=[observe]))
    assert list(best) == ["ema", "raw"]
    for name, losses in scores.items():
        assert best[name].epoch == 1 + int(np.argmin(losses))
        assert best[name].scores["logloss"] == min(losses)
        trainer.scored_models[name].load_state_dict(best[name].state)
        assert validate(trainer.scored_models[name], trainer.valid, trainer)["logloss"] == min(losses)
    assert best["ema"].epoch != best["raw"].epoch


@pytest.mark.parametrize("accumulate", [1, 3])
def test_defect_sketch_step_schedule_falls_per_epoch_rather_than_per_batch(hard_images, accumulate):
    """The original stepped its StepLR after each batch and once more after each epoch."""
    schedule = {"schedule": "step", "lr_step_epochs": 2, "lr_gamma": 0.5}
    trainer, rows = run_of(hard_images, schedule | {"epochs": 6, "grad_accum_steps": accumulate, "batch_size": 5})
    fit(trainer)
    assert [row["lr"] for row in rows] == [0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]


ALL_OPTIONS = {
    "epochs": 8, "batch_size": 8, "grad_accum_steps": 2, "lr": 0.02, "max_grad_norm": 1.0, "ema_decay": 0.95, "save_raw_weights": True, "rdrop_alpha": 0.5,
    "sam_rho": 0.05, "label_smoothing": 0.05, "class_weights": "balanced", "sampler": "balanced",
}  # fmt: skip


@pytest.fixture
def many_images(tmp_path: Path) -> ImageDataset:
    return images_in(tmp_path / "many", 48, transforms=("horizontal_flip",))


@pytest.mark.parametrize("distill", [None, {"temperature": 2.0, "temperature_decay": 0.9}])
def test_all_training_options_together_reduce_the_loss(many_images, distill):
    trainer, rows = run_of(many_images, ALL_OPTIONS, SMALL, mix="mixup", distill=distill)
    norms: list[float] = []

    def record_norm() -> None:
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    best = fit(replace(trainer, after_step=[record_norm, *trainer.after_step]))
    assert len(norms) == 8 * 3  # 48 rows in batches of 8, two per step
    assert max(norms) <= 1.0 + 1e-4
    assert rows[-1]["train_loss"] < 0.85 * rows[0]["train_loss"]
    assert best["ema"].scores["logloss"] < 0.7 * np.log(3)
    assert best["raw"].scores["acc"] > 0.9


def test_all_options_together_are_deterministic_and_each_one_has_an_effect(many_images):
    """Removing or changing any option changes the weights, so no option is read and then ignored."""

    def train_weights(**options) -> dict[str, torch.Tensor]:
        return fit(run_of(many_images, ALL_OPTIONS | {"epochs": 1} | options, SMALL, mix="mixup")[0])["raw"].state

    reference = train_weights()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in train_weights().items())
    for change in (
        {"rdrop_alpha": 0.0}, {"sam_rho": 0.0}, {"sam_rho": 0.1}, {"max_grad_norm": 0.0}, {"grad_accum_steps": 1},
        {"label_smoothing": 0.0}, {"sampler": "shuffle"}, {"loss": {"name": "focal", "gamma": 1.0}},
        {"backbone_lr_scale": 0.5}, {"freeze_epochs": 1},
    ):  # fmt: skip
        assert not torch.equal(reference["head.1.weight"], train_weights(**change)["head.1.weight"]), change


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
