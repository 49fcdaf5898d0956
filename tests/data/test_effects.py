"""Effects against hand-worked pixels, scipy and invariants."""

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from fivefold.data.effects import (
    blurred,
    brightness,
    centre_crop_pixels,
    coarse_dropout,
    gaussian,
    gaussian_noise,
    grid_distortion,
    reflected,
    stretched,
    unsharp_mask,
)

IMAGE = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
GREY = torch.full((3, 200, 200), 128, dtype=torch.uint8)


def test_noise_has_the_deviation_and_mean_that_were_asked_for_in_each_channel():
    torch.manual_seed(0)
    found = gaussian_noise(GREY, mean=[0.0, 0.1, -0.1], std=[0.02, 0.05, 0.1]).double() / 255
    np.testing.assert_allclose(found.std(dim=(1, 2)), [0.02, 0.05, 0.1], rtol=0.03)
    np.testing.assert_allclose(found.mean(dim=(1, 2)) - 128 / 255, [0.0, 0.1, -0.1], atol=2e-3)
    assert torch.equal(gaussian_noise(IMAGE, 0.0, 0.0), IMAGE)


def test_holes_are_as_many_and_as_large_as_was_asked_for():
    sizes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = coarse_dropout(GREY, holes=[1, 1], height=[3, 5], width=[7, 7], fill=[255, 0, 9])
        hole = (found != 128).all(dim=0)
        rows, columns = hole.any(dim=1).sum().item(), hole.any(dim=0).sum().item()
        assert hole.sum() == rows * columns
        assert found[:, hole].unique(dim=1).flatten().tolist() == [255, 0, 9]
        sizes.add((rows, columns))
    assert sizes == {(3, 7), (4, 7), (5, 7)}
    assert torch.equal(coarse_dropout(GREY, [0, 0], [1, 1], [1, 1], 0), GREY)


def test_a_hole_larger_than_the_image_is_all_of_it_and_the_original_is_untouched():
    image = GREY[:, :4, :5].clone()
    assert (coarse_dropout(image, [1, 1], [16, 16], [16, 16], 0) == 0).all()
    assert (image == 128).all()


def test_a_grid_that_is_not_stretched_is_the_identity():
    assert torch.equal(stretched(IMAGE, torch.ones(5), torch.ones(3), 255), IMAGE)
    assert torch.equal(grid_distortion(IMAGE, 4, [0.0, 0.0], 0), IMAGE)


def test_one_step_stretches_from_the_top_left_corner_and_leaves_a_white_border():
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100).contiguous()
    found = stretched(ramp, torch.ones(1), torch.tensor([1.05]), 255)
    np.testing.assert_allclose(found[0, 0, :95].float(), np.arange(95) * 1.05, atol=0.51)
    assert (found[:, :, 96:] == 255).all()
    assert (stretched(ramp, torch.ones(1), torch.tensor([0.97]), 255) != 255).all()


def test_steps_have_stretches_of_their_own():
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100).contiguous()
    found = stretched(ramp, torch.ones(1), torch.tensor([0.5, 1.5]), 255)[0, 0].float()
    assert (found[10], found[50], found[90]) == (5, 25, 85)


def test_a_blur_is_scipys():
    weights = gaussian(7, 1.5)
    assert weights.sum() == pytest.approx(1)
    expected = IMAGE.double().numpy()
    for axis in (1, 2):
        expected = correlate1d(expected, weights.double().numpy(), axis=axis, mode="mirror")
    np.testing.assert_allclose(blurred(IMAGE.float(), weights), expected, atol=1e-3)
    assert blurred(torch.ones(3, 1, 1), weights).shape == (3, 1, 1)


def test_sharpening_leaves_flat_images_alone_and_widens_an_edge():
    assert torch.equal(unsharp_mask(GREY, 7, 1.5, 1.5, 0), GREY)
    assert torch.equal(unsharp_mask(IMAGE, 7, 1.5, 0.0, 0), IMAGE)
    assert torch.equal(unsharp_mask(IMAGE, 7, 1.5, 1.5, 255), IMAGE)
    edge = GREY.clone()
    edge[:, :, 100:] = 160
    row = unsharp_mask(edge, 7, 1.5, 1.5, 0)[0, 0].int()
    assert row[99] < 128 < 160 < row[100]
    assert (row[50], row[150]) == (128, 160)


def test_brightness_moves_every_value_and_stops_at_the_ends():
    image = torch.tensor([0, 50, 51, 200, 255], dtype=torch.uint8).expand(3, 1, 5)
    assert brightness(image, -0.2)[0, 0].tolist() == [0, 0, 0, 149, 204]
    assert brightness(image, 0.2)[0, 0].tolist() == [51, 101, 102, 251, 255]


def test_a_crop_of_fixed_pixels_takes_what_there_is_or_pads_with_black():
    assert torch.equal(centre_crop_pixels(IMAGE, 20, 10, False), IMAGE[:, 10:30, 10:20])
    assert torch.equal(centre_crop_pixels(IMAGE, 50, 10, False), IMAGE[:, :, 10:20])
    padded = centre_crop_pixels(IMAGE, 50, 34, True)
    assert padded.shape == (3, 50, 34)
    assert torch.equal(padded[:, 5:45, 2:32], IMAGE)
    assert padded.sum() == IMAGE.sum()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_reflection_is_numpys(size):
    expected = np.pad(np.arange(size), 9, mode="reflect")
    np.testing.assert_array_equal(reflected(torch.arange(-9, size + 9), size), expected)
