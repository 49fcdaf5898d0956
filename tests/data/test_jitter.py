"""Geometry and colour in one step: at rest they change nothing, and each number does what it says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.data.jitter import linear_colour_jitter, shift_scale_rotate

STILL = {"shift": 0.0, "zoom": (1.0, 1.0), "degrees": 0.0, "stretch": 1.0}
PALE = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "cast": 0.0}


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def disc(height: int, width: int, x: float, y: float, radius: float) -> Tensor:
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    inside = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    return (inside.to(torch.uint8) * 255).expand(3, -1, -1).contiguous()


def centre_and_spread(image: Tensor) -> tuple[float, float, float, float]:
    """x, y of the mass, and its standard deviations along x and y, in pixels."""
    mass = image[0].double()
    mass = mass / mass.sum()
    x, y = torch.arange(image.shape[2]) + 0.5, (torch.arange(image.shape[1]) + 0.5)[:, None]
    mean_x, mean_y = (mass * x).sum(), (mass * y).sum()
    return *map(float, (mean_x, mean_y)), *(
        float((mass * (at - mean) ** 2).sum().sqrt()) for at, mean in ((x, mean_x), (y, mean_y))
    )


@pytest.mark.parametrize("size", [(32, 32), (20, 33), (1, 1)])
def test_at_rest_nothing_changes(size: tuple[int, int]):
    image = noise(*size)
    assert torch.equal(shift_scale_rotate(image, **STILL), image)
    assert torch.equal(linear_colour_jitter(image, **PALE), image)


def test_the_seed_decides():
    image = noise(24, 24)
    for change in (
        lambda: shift_scale_rotate(image, 0.1, (0.8, 1.2), 15, 1.2),
        lambda: linear_colour_jitter(image, 0.1, 0.3, 0.4, 0.05),
    ):
        found = []
        for seed in (1, 1, 2):
            torch.default_generator.manual_seed(seed)
            found.append(change())
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        assert found[0].dtype == torch.uint8
        assert found[0].shape == image.shape


def test_zoom_enlarges_about_the_centre():
    image = noise(32, 32)
    crop = image[None, :, 8:24, 8:24].float()
    expected = F.interpolate(crop, size=(32, 32), mode="bilinear", align_corners=False)[0]
    found = shift_scale_rotate(image, **{**STILL, "zoom": (2.0, 2.0)})
    assert (found.float() - expected)[:, 1:-1, 1:-1].abs().max() <= 0.51


def test_a_shift_moves_by_up_to_its_share_of_each_side():
    image = disc(40, 80, 40, 20, 5)
    moved = []
    for seed in range(40):
        torch.default_generator.manual_seed(seed)
        x, y, _, _ = centre_and_spread(shift_scale_rotate(image, **{**STILL, "shift": 0.1}))
        moved.append((abs(x - 40), abs(y - 20)))
    furthest = torch.tensor(moved).amax(dim=0)
    assert 6 < furthest[0] <= 8.01
    assert 3 < furthest[1] <= 4.01


def test_turning_keeps_distances_in_an_image_that_is_no_square():
    image = disc(40, 80, 52, 20, 4)
    for seed in range(10):
        torch.default_generator.manual_seed(seed)
        x, y, _, _ = centre_and_spread(shift_scale_rotate(image, **{**STILL, "degrees": 20}))
        assert ((x - 40) ** 2 + (y - 20) ** 2) ** 0.5 == pytest.approx(12, abs=0.1)
        assert abs(y - 20) <= 12 * 0.3421 + 0.1


def test_stretching_makes_one_side_longer_and_the_other_shorter():
    image = disc(48, 48, 24, 24, 10)
    ratios = []
    for seed in range(40):
        torch.default_generator.manual_seed(seed)
        _, _, wide, high = centre_and_spread(shift_scale_rotate(image, **{**STILL, "stretch": 1.5}))
        assert (wide * high) ** 0.5 == pytest.approx(5, rel=0.02)
        ratios.append(wide / high)
    assert 1.35 < max(ratios) < 1.52
    assert 1 / 1.52 < min(ratios) < 1 / 1.35


def test_contrast_is_about_middle_grey():
    image = noise(16, 16)
    torch.default_generator.manual_seed(3)
    found = linear_colour_jitter(image, **{**PALE, "contrast": 0.4}).double() - 127.5
    before = image.double() - 127.5
    inside = found.abs() < 127
    factor = (found[inside] * before[inside]).sum() / (before[inside] ** 2).sum()
    assert 0.6 <= factor <= 1.4
    assert (found - factor * before)[inside].abs().max() <= 0.6


def test_saturation_leaves_a_pixels_mean():
    image = noise(16, 16) // 2 + 64
    torch.default_generator.manual_seed(4)
    found = linear_colour_jitter(image, **{**PALE, "saturation": 0.5}).float()
    assert (found.mean(dim=0) - image.float().mean(dim=0)).abs().max() <= 0.51
    assert not torch.equal(found, image.float())
    grey = torch.full((3, 4, 4), 90, dtype=torch.uint8)
    assert torch.equal(linear_colour_jitter(grey, **{**PALE, "saturation": 0.5}), grey)


def test_brightness_moves_all_channels_alike_and_a_cast_each():
    image = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    alike = linear_colour_jitter(image, **{**PALE, "brightness": 0.1}).int() - 128
    assert torch.equal(alike[0], alike[1])
    assert torch.equal(alike[1], alike[2])
    assert 0 < alike.abs().max() <= 26
    own = linear_colour_jitter(image, **{**PALE, "cast": 0.1}).int() - 128
    assert len(own[:, 0, 0].unique()) > 1
    assert own.abs().max() <= 26
