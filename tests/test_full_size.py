"""The reference systems' networks at their full size: built, and trained for one step of two images on this machine."""

import numpy as np
import pytest
import torch
from PIL import Image

from fivefold.assemble import build_classifier, build_loop, images_at, one_hot, runtime_of, seed_everything
from fivefold.data.store import open_store
from fivefold.recipe import Augment, Model, Settings, Train
from fivefold.training.loop import TrainRows, fit

MASK = {"mean": [0.548, 0.504, 0.479], "std": [0.237, 0.247, 0.246]}
SYSTEMS = {
    "car_efficientnet_b5": (
        396,
        Model(
            backbone="timm/efficientnet_b5",
            head={"name": "mlp", "hidden": 512, "norm": "batch", "dropout": 0.3},
            meta=["color_mean", "aspect"],
            image_size=384,
        ),
    ),
    "car_convnext_tiny": (
        396,
        Model(
            backbone="torchvision/convnext_tiny",
            options={"bare": True},
            head={"name": "convnext", "dropout": 0.3},
            image_size=224,
        ),
    ),
    "sketch_caformer": (500, Model(backbone="timm/caformer_b36.sail_in22k", drop_path=0.1, image_size=224)),
    "product_image_type": (
        4,
        Model(
            backbone="torchvision/efficientnet_b0",
            options={"bare": True},
            head={"name": "mlp", "hidden": 640, "norm": "layer", "before": 0.3, "dropout": 0.3},
            image_size=256,
        ),
    ),
    "mask_profile": (6, Model(backbone="efficientnet_pytorch/efficientnet-b3", image_size=[512, 384], **MASK)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_full_size_network_takes_a_training_step(name, tmp_path):
    classes, model = SYSTEMS[name]
    random = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    train = Train(epochs=1, batch_size=2, optimizer="adamw", lr=1e-4, precision="bf16", device="cpu", workers=0)
    settings = Settings(model=model, augment=Augment(train=["random_resized_crop", "horizontal_flip"]), train=train)
    seed_everything(0)
    network = build_classifier(model, classes)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    runtime = runtime_of(settings)
    images = images_at(open_store(tmp_path), ["0.png", "1.png"], [None, None], settings, training=True)
    rows = TrainRows(images, one_hot(np.array([0, classes - 1]), classes, runtime.device))
    loop = build_loop(name, network, rows, None, settings, runtime, [], select=False, patience=0)
    after = fit(loop)["raw"].state
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    moved = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert {part: any(key.startswith(part) for key in moved) for part in ("backbone.", "head.")} == {
        "backbone.": True,
        "head.": True,
    }
    parameters = [key for key, _ in network.named_parameters()]
    assert len(moved.intersection(parameters)) > 0.9 * len(parameters)
