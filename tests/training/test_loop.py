"""The loop: what it selects, when it stops, and what it says of a run that goes wrong."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fivefold.assemble import build_loop, one_hot, seed_everything
from fivefold.data.dataset import ImageSet
from fivefold.data.store import open_store
from fivefold.data.transforms import build_transforms
from fivefold.errors import DataError, SettingsError
from fivefold.inference.predictor import make_runtime
from fivefold.models.classifier import Classifier
from fivefold.recipe import Augment, Model, Settings, Train
from fivefold.training.loop import Loop, TrainRows, ValidRows, fit, validate
from fivefold.training.losses import LOSSES, build_loss

CPU = make_runtime(torch.device("cpu"), None, False, [0.5] * 3, [0.5] * 3)


@pytest.fixture
def images(tmp_path) -> ImageSet:
    random = np.random.default_rng(0)
    for number in range(12):
        pixels = random.integers(0, 100, (6, 6, 3))
        pixels[..., number % 3] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    names = [f"{number:02d}.png" for number in range(12)]
    return ImageSet(open_store(tmp_path), names, build_transforms([], (6, 6)), seed=1)


def loop(images: ImageSet, select: bool = True, patience: int = 0, **train) -> Loop:
    chosen = Train(epochs=4, batch_size=4, lr=0.05, precision="fp32", workers=0).model_copy(update=train)
    settings = Settings(model=Model(image_size=6), augment=Augment(mix="none"), train=chosen)
    seed_everything(0)
    network = Classifier(nn.Flatten(), nn.Linear(108, 3))
    codes = np.arange(12) % 3
    rows = TrainRows(images, one_hot(codes, 3, CPU.device))
    valid = ValidRows(images, codes)
    return build_loop("test", network, rows, valid, settings, CPU, select=select, patience=patience)


def test_the_best_epoch_is_kept_with_its_own_weights(images):
    seen = []
    made = loop(images)
    made = replace(made, observers=[lambda row: seen.append((row["val_logloss"], row["epoch"]))])
    best = fit(made)["raw"]
    assert (best.scores["logloss"], best.epoch) == min(seen)
    assert len(seen) == 4


def test_without_selection_the_last_epoch_is_kept_whatever_its_score(images):
    made = loop(images, select=False, lr=5.0)
    best = fit(made)["raw"]
    assert best.epoch == 4
    assert torch.equal(best.state["head.weight"], made.model.state_dict()["head.weight"])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_loss_of_a_validation_is_that_of_training(images, name):
    made = loop(images, loss=name)
    with torch.no_grad():
        made.model.head.weight.mul_(30)  # sure of itself, so that logits are far from log-probabilities
    seen = torch.stack([images.seen(row).images[0] for row in range(12)])
    with torch.no_grad():
        logits = made.model.eval()(CPU.images(seen))
    expected = build_loss(name)(logits, one_hot(np.arange(12) % 3, 3, CPU.device))
    found = validate(made.model, made.valid, made)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["logloss"] == pytest.approx(float(F.cross_entropy(logits, torch.arange(12) % 3)), rel=1e-5)


def test_patience_ends_a_run_that_does_not_improve(images):
    epochs = []
    made = replace(loop(images, patience=2, lr=1e-12), observers=[lambda row: epochs.append(row["epoch"])])
    made.schedule.base = [0.0] * len(made.schedule.base)
    made.schedule._set()
    fit(made)
    assert len(epochs) == 3


def test_only_every_third_epoch_and_the_last_are_validated_and_training_is_the_same(images):
    rows = {1: [], 3: []}
    made = {
        every: replace(loop(images, validate_every=every, select=False), observers=[rows[every].append])
        for every in rows
    }
    best = {every: fit(made[every])["raw"] for every in made}
    assert [("val_logloss" in row) for row in rows[3]] == [False, False, True, True]
    assert [row["train_loss"] for row in rows[3]] == [row["train_loss"] for row in rows[1]]
    assert rows[3][2:] == rows[1][2:]
    assert torch.equal(best[3].state["head.weight"], best[1].state["head.weight"])


def test_the_best_of_the_validated_epochs_is_kept(images):
    seen = []
    made = replace(loop(images, validate_every=2), observers=[seen.append])
    best = fit(made)["raw"]
    assert (best.scores["logloss"], best.epoch) == min(
        (row["val_logloss"], row["epoch"]) for row in seen if row["epoch"] % 2 == 0
    )


def test_patience_waits_for_a_validation(images):
    epochs = []
    made = loop(images, patience=1, lr=1e-12, validate_every=3, epochs=9)
    made = replace(made, observers=[lambda row: epochs.append(row["epoch"])])
    made.schedule.base = [0.0] * len(made.schedule.base)
    made.schedule._set()
    fit(made)
    assert len(epochs) == 6


def test_each_epoch_tells_its_images_a_second_and_the_record_their_median(images, caplog):
    made = loop(images)
    with caplog.at_level("INFO"):
        fit(made)
    told = [float(m) for text in caplog.messages for m in re.findall(r"epoch \d/4 .* ([\d.e+]+) images/s", text)]
    assert told == pytest.approx(made.throughput.passes, rel=1e-3)
    assert len(told) == 4
    assert made.throughput.figures() == {"images_per_second": round(np.median(made.throughput.passes[1:]), 2)}


def test_with_averaging_the_average_decides_and_the_raw_weights_may_be_kept_by_their_own_score(images):
    assert list(fit(loop(images, ema_decay=0.9))) == ["ema"]
    best = fit(loop(images, ema_decay=0.9, keep_raw=True))
    assert list(best) == ["ema", "raw"]
    assert not torch.equal(best["ema"].state["head.weight"], best["raw"].state["head.weight"])


def test_a_loss_that_is_not_finite_names_its_step(images):
    made = loop(images)
    with torch.no_grad():
        made.model.head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite at batch 1 of epoch 1"):
        fit(made)


def test_a_batch_that_does_not_fit_says_what_would(images):
    def too_large(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SettingsError, match=r"train\.batch_size=2 train\.accumulate=2"):
        fit(replace(loop(images), update=too_large))


def test_mixed_images_are_scored_against_their_mixed_labels(images):
    made = loop(images, epochs=1)
    rows = []
    mixing = replace(made.mixing, name="mixup", alpha=100.0)
    fit(replace(made, mixing=mixing, observers=[rows.append]))
    assert 0 <= rows[0]["train_acc"] <= 0.9  # λ near ½: no prediction can hit more than the larger share


def test_sam_every_kth_step_without_sam_is_refused(images):
    with pytest.raises(SettingsError, match=r"train\.sam_every=2 is of train\.update=sam, and this is plain"):
        loop(images, sam_every=2)
