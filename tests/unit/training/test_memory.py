import copy
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fivefold.build import build_classifier, build_eval_transforms, build_train_transforms, check_memory
from fivefold.config.schema import Augment, Model, Settings, Train
from fivefold.errors import SettingsError
from fivefold.models.classifier import Classifier, Standardize
from fivefold.training.memory import MemoryEstimate, check_fits, estimate_memory
from toy_data import environment, noise
from toy_training import CPU as CHANNELS_LAST_CPU

CPU = replace(CHANNELS_LAST_CPU, channels_last=False)


def test_estimate_counts_the_tensors_that_autograd_keeps():
    """A convolution keeps its input, a ReLU its output; calculated by hand for 8x8 images of 4-byte floats."""
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
    norm_network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    state, rng_state = copy.deepcopy((network.state_dict(), norm_network.state_dict())), torch.get_rng_state()
    estimate = estimate_memory(network, (8, 8), CPU, copies=3)
    estimate_memory(norm_network, (8, 8), CPU, copies=1)
    torch.testing.assert_close((network.state_dict(), norm_network.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng_state)
    image, relu = 3 * 8 * 8 * 4, 16 * 8 * 8 * 4
    assert estimate.image == image + relu
    assert estimate.fixed == (3 * 16 * 9 + 16) * 4 * 4


def test_weights_cast_by_autocast_count_once_instead_of_per_image():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.Linear(64, 4096))
    estimate = estimate_memory(network, (8, 8), replace(CPU, dtype=torch.bfloat16), copies=0)
    weight = 64 * 4096  # of the second layer: backward does not need the weight of the first
    assert estimate.image < 10_000
    assert estimate.fixed >= weight * 4 + weight * 2


def test_the_size_of_training_images_decides(caplog):
    settings = Settings(
        model=Model(backbone="fivefold/small_net", image_size=32),
        augment=Augment(image_size=16),
        train=Train(precision="fp32"),
    )
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    assert build_train_transforms(settings)(image).shape == (3, 16, 16)
    assert build_eval_transforms(settings)(image).shape == (3, 32, 32)
    network = build_classifier(settings.model, 2)
    small, large = (estimate_memory(network, size, CPU, copies=0).image for size in ((16, 16), (32, 32)))
    assert 3 * small < large
    with caplog.at_level("INFO"):
        check_memory(network, settings, CPU)
        check_memory(network, settings.model_copy(update={"augment": Augment()}), CPU)
    steps = [int(found[1].replace(",", "")) for found in re.finditer(r"a step takes about ([\d,]+) MiB", caplog.text)]
    assert steps[0] < steps[1]


def test_a_network_of_one_size_rejects_another_training_size():
    settings = Settings(
        model=Model(backbone="timm/vit_tiny_patch16_224"), augment=Augment(image_size=96), train=Train(precision="fp32")
    )
    with pytest.raises(SettingsError, match=r"augment\.image_size=96"):
        check_memory(build_classifier(settings.model, 2), settings, CPU)


def test_meta_features_count_per_image():
    """The linear layer keeps its input: 192 pixels and 4 meta features that two earlier steps standardised."""
    network = Classifier(nn.Flatten(), nn.Linear(3 * 8 * 8 + 4, 2), Standardize(4))
    without = estimate_memory(Classifier(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), (8, 8), CPU, copies=0)
    estimate = estimate_memory(network, (8, 8), CPU, copies=0, meta=4)
    assert without.image == 3 * 8 * 8 * 4
    assert estimate.image == 2 * 3 * 8 * 8 * 4 + 4 * 4  # the images, and the concatenated features


def test_oversized_batch_error_suggests_a_batch_size_that_fits():
    estimate = MemoryEstimate(fixed=100 << 20, image=10 << 20)
    assert "420 MiB at batch size 32" in check_fits(estimate, 32, 1 << 30)
    with pytest.raises(SettingsError, match=r"train\.batch_size=15 would fit; train\.grad_accum_steps=3 keeps"):
        check_fits(estimate, 32, 250 << 20)
    with pytest.raises(SettingsError, match=r"train\.batch_size=15 would fit; train\.grad_accum_steps=12 keeps"):
        check_fits(estimate, 32, 250 << 20, accumulate=4)
    with pytest.raises(SettingsError, match="not even one image fits"):
        check_fits(estimate, 32, 105 << 20)


def logged_mib(caplog, model: dict | None = None, **train) -> float:
    """Return the MiB that a run logs as its estimate."""
    settings = Settings(
        model=Model(**{"backbone": "timm/resnet10t", "image_size": 64} | (model or {})),
        train=Train(**{"batch_size": 64, "precision": "fp32"} | train),
    )
    caplog.clear()
    with caplog.at_level("INFO"):
        check_memory(build_classifier(settings.model, 3), settings, CPU)
    match = re.search(r"memory: a step takes about ([\d,]+) MiB", caplog.text)
    return float(match[1].replace(",", ""))


def test_rdrop_doubles_the_estimate_only_if_the_backbone_runs_twice(caplog):
    plain = logged_mib(caplog, model={"dropout": 0.2})
    assert logged_mib(caplog, rdrop_alpha=0.5, model={"dropout": 0.2}) == plain
    assert logged_mib(caplog, rdrop_alpha=0.5, model={"drop_path": 0.1}) > 1.5 * plain


@pytest.mark.slow
def test_training_estimate_is_close_to_the_measured_peak(tmp_path):
    """Compare with the peak of a real process that splits and trains, including its images."""
    generator = np.random.default_rng(0)
    for number in range(120):
        noise(tmp_path / "images" / "ab"[number % 2] / f"{number}.png", generator, 256)
    options = "model.backbone=timm/resnet10t model.image_size=96 model.pretrained=false train.precision=fp32"
    options += " train.batch_size=32 train.epochs=1 train.loggers=[] split.folds=2 predict.batch_size=32"
    code = "import sys; from jobs.__main__ import main; from fivefold.contract.record import peak_memory_mib; "
    code += "code = main(sys.argv[1:]); print('peak', peak_memory_mib()); sys.exit(code)"
    environ = environment(SM_CHANNEL_TRAIN=tmp_path / "images", SM_MODEL_DIR=tmp_path / "model", OMP_NUM_THREADS=1)
    command = [sys.executable, "-c", code, "train", *options.split()]
    process = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    estimate = float(re.search(r"the process takes about ([\d,]+) MiB", process.stderr)[1].replace(",", ""))
    peak = int(re.search(r"peak (\d+)", process.stdout)[1])
    assert 0.7 < estimate / peak < 1.5, (estimate, peak)
