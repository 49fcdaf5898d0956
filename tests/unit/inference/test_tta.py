"""Views at prediction: each against torchvision or pixels moved by hand, and the same bits every time."""

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


def seen(name: str, **parameters: float) -> list[torch.Tensor]:
    return [view(IMAGES) for view in build_views([{"name": name, **parameters}], BLACK)]


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(2, 3, 20, 14), (1, 3, 1, 1), (1, 3, 2, 3), (1, 3, 64, 64)])
def test_every_view_keeps_the_shape_is_finite_and_draws_nothing(name, shape):
    """Where the ConvNeXt of the cars drew the angle of its view: no two of its predictions agreed."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, state = images.clone(), torch.get_rng_state()
    first, again = ([view(images) for view in build_views([name], BLACK)] for _ in range(2))
    assert len(first) == (5 if name == "five_crops" else 1)
    for one, other in zip(first, again, strict=True):
        assert one.shape == images.shape
        assert one.isfinite().all()
        assert torch.equal(one, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["shift", "scale"])
def test_pixels_beyond_the_edges_are_the_same_in_both_memory_formats_which_stay(name):
    first = torch.randn(2, 3, 9, 12)
    last = first.contiguous(memory_format=torch.channels_last)
    spec = {"shift": {"name": "shift", "x": 3, "y": -2}, "scale": {"name": "scale", "factor": 0.7}}[name]
    (view,) = build_views([spec])
    torch.testing.assert_close(view(last), view(first), rtol=0, atol=1e-6)
    assert view(first).is_contiguous()
    assert view(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "spec",
    ["plain", "flip", "rotate", "scale", "five_crops", *({"name": "shift", "x": x, "y": 3} for x in (-2, 0, 40))],
)
def test_pixels_moved_before_they_are_normalised_are_those_moved_after(spec, given, flip):
    if flip and spec not in ("plain", "flip"):
        spec = {**({"name": spec} if isinstance(spec, str) else spec), "flip": True}
    runtime = make_runtime(torch.device("cpu"), None, given == torch.channels_last, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    pixels = torch.randint(0, 256, (2, 3, 20, 14), dtype=torch.uint8).contiguous(memory_format=given)
    for view in build_views([spec], BLACK):
        assert torch.equal(runtime.images(view.rearrange(pixels)), view.rearrange(runtime.images(pixels)))


@pytest.mark.parametrize("degrees", [15, -15, 30.5, 90])
def test_a_rotation_is_torchvisions_with_black_corners(degrees):
    lifted = IMAGES - BLACK
    expected = v2.rotate(lifted, degrees, InterpolationMode.BILINEAR) + BLACK
    torch.testing.assert_close(seen("rotate", degrees=degrees)[0], expected, atol=2e-4, rtol=0)


def test_a_rotation_by_nothing_is_the_identity_also_under_autocast():
    torch.testing.assert_close(seen("rotate", degrees=0)[0], IMAGES, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(seen("rotate", degrees=0)[0], IMAGES, atol=1e-5, rtol=0)


def test_plain_and_flip_are_torchvisions():
    assert torch.equal(seen("plain")[0], IMAGES)
    assert torch.equal(seen("flip")[0], v2.horizontal_flip(IMAGES))


@pytest.mark.parametrize(("x", "y"), [(1, 0), (0, 1), (3, -2), (-13, 19)])
def test_a_shift_is_a_slice_of_the_mirrored_image(x, y):
    padded = np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (19, 19), (13, 13)), mode="reflect")
    expected = padded[:, :, 19 - y : 39 - y, 13 - x : 27 - x]
    np.testing.assert_array_equal(seen("shift", x=x, y=y)[0], expected)


def test_with_flip_a_view_is_also_taken_of_the_mirrored_images():
    for name, parameters in (("shift", {"x": 2, "y": -1}), ("rotate", {"degrees": 10}), ("five_crops", {})):
        alone = seen(name, **parameters)
        both = seen(name, **parameters, flip=True)
        assert len(both) == 2 * len(alone)
        mirrored = build_views([{"name": name, **parameters}], BLACK)
        for found, expected in zip(both, [*alone, *(view(IMAGES.flip(-1)) for view in mirrored)], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_scale_enlarges_the_middle_or_mirrors_around_a_smaller_image():
    assert torch.equal(seen("scale", factor=1)[0], IMAGES)
    middle = v2.resize(IMAGES[..., 5:15, 3:10], [20, 14], antialias=True)
    torch.testing.assert_close(seen("scale", factor=2)[0], middle)
    smaller = v2.resize(IMAGES, [10, 7], antialias=True)
    expected = np.pad(smaller.numpy(), ((0, 0), (0, 0), (5, 5), (3, 4)), mode="reflect")
    np.testing.assert_allclose(seen("scale", factor=0.5)[0], expected, atol=1e-6)


def test_five_crops_are_torchvisions_enlarged():
    expected = v2.five_crop(IMAGES, [14, 10])
    for mine, theirs in zip(seen("five_crops", share=0.7), expected, strict=True):
        torch.testing.assert_close(mine, v2.resize(theirs, [20, 14], antialias=True))


def test_the_prediction_is_the_mean_probability_over_all_views():
    runtime = make_runtime(torch.device("cpu"), None, False, [0.5] * 3, [0.25] * 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    specs = ["plain", {"name": "shift", "x": 2, "flip": True}, {"name": "scale", "flip": True}, "flip", "five_crops"]
    found = predict(model, [Batch(pixels, torch.arange(3))], runtime, specs)
    views = build_views(specs, -2.0)
    assert len(views) == 11
    normal = (pixels.float() / 255 - 0.5) / 0.25
    expected = torch.stack([model(view(normal)).softmax(dim=1) for view in views]).mean(dim=0)
    np.testing.assert_allclose(np.exp(found), expected.detach(), atol=1e-5)


def test_specs_that_mean_the_same_are_the_same():
    long = [{"name": "flip"}, {"name": "rotate", "degrees": 15.0}, "plain"]
    assert views_equal(["plain", "flip", "rotate"], long)
    assert not views_equal(["plain", "rotate"], ["plain", {"name": "rotate", "degrees": -15}])
    assert not views_equal(["plain"], ["plain", "flip"])
    assert deduplicate(["plain", "rotate", *long]) == ["plain", "rotate", {"name": "flip"}]


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
def test_what_cannot_be_seen_is_explained(spec, message):
    with pytest.raises(SettingsError, match=message):
        build_views(["plain", spec])
