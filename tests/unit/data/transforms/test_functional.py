"""Fivefold's augmentations: comparison with pixels worked by hand, matrices and invariants."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fivefold.data.transforms.registry import (
    coarse_dropout,
    grid_distortion,
    linear_colour_jitter,
    remap_axes,
    shift_scale_rotate,
    unsharp_mask,
)

IMAGE = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
GREY = torch.full((3, 200, 200), 128, dtype=torch.uint8)
NO_MOTION = {"shift": 0.0, "zoom": (1.0, 1.0), "degrees": 0.0, "stretch": 1.0}
NO_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "cast": 0.0}


def test_coarse_dropout_makes_holes_of_the_requested_number_and_size():
    sizes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        output = coarse_dropout(GREY, holes=[1, 1], height=[3, 5], width=[7, 7], fill=[255, 0, 9])
        hole = (output != 128).all(dim=0)
        rows, columns = hole.any(dim=1).sum().item(), hole.any(dim=0).sum().item()
        assert hole.sum() == rows * columns
        assert output[:, hole].unique(dim=1).flatten().tolist() == [255, 0, 9]
        sizes.add((rows, columns))
    assert sizes == {(3, 7), (4, 7), (5, 7)}
    assert torch.equal(coarse_dropout(GREY, [0, 0], [1, 1], [1, 1], 0), GREY)
    assert (coarse_dropout(GREY[:, :4, :5], [1, 1], [16, 16], [16, 16], 0) == 0).all()


def test_unstretched_grid_is_the_identity():
    assert torch.equal(remap_axes(IMAGE, torch.ones(5), torch.ones(3), 255), IMAGE)
    assert torch.equal(grid_distortion(IMAGE, 4, [0.0, 0.0], 0), IMAGE)


def test_remap_axes_stretches_from_the_top_left_corner_and_fills_with_white():
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100).contiguous()
    stretched = remap_axes(ramp, torch.ones(1), torch.tensor([1.05]), 255)
    np.testing.assert_allclose(stretched[0, 0, :95].float(), np.arange(95) * 1.05, atol=0.51)
    assert (stretched[:, :, 96:] == 255).all()
    assert (remap_axes(ramp, torch.ones(1), torch.tensor([0.97]), 255) != 255).all()
    stretched = remap_axes(ramp, torch.ones(1), torch.tensor([0.5, 1.5]), 255)[0, 0].float()
    assert (stretched[10], stretched[50], stretched[90]) == (5, 25, 85)


def test_unsharp_mask_keeps_flat_images_and_increases_edge_contrast():
    assert torch.equal(unsharp_mask(GREY, 7, 1.5, 1.5, 0), GREY)
    assert torch.equal(unsharp_mask(IMAGE, 7, 1.5, 0.0, 0), IMAGE)
    assert torch.equal(unsharp_mask(IMAGE, 7, 1.5, 1.5, 255), IMAGE)
    assert unsharp_mask(IMAGE[:, :1, :2]).shape == (3, 1, 2)
    edge = GREY.clone()
    edge[:, :, 100:] = 160
    row = unsharp_mask(edge, 7, 1.5, 1.5, 0)[0, 0].int()
    assert row[99] < 128 < 160 < row[100]
    assert (row[50], row[150]) == (128, 160)


@pytest.mark.parametrize("size", [(32, 32), (20, 33), (1, 1)])
def test_zero_motion_and_zero_jitter_change_nothing(size: tuple[int, int]):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    assert torch.equal(shift_scale_rotate(image, **NO_MOTION), image)
    assert torch.equal(linear_colour_jitter(image, **NO_JITTER), image)


@pytest.mark.parametrize("seed", range(5))
def test_motion_and_colour_jitter_equal_matrix_products(seed: int):
    """Compare with the same maps in float64; the test draws the random numbers in the same order."""
    height, width = IMAGE.shape[1:]
    torch.manual_seed(seed)
    shift_x, shift_y, size, rotation, stretch = torch.rand(5, dtype=torch.float32).double().tolist()
    step, angle, aspect = 1 / (0.8 + size * 0.45), math.radians((2 * rotation - 1) * 20), 1.3 ** (stretch - 0.5)
    rotated = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double() * step
    move = rotated * torch.tensor([[aspect, height / width / aspect], [aspect * width / height, 1 / aspect]]).double()
    offset = 0.2 * torch.tensor([[2 * shift_x - 1], [2 * shift_y - 1]]).double()
    grid = F.affine_grid(torch.cat([move, offset], dim=1)[None], (1, *IMAGE.shape), align_corners=False)
    expected = F.grid_sample(IMAGE[None].double(), grid, padding_mode="reflection", align_corners=False)[0]
    torch.manual_seed(seed)
    assert (shift_scale_rotate(IMAGE, 0.1, (0.8, 1.25), 20, 1.3).double() - expected).abs().max() <= 0.51

    torch.manual_seed(seed)
    light, contrast, saturation, *casts = (2 * torch.rand(6).double() - 1).tolist()
    contrast, saturation = 1 + 0.3 * contrast, 1 + 0.4 * saturation
    mean = IMAGE.double().mean(dim=0, keepdim=True)
    mixed = (mean + saturation * (IMAGE - mean) - 127.5) * contrast + 127.5
    mixed += 255 * (0.1 * light + 0.05 * torch.tensor(casts).double()[:, None, None])
    torch.manual_seed(seed)
    jittered = linear_colour_jitter(IMAGE, 0.1, 0.3, 0.4, 0.05).double()
    assert (jittered - mixed.clamp(0, 255)).abs().max() <= 0.51
