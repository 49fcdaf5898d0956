import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from fivefold.data.pipeline.dataset import Batch
from fivefold.errors import SettingsError
from fivefold.inference.predictor import make_runtime, predict
from fivefold.inference.tta import VIEWS, build_views, deduplicate, views_equal

IMAGES = torch.randn(2, 3, 20, 14, generator=torch.Generator().manual_seed(0))
BLACK = torch.tensor([-2.1, -2.0, -1.8]).reshape(1, 3, 1, 1)


def apply_view(name: str, **parameters: float) -> list[torch.Tensor]:
    return [view(IMAGES) for view in build_views([{"name": name, **parameters}], BLACK)]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(2, 3, 20, 14), (1, 3, 1, 1), (1, 3, 2, 3), (1, 3, 64, 64)])
def test_every_view_keeps_the_shape_is_finite_and_is_deterministic(name, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    original, state = images.clone(), torch.get_rng_state()
    first, second = ([view(images) for view in build_views([name], BLACK)] for _ in range(2))
    assert len(first) == (5 if name == "five_crops" else 1)
    for first_view, second_view in zip(first, second, strict=True):
        assert first_view.shape == images.shape
        assert first_view.isfinite().all()
        assert torch.equal(first_view, second_view)
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "spec", ["flip", {"name": "shift", "x": 3, "y": -2, "flip": True}, {"name": "scale", "factor": 0.7}]
)
def test_view_is_equal_in_both_memory_formats_and_keeps_the_format(spec):
    contiguous = torch.randn(2, 3, 9, 12)
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    view = build_views([spec])[-1]
    torch.testing.assert_close(view(channels_last), view(contiguous), rtol=0, atol=1e-6)
    assert view(contiguous).is_contiguous()
    assert view(channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("degrees", [15, -15, 30.5, 90])
def test_rotation_equals_that_of_torchvision_with_black_corners(degrees):
    shifted_to_zero = IMAGES - BLACK
    expected = v2.rotate(shifted_to_zero, degrees, InterpolationMode.BILINEAR) + BLACK
    torch.testing.assert_close(apply_view("rotate", degrees=degrees)[0], expected, atol=2e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(apply_view("rotate", degrees=0)[0], IMAGES, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("x", "y"), [(1, 0), (0, 1), (3, -2), (-13, 19)])
def test_shift_equals_a_slice_of_the_reflect_padded_image(x, y):
    padded = np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (19, 19), (13, 13)), mode="reflect")
    expected = padded[:, :, 19 - y : 39 - y, 13 - x : 27 - x]
    np.testing.assert_array_equal(apply_view("shift", x=x, y=y)[0], expected)


def test_flip_adds_the_view_of_the_mirrored_images():
    assert torch.equal(apply_view("plain")[0], IMAGES)
    assert torch.equal(apply_view("flip")[0], v2.horizontal_flip(IMAGES))
    for name, parameters in (("shift", {"x": 2, "y": -1}), ("rotate", {"degrees": 10}), ("five_crops", {})):
        without_flip = apply_view(name, **parameters)
        views = build_views([{"name": name, **parameters}], BLACK)
        expected = [*without_flip, *(view(IMAGES.flip(-1)) for view in views)]
        assert all(map(torch.equal, apply_view(name, **parameters, flip=True), expected))


def test_scale_enlarges_the_middle_or_reflect_pads_a_smaller_image():
    assert torch.equal(apply_view("scale", factor=1)[0], IMAGES)
    middle = v2.resize(IMAGES[..., 5:15, 3:10], [20, 14], antialias=True)
    torch.testing.assert_close(apply_view("scale", factor=2)[0], middle)
    smaller = v2.resize(IMAGES, [10, 7], antialias=True)
    expected = np.pad(smaller.numpy(), ((0, 0), (0, 0), (5, 5), (3, 4)), mode="reflect")
    np.testing.assert_allclose(apply_view("scale", factor=0.5)[0], expected, atol=1e-6)


def test_five_crops_equal_enlarged_crops_of_torchvision():
    expected = v2.five_crop(IMAGES, [14, 10])
    for view, crop in zip(apply_view("five_crops", share=0.7), expected, strict=True):
        torch.testing.assert_close(view, v2.resize(crop, [20, 14], antialias=True))


def test_prediction_is_the_mean_probability_over_all_views():
    runtime = make_runtime(torch.device("cpu"), None, False, [0.5] * 3, [0.25] * 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    specs = ["plain", {"name": "shift", "x": 2, "flip": True}, {"name": "scale", "flip": True}, "flip", "five_crops"]
    log_probs = predict(model, [Batch(pixels, torch.arange(3))], runtime, specs)
    views = build_views(specs, -2.0)
    assert len(views) == 11
    normalised = (pixels.float() / 255 - 0.5) / 0.25
    expected = torch.stack([model(view(normalised)).softmax(dim=1) for view in views]).mean(dim=0)
    np.testing.assert_allclose(np.exp(log_probs), expected.detach(), atol=1e-5)


def test_equivalent_view_specs_are_equal():
    explicit_specs = [{"name": "flip"}, {"name": "rotate", "degrees": 15.0}, "plain"]
    assert views_equal(["plain", "flip", "rotate"], explicit_specs)
    assert not views_equal(["plain", "rotate"], ["plain", {"name": "rotate", "degrees": -15}])
    assert not views_equal(["plain"], ["plain", "flip"])
    assert deduplicate(["plain", "rotate", *explicit_specs]) == ["plain", explicit_specs[1], explicit_specs[0]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flop", "unknown view 'flop'; did you mean 'flip'"),
        ({"name": "rotate", "degree": 4}, "did you mean 'degrees'"),
        ({"name": "plain", "x": 4}, "unknown parameter of view 'plain': 'x'"),
        ({"name": "rotate", "degrees": "4"}, "a number from -360 to 360"),
        ({"name": "shift", "x": 1.5}, "x=1.5, .* whole number"),
        ({"name": "shift", "x": True}, "x=True, .* whole number"),
        ({"name": "shift", "flip": 1}, "flip=1, .*true or false"),
        ({"name": "scale", "factor": 0}, "factor=0, .* number from 0.25 to 4"),
        ({"name": "scale", "factor": float("nan")}, "factor=nan"),
        ({"name": "five_crops", "share": [0.5]}, "share"),
    ],
)
def test_invalid_views_raise_errors_that_name_the_problem(spec, message):
    with pytest.raises(SettingsError, match=message):
        build_views(["plain", spec])
