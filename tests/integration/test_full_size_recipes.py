"""The reference systems at full size: train each recipe's network for one step of two images on the local machine."""

import numpy as np
import pytest
import torch

from fivefold.build import (
    build_classifier,
    build_trainer,
    image_dataset,
    make_training_runtime,
    one_hot,
    seed_everything,
)
from fivefold.config.loading import arguments_layer, load
from fivefold.data.readers.stores import open_store
from fivefold.training.trainer import TrainData, fit
from toy_data import noise

SYSTEMS = {
    "car_efficientnet_b5": 396,
    "car_convnext_tiny": 396,
    "sketch_caformer": 500,
    "product_image_type": 4,
    "mask_profile": 18,
}
"""Recipes with the number of classes of their models."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_recipe_trains_one_step_at_full_size(name, tmp_path):
    overrides = [
        "model.pretrained=false",
        "train.epochs=1",
        "train.batch_size=2",
        "train.device=cpu",
        "train.num_workers=0",
    ]
    settings, classes = load([arguments_layer([f"recipe={name}", *overrides])]), SYSTEMS[name]
    generator = np.random.default_rng(0)
    for number in range(2):
        noise(tmp_path / f"{number}.png", generator, size=300)
    seed_everything(settings.seed)
    network = build_classifier(settings.model, classes)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    runtime = make_training_runtime(settings)
    images = image_dataset(open_store(tmp_path), ["0.png", "1.png"], [None, None], settings, training=True)
    rows = TrainData(images, one_hot(np.array([0, classes - 1]), classes, runtime.device))
    trainer = build_trainer(name, network, rows, None, settings, runtime, select=False, patience=0)
    best = fit(trainer)
    assert set(best) == ({"ema", "raw"} if settings.train.ema_decay else {"raw"})
    after = best["raw"].state
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    changed = [name for name, parameter in before.items() if not torch.equal(parameter, after[name])]
    trained = [name for name in before if name.startswith("head.") or not settings.train.freeze_epochs]
    assert set(changed) <= set(trained)
    assert len(changed) > 0.9 * len(trained)
