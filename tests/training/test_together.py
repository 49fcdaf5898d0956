"""All parts at once: mixing, R-Drop, SAM, averaging, accumulation and clipping train one network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fivefold.assemble import build_classifier, build_loop, one_hot, seed_everything
from fivefold.data.dataset import ImageSet
from fivefold.data.store import open_store
from fivefold.data.transforms import build_transforms
from fivefold.inference.predictor import make_runtime
from fivefold.recipe import Augment, Distill, Model, Settings, Train
from fivefold.training.best import Best
from fivefold.training.loop import TrainRows, ValidRows, fit
from fivefold.training.teaching import Teacher

CPU = make_runtime(torch.device("cpu"), None, True, [0.5] * 3, [0.25] * 3)
CODES = np.arange(48) % 3


@pytest.fixture
def images(tmp_path) -> ImageSet:
    random = np.random.default_rng(0)
    for number in range(48):
        pixels = random.integers(0, 150, (12, 12, 3))
        pixels[..., number % 3] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    names = [f"{number:02d}.png" for number in range(48)]
    return ImageSet(open_store(tmp_path), names, build_transforms(["horizontal_flip"], (12, 12)), seed=1)


def train(images: ImageSet, taught: bool = False, **more) -> tuple[dict[str, Best], list[dict], list[float]]:
    """What was kept, the epochs' rows, and the norm of every step of the weights that the loss saw."""
    settings = Settings(
        model=Model(
            backbone="fivefold/small_net", options={"widths": [8, 16], "stem": 8}, image_size=12, dropout=0.3
        ),
        augment=Augment(mix="mixup", mix_alpha=0.4),
        train=Train(
            epochs=8, batch_size=8, accumulate=2, lr=0.02, clip=1.0, ema_decay=0.95, keep_raw=True, rdrop_alpha=0.5,
            update="sam", sam_rho=0.05, label_smoothing=0.05, class_weights="balanced", sampler="balanced",
            precision="fp32", workers=0,
        ).model_copy(update=more),
        distill=Distill(temperature=2.0, temperature_decay=0.9),
    )  # fmt: skip
    seed_everything(0)
    network = build_classifier(settings.model, 3)
    probs = np.full((48, 3), 0.1, np.float32) + 0.7 * np.eye(3, dtype=np.float32)[CODES]
    teacher = Teacher(np.log(probs), 0.7, 2.0, CPU.device) if taught else None
    rows, valid = TrainRows(images, one_hot(CODES, 3, CPU.device), teacher), ValidRows(images, CODES)
    made = build_loop("test", network, rows, valid, settings, CPU, select=True, patience=0)
    seen: list[dict] = []
    norms: list[float] = []

    def note() -> None:
        gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    best = fit(replace(made, observers=[seen.append], after_step=[note, *made.after_step]))
    return best, seen, norms


@pytest.mark.parametrize("taught", [False, True])
def test_mixup_rdrop_sam_ema_accumulation_and_clipping_together_reduce_the_loss(images, taught):
    best, rows, norms = train(images, taught)
    assert len(norms) == 8 * 3  # 48 rows in batches of 8, two a step
    assert max(norms) <= 1.0 + 1e-4
    assert rows[-1]["train_loss"] < 0.85 * rows[0]["train_loss"]
    assert best["ema"].scores["logloss"] < 0.7 * np.log(3)
    assert best["raw"].scores["acc"] > 0.9


def test_all_together_give_the_same_bytes_twice(images):
    (first, rows, _), (second, again, _) = (train(images, epochs=2) for _ in range(2))
    assert rows == again
    for name, kept in first.items():
        assert all(torch.equal(tensor, second[name].state[key]) for key, tensor in kept.state.items())


def test_each_part_leaves_its_mark(images):
    """Taking any one of them out changes the weights: none is read and then forgotten."""
    whole = train(images, epochs=1)[0]["raw"].state
    for without in (
        {"rdrop_alpha": 0.0}, {"update": "plain"}, {"sam_rho": 0.1}, {"clip": 0.0}, {"accumulate": 1},
        {"label_smoothing": 0.0}, {"sampler": "shuffle"}, {"loss": {"name": "focal", "gamma": 1.0}},
        {"backbone_lr": 0.5}, {"layer_decay": 0.8}, {"freeze_epochs": 1},
    ):  # fmt: skip
        other = train(images, epochs=1, **without)[0]["raw"].state
        assert not torch.equal(whole["head.1.weight"], other["head.1.weight"]), without
