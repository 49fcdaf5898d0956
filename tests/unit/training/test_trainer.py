"""The loop: what it selects, when it stops, what it says of a run that goes wrong, and all parts of a step together.

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
def hard(tmp_path: Path) -> ImageDataset:
    """Images that are told apart less easily."""
    return images_in(tmp_path / "hard", 24, size=6, noise=180, tint=30)


def loop_of(images: ImageDataset, **train) -> tuple[Trainer, list[dict]]:
    return run_of(images, {"batch_size": 4} | train)


@pytest.mark.parametrize("every", [1, 2])
def test_the_best_of_the_validated_epochs_is_kept_with_its_own_weights(images, every):
    loop, rows = loop_of(images, validate_every=every)
    best = fit(loop)["raw"]
    assert (best.scores["logloss"], best.epoch) == min(
        (row["val_logloss"], row["epoch"]) for row in rows if row["epoch"] % every == 0
    )
    assert len(rows) == 4
    loop, _ = run_of(images, {"lr": 5.0}, select=False)
    last = fit(loop)["raw"]
    assert last.epoch == 4, "without selection the last epoch is kept whatever its score"
    assert torch.equal(last.state["head.weight"], loop.model.state_dict()["head.weight"])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_loss_of_a_validation_is_that_of_training(images, name):
    loop, _ = loop_of(images, loss=name)
    with torch.no_grad():
        loop.model.head.weight.mul_(30)  # sure of itself, so that logits are far from log-probabilities
        logits = loop.model.eval()(CPU.images(torch.stack([images.eval_batch(row).images[0] for row in range(12)])))
    expected = build_loss(name)(logits, one_hot(np.arange(12) % 3, 3, CPU.device))
    found = validate(loop.model, loop.valid, loop)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    odds = logits.double().sigmoid() if name in ("bce", "binary_focal") else logits.double().softmax(dim=1)
    probs = odds / odds.sum(dim=1, keepdim=True)
    assert found["logloss"] == pytest.approx(float(F.nll_loss(probs.log(), torch.arange(12) % 3)), rel=1e-5)


@pytest.mark.parametrize(("patience", "every", "epochs"), [(2, 1, 3), (1, 3, 6)])
def test_patience_ends_a_run_that_does_not_improve_at_a_validation(images, patience, every, epochs):
    loop, rows = run_of(images, {"epochs": 9, "validate_every": every}, patience=patience)
    stand_still(loop)
    fit(loop)
    assert len(rows) == epochs


def test_only_every_third_epoch_and_the_last_are_validated_and_training_is_the_same(images):
    (one, rows), (third, few) = (run_of(images, {"validate_every": every}, select=False) for every in (1, 3))
    best = [fit(loop)["raw"] for loop in (one, third)]
    assert [("val_logloss" in row) for row in few] == [False, False, True, True]
    assert [row["train_loss"] for row in few] == [row["train_loss"] for row in rows]
    assert few[2:] == rows[2:]
    assert torch.equal(best[0].state["head.weight"], best[1].state["head.weight"])


def test_each_epoch_tells_its_images_a_second_and_the_record_their_median_without_the_first(images, caplog):
    loop, _ = loop_of(images)
    with caplog.at_level("INFO"):
        fit(loop)
    told = [float(m) for text in caplog.messages for m in re.findall(r"epoch \d/4 .* ([\d.e+]+) images/s", text)]
    assert told == pytest.approx(loop.throughput.passes, rel=1e-3)
    assert len(told) == 4
    assert loop.throughput.metrics() == {"images_per_second": round(np.median(loop.throughput.passes[1:]), 2)}


def test_a_single_pass_is_its_own_median_and_one_that_fails_or_has_nothing_left_does_not_count():
    throughput = Throughput()
    with pytest.raises(KeyError), throughput.measure(100):
        raise KeyError
    with throughput.measure(0):
        pass
    assert throughput.metrics() == {}
    with throughput.measure(100):
        pass
    assert throughput.metrics() == {"images_per_second": round(throughput.passes[0], 2)}


def test_a_loss_that_is_not_finite_names_its_step(images):
    loop, _ = loop_of(images)
    with torch.no_grad():
        loop.model.head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite at batch 1 of epoch 1"):
        fit(loop)


def test_a_batch_that_does_not_fit_says_what_would(images):
    def too_large(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SettingsError, match=r"train\.batch_size=2 train\.grad_accum_steps=2"):
        fit(replace(loop_of(images)[0], update=too_large))


def test_defect_car_b5_a_scaled_gradient_is_unscaled_before_it_is_clipped():
    """The original cut the norm of the gradient times fp16's loss scale: next to nothing of it was left.

    65536 times a gradient of norm 1.4, cut to 1 and then unscaled, would move the weights by 1/65536.
    """
    fp16 = make_runtime(torch.device("cpu"), torch.float16, False, [0.5] * 3, [0.5] * 3)
    moved = {}
    for runtime in (CPU, fp16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        before = model[1].weight.detach().clone()
        rows = MicroBatch(torch.full((4, 3, 2, 2), 0.5), nn.functional.one_hot(torch.zeros(4).long(), 3).float())
        optimizer = torch.optim.SGD(model[1:].parameters(), lr=1.0)
        plain_step(model, single_pass(label_loss(cross_entropy(0.0))), optimizer, runtime, clip=1.0)([rows])
        moved[runtime.dtype] = model[1].weight.detach() - before
    assert float(moved[None].norm()) > 0.5
    torch.testing.assert_close(moved[torch.float16], moved[None], rtol=1e-2, atol=1e-2)


def test_defect_car_convnext_the_log_grows_by_each_epoch_and_a_killed_run_keeps_it(images, tmp_path):
    """The original wrote its log after the last epoch alone."""
    log, seen = tmp_path / "train_log.csv", []

    def look(row):
        with open(log, encoding="utf-8") as file:
            seen.append([int(line["epoch"]) for line in csv.DictReader(file)])
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(replace(loop_of(images)[0], observers=[csv_logger(log), look]))
    assert seen == [[1], [1, 2], [1, 2, 3]]
    header = log.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header[:6] == ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss"]


def test_defect_car_convnext_train_accuracy_of_mixed_images_is_against_their_mixed_labels(hard):
    """The original compared the prediction of a mixed image with the label of one of the two."""
    (loop, rows), seen = run_of(hard, {"epochs": 1, "schedule": "constant"}, mix="mixup"), []

    def watch(batches):
        results = loop.update(batches)
        seen.extend((one.logits.argmax(dim=1), batch.targets) for one, batch in zip(results, batches, strict=True))
        return results

    fit(replace(loop, update=watch))
    predicted, targets = (torch.cat(each) for each in zip(*seen, strict=True))
    against_mixed = targets.gather(1, predicted[:, None]).sum() / targets.sum()
    unmixed = torch.cat([loop.train.targets[[row for _, row in batch]].argmax(dim=1) for batch in loop.batches(1)])
    assert rows[0]["train_acc"] == pytest.approx(float(against_mixed))
    assert rows[0]["train_acc"] != pytest.approx(float((predicted == unmixed).float().mean()), abs=0.01)


def test_defect_car_convnext_raw_and_averaged_weights_are_each_selected_by_their_own_score(hard):
    """The original kept the raw weights of the epoch in which the average was best."""
    noisy = (np.arange(24) + (np.arange(24) < 8)) % 3  # so that certainty is soon too much
    averaged = {"ema_decay": 0.98, "lr": 0.01, "epochs": 8, "schedule": "constant"}
    assert list(fit(run_of(hard, averaged | {"epochs": 1})[0])) == ["ema"]
    loop, _ = run_of(hard, averaged | {"save_raw_weights": True}, valid_codes=noisy)
    scores = {"ema": [], "raw": []}

    def observe(row):
        for name, model in loop.scored_models.items():
            scores[name].append(validate(model, loop.valid, loop)["logloss"])

    best = fit(replace(loop, observers=[observe]))
    assert list(best) == ["ema", "raw"]
    for name, found in scores.items():
        assert best[name].epoch == 1 + int(np.argmin(found))
        assert best[name].scores["logloss"] == min(found)
        loop.scored_models[name].load_state_dict(best[name].state)
        assert validate(loop.scored_models[name], loop.valid, loop)["logloss"] == min(found)
    assert best["ema"].epoch != best["raw"].epoch


@pytest.mark.parametrize("accumulate", [1, 3])
def test_defect_sketch_the_rate_falls_by_epochs_and_not_by_batches_too(hard, accumulate):
    """The original stepped its StepLR after each batch and once more after each epoch."""
    schedule = {"schedule": "step", "lr_step_epochs": 2, "lr_gamma": 0.5}
    loop, rows = run_of(hard, schedule | {"epochs": 6, "grad_accum_steps": accumulate, "batch_size": 5})
    fit(loop)
    assert [row["lr"] for row in rows] == [0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]


EVERYTHING = {
    "epochs": 8, "batch_size": 8, "grad_accum_steps": 2, "lr": 0.02, "max_grad_norm": 1.0, "ema_decay": 0.95, "save_raw_weights": True, "rdrop_alpha": 0.5,
    "sam_rho": 0.05, "label_smoothing": 0.05, "class_weights": "balanced", "sampler": "balanced",
}  # fmt: skip


@pytest.fixture
def many(tmp_path: Path) -> ImageDataset:
    return images_in(tmp_path / "many", 48, transforms=("horizontal_flip",))


@pytest.mark.parametrize("distill", [None, {"temperature": 2.0, "temperature_decay": 0.9}])
def test_mixup_rdrop_sam_ema_accumulation_and_clipping_together_reduce_the_loss(many, distill):
    loop, rows = run_of(many, EVERYTHING, SMALL, mix="mixup", distill=distill)
    norms: list[float] = []

    def note() -> None:
        gradients = [p.grad for p in loop.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    best = fit(replace(loop, after_step=[note, *loop.after_step]))
    assert len(norms) == 8 * 3  # 48 rows in batches of 8, two a step
    assert max(norms) <= 1.0 + 1e-4
    assert rows[-1]["train_loss"] < 0.85 * rows[0]["train_loss"]
    assert best["ema"].scores["logloss"] < 0.7 * np.log(3)
    assert best["raw"].scores["acc"] > 0.9


def test_all_together_give_the_same_bytes_twice_and_each_part_leaves_its_mark(many):
    """Taking any one of them out changes the weights: none is read and then forgotten."""

    def weights(**more) -> dict[str, torch.Tensor]:
        return fit(run_of(many, EVERYTHING | {"epochs": 1} | more, SMALL, mix="mixup")[0])["raw"].state

    whole = weights()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights().items())
    for without in (
        {"rdrop_alpha": 0.0}, {"sam_rho": 0.0}, {"sam_rho": 0.1}, {"max_grad_norm": 0.0}, {"grad_accum_steps": 1},
        {"label_smoothing": 0.0}, {"sampler": "shuffle"}, {"loss": {"name": "focal", "gamma": 1.0}},
        {"backbone_lr_scale": 0.5}, {"freeze_epochs": 1},
    ):  # fmt: skip
        assert not torch.equal(whole["head.1.weight"], weights(**without)["head.1.weight"]), without


@pytest.mark.parametrize("more", [{}, {"class_weights": "balanced"}, {"rdrop_alpha": 0.5}])
def test_the_log_of_accumulated_batches_is_that_of_large_ones(images, more):
    """Twelve rows of a step of eight and one of four, by weights that do not move."""
    told = []
    for chosen in ({"batch_size": 8}, {"batch_size": 4, "grad_accum_steps": 2}):
        loop, rows = run_of(images, {"epochs": 1} | chosen | more)
        stand_still(loop)
        fit(loop)
        told.append([rows[0]["train_loss"], rows[0]["train_acc"]])
    assert told[1] == pytest.approx(told[0], rel=1e-5)


def test_classes_that_are_balanced_twice_are_warned_of(images, caplog):
    run_of(images, {"class_weights": "balanced", "sampler": "balanced"})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
