import copy
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fivefold.build import build_classifier, check_memory
from fivefold.config.schema import Model, Settings, Train
from fivefold.errors import SettingsError
from fivefold.inference.predictor import make_runtime
from fivefold.models.classifier import Classifier, Standardize
from fivefold.training.memory import MemoryEstimate, check_fits, estimate_memory

CPU = make_runtime(torch.device("cpu"), None, False, [0.5] * 3, [0.5] * 3)


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
    bf16 = make_runtime(torch.device("cpu"), torch.bfloat16, False, [0.5] * 3, [0.5] * 3)
    estimate = estimate_memory(network, (8, 8), bf16, copies=0)
    weight = 64 * 4096  # of the second layer: backward does not need the weight of the first
    assert estimate.image < 10_000
    assert estimate.fixed >= weight * 4 + weight * 2


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
@pytest.mark.parametrize(("backbone", "size", "batch"), [("timm/resnet10t", 96, 32), ("fivefold/small_net", 48, 96)])
def test_training_estimate_is_close_to_the_measured_peak(tmp_path, backbone, size, batch):
    """Compare with the peak of a real process that splits and trains, including its images."""
    generator = np.random.default_rng(0)
    for number in range(240):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(256, 256, 3), dtype=np.uint8)).save(path)
    environ = {"SM_CHANNEL_TRAIN": tmp_path / "images", "SM_MODEL_DIR": tmp_path / "model", "OMP_NUM_THREADS": 1}
    options = f"model.backbone={backbone} model.image_size={size} model.pretrained=false train.precision=fp32"
    options += f" train.batch_size={batch} train.epochs=1 train.loggers=[] split.folds=3 predict.batch_size={batch}"
    code = "import sys; from jobs.__main__ import main; from fivefold.contract.record import peak_memory_mib; "
    code += "code = main(sys.argv[1:]); print('peak', peak_memory_mib()); sys.exit(code)"
    process = subprocess.run(
        [sys.executable, "-c", code, "train", *options.split()],
        env=os.environ | {name: str(value) for name, value in environ.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    estimate = float(re.search(r"the process takes about ([\d,]+) MiB", process.stderr)[1].replace(",", ""))
    peak = int(re.search(r"peak (\d+)", process.stdout)[1])
    assert 0.7 < estimate / peak < 1.5, (estimate, peak)
