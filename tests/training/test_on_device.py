"""A training whose images lie on the device ends in the bytes of one that loads them, stopped in between or not."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fivefold.assemble import build_classifier, build_loop, on_device, one_hot, runtime_of, seed_everything
from fivefold.data.dataset import ImageSet
from fivefold.data.store import open_store
from fivefold.data.transforms import build_transforms
from fivefold.errors import StoppedError
from fivefold.recipe import Augment, Data, Model, Settings, Train
from fivefold.stopping import noted
from fivefold.training.loop import Loop, TrainRows, ValidRows, fit
from fivefold.training.resume import Checkpoints

CODES = np.arange(24) % 3
STEPS = [{"name": "random_resized_crop", "scale": [0.4, 1.0]}, "horizontal_flip"]


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    drawing = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"{number:02d}.png" for number in range(24)]
    for number, name in enumerate(names):
        pixels = drawing.integers(0, 150, (*drawing.integers(10, 30, 2), 3))
        pixels[..., number % 3] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return ImageSet(open_store(folder), names, build_transforms(STEPS, (12, 12)), seed=1, meta=["aspect"])


def made(images: ImageSet, wanted: bool | str, device: str = "cpu", checkpoints: Checkpoints | None = None) -> Loop:
    settings = Settings(
        data=Data(on_device=wanted),
        model=Model(backbone="fivefold/small_net", options={"widths": [8, 16], "stem": 8}, image_size=12, meta=["aspect"]),
        augment=Augment(train=STEPS, mix="mixup", mix_alpha=0.4),
        train=Train(epochs=3, batch_size=5, accumulate=2, lr=0.02, precision="fp32", ema_decay=0.9, device=device),
    )  # fmt: skip
    runtime = runtime_of(settings)
    seed_everything(0)
    network = build_classifier(settings.model, 3)
    images.read_once(keep=True)
    train = on_device(TrainRows(images, one_hot(CODES, 3, runtime.device)), settings, runtime, 2**30)
    assert (train.resident is not None) is (wanted is True or (wanted == "auto" and device == "cuda"))
    loop = build_loop("test", network, train, ValidRows(images, CODES), settings, runtime, select=True, patience=0)
    return replace(loop, checkpoints=checkpoints)


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    rows: list[dict] = []
    best = fit(replace(loop, observers=[rows.append]))
    figures = {f"{row['epoch']} {name}": torch.tensor(value) for row in rows for name, value in row.items()}
    return figures | {f"best {name}": tensor.cpu() for name, tensor in best["ema"].state.items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def stopped_after(loop: Loop, step: int) -> Loop:
    """The loop, in which SIGTERM comes within the given step."""
    steps = iter(range(1, 1000))

    def strike() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return replace(loop, after_step=[strike, *loop.after_step])


def test_losses_scores_and_weights_are_those_of_the_loader(images):
    same(weights(made(images, True)), weights(made(images, False)))


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_a_run_that_goes_on_ends_in_the_same_bytes_whichever_way_its_images_come(images, tmp_path, before, after):
    kept = Checkpoints(tmp_path / "checkpoints")
    with noted(), pytest.raises(StoppedError):
        fit(stopped_after(made(images, before, checkpoints=kept), 4))
    found = weights(made(images, after, checkpoints=kept))
    same(found, weights(made(images, False)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_run_that_is_stopped_within_an_epoch_goes_on_to_the_same_bytes(images, tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints")
    with noted(), pytest.raises(StoppedError):
        fit(stopped_after(made(images, "auto", "cuda", kept), 4))
    same(weights(made(images, "auto", "cuda", kept)), weights(made(images, "auto", "cuda")))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_gpu_that_is_named_is_the_current_one(images):
    before = torch.cuda.current_device()
    try:
        same(weights(made(images, "auto", "cuda:1")), weights(made(images, "auto", "cuda:0")))
        made(images, "auto", "cuda:1")
        assert torch.cuda.current_device() == 1
    finally:
        torch.cuda.set_device(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_losses_scores_and_weights_are_those_of_the_loader(images):
    same(weights(made(images, "auto", "cuda")), weights(made(images, False, "cuda")))
