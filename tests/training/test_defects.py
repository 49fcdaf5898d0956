"""Defects of the reference systems' training that must not come back; each test fails on the original's behaviour.

Others stand with their parts: look for `test_defect_` in all of `tests`.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fivefold.assemble import build_loop, one_hot, seed_everything
from fivefold.data.dataset import ImageSet
from fivefold.data.store import open_store
from fivefold.data.transforms import build_transforms
from fivefold.inference.predictor import make_runtime
from fivefold.models.classifier import Classifier
from fivefold.recipe import Augment, Model, Settings, Train
from fivefold.training.loop import Loop, TrainRows, ValidRows, fit, validate
from fivefold.training.losses import cross_entropy
from fivefold.training.objectives import Rows, supervised
from fivefold.training.observers import csv_log
from fivefold.training.updates import plain

CPU = make_runtime(torch.device("cpu"), None, False, [0.5] * 3, [0.5] * 3)
CODES = np.arange(24) % 3


@pytest.fixture
def images(tmp_path) -> ImageSet:
    random = np.random.default_rng(0)
    for number in range(24):
        pixels = random.integers(0, 180, (6, 6, 3))
        pixels[..., number % 3] += 30
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    names = [f"{number:02d}.png" for number in range(24)]
    return ImageSet(open_store(tmp_path), names, build_transforms([], (6, 6)), seed=1)


def loop(images: ImageSet, mix: str = "none", valid_codes: np.ndarray = CODES, **train) -> Loop:
    chosen = Train(epochs=6, batch_size=6, lr=0.05, precision="fp32", workers=0).model_copy(update=train)
    settings = Settings(model=Model(image_size=6), augment=Augment(mix=mix, mix_alpha=0.4), train=chosen)
    seed_everything(0)
    network = Classifier(nn.Flatten(), nn.Linear(108, 3))
    rows, valid = TrainRows(images, one_hot(CODES, 3, CPU.device)), ValidRows(images, valid_codes)
    return build_loop("test", network, rows, valid, settings, CPU, select=True, patience=0)


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
        rows = Rows(torch.full((4, 3, 2, 2), 0.5), nn.functional.one_hot(torch.zeros(4).long(), 3).float())
        optimizer = torch.optim.SGD(model[1:].parameters(), lr=1.0)
        plain(model, supervised(cross_entropy(0.0)), optimizer, runtime, clip=1.0)([rows])
        moved[runtime.dtype] = model[1].weight.detach() - before
    assert float(moved[None].norm()) > 0.5
    torch.testing.assert_close(moved[torch.float16], moved[None], rtol=1e-2, atol=1e-2)


def test_defect_car_convnext_the_log_grows_by_each_epoch_and_a_killed_run_keeps_it(images, tmp_path):
    """The original wrote its log after the last epoch alone."""
    log = tmp_path / "train_log.csv"
    seen = []

    def look(row):
        with open(log, encoding="utf-8") as file:
            seen.append([int(line["epoch"]) for line in csv.DictReader(file)])
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(replace(loop(images), observers=[csv_log(log), look]))
    assert seen == [[1], [1, 2], [1, 2, 3]]
    header = Path(log).read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header[:6] == ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss"]


def test_defect_car_convnext_train_accuracy_of_mixed_images_is_against_their_mixed_labels(images):
    """The original compared the prediction of a mixed image with the label of one of the two."""
    made, seen, rows = loop(images, mix="mixup", epochs=1, schedule="constant"), [], []

    def watch(batches):
        results = made.update(batches)
        seen.extend(
            (result.logits.argmax(dim=1), batch.targets) for result, batch in zip(results, batches, strict=True)
        )
        return results

    fit(replace(made, update=watch, observers=[rows.append]))
    predicted, targets = (torch.cat(each) for each in zip(*seen, strict=True))
    against_mixed = targets.gather(1, predicted[:, None]).sum() / targets.sum()
    unmixed = torch.cat([made.train.targets[[row for _, row in batch]].argmax(dim=1) for batch in made.batches(1)])
    assert rows[0]["train_acc"] == pytest.approx(float(against_mixed))
    assert rows[0]["train_acc"] != pytest.approx(float((predicted == unmixed).float().mean()), abs=0.01)


def test_defect_car_convnext_raw_and_averaged_weights_are_each_selected_by_their_own_score(images):
    """The original kept the raw weights of the epoch in which the average was best."""
    noisy = np.where(np.arange(24) < 8, (CODES + 1) % 3, CODES)  # so that certainty is soon too much
    made = loop(images, valid_codes=noisy, ema_decay=0.98, keep_raw=True, lr=0.01, epochs=8, schedule="constant")
    scores = {"ema": [], "raw": []}

    def observe(row):
        for name, model in made.contenders.items():
            scores[name].append(validate(model, made.valid, made)["logloss"])

    best = fit(replace(made, observers=[observe]))
    for name, found in scores.items():
        assert best[name].epoch == 1 + int(np.argmin(found))
        assert best[name].scores["logloss"] == min(found)
        made.contenders[name].load_state_dict(best[name].state)
        assert validate(made.contenders[name], made.valid, made)["logloss"] == min(found)
    assert best["ema"].epoch != best["raw"].epoch


@pytest.mark.parametrize("accumulate", [1, 3])
def test_defect_sketch_the_rate_falls_by_epochs_and_not_by_batches_too(images, accumulate):
    """The original stepped its StepLR after each batch and once more after each epoch."""
    rows = []
    made = loop(images, schedule="step", step_epochs=2, gamma=0.5, accumulate=accumulate, batch_size=5)
    fit(replace(made, observers=[rows.append]))
    assert [row["lr"] for row in rows] == [0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]
