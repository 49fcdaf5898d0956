import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as v2

from fivefold.data.transforms.registry import (
    TRANSFORMS,
    build_transforms,
    coarse_dropout,
    grid_distortion,
    linear_colour_jitter,
    random_box,
    random_resized_crop,
    remap_axes,
    resize,
    shift_scale_rotate,
    unsharp_mask,
)
from fivefold.errors import SettingsError

IMAGE = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
GREY = torch.full((3, 200, 200), 128, dtype=torch.uint8)
RAMP = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100).contiguous()
PARAMETERS = {"perspective": {"p": 1.0}, "affine": {"degrees": 10, "translate": [0.1, 0.1]}}


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_every_transform_returns_the_requested_size_and_repeats_by_seed(name):
    transform, image = build_transforms([{"name": name, **PARAMETERS.get(name, {})}], (24, 32)), IMAGE.clone()
    for seed in range(3):
        outputs = []
        for _ in range(2):
            torch.manual_seed(seed)
            outputs.append(transform(image))
        assert (outputs[0].shape, outputs[0].dtype) == ((3, 24, 32), torch.uint8)
        assert torch.equal(*outputs)
    assert torch.equal(image, IMAGE), "a transform must not modify its input"


def test_random_crop_shifts_the_image_by_at_most_its_padding():
    transform = build_transforms([{"name": "random_crop", "padding": 2, "mode": "constant"}], (100, 100))
    torch.manual_seed(0)
    assert {int(transform(RAMP)[0, 16, 16]) - 16 for _ in range(60)} == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("horizontal_flop", "did you mean 'horizontal_flip'"),
        ("BestAugmentation", "did you mean 'bestAugmentation'"),
        ({"name": "bestAugmentation", "p": 0.5}, "takes no parameters"),
        ({"name": "random_crop", "pad": 4}, "did you mean 'padding'"),
        ({"name": "random_crop", "mode": "mirror"}, "mode='mirror' "),
        ({"name": "rotation", "p": 1.5}, "p=1.5"),
        ({"name": "rotation", "interpolation": "cubic"}, "cubic"),
        ({"name": "random_erasing", "inplace": True}, "inplace=true"),
        ({"name": "gaussian_noise", "sigma": "much"}, "gaussian_noise"),
        ({"name": "unsharp_mask", "kernel": 6}, "kernel=6 "),
        ({"name": "coarse_dropout", "height": [4, 2]}, "height="),
        ({"name": "coarse_dropout", "fill": 256}, "fill=256 "),
        ({"name": "grid_distortion", "limit": [-1.0, 0.5]}, "limit=.* "),
    ],
)
def test_invalid_transform_specs_are_rejected_before_any_image_is_read(spec, message):
    with pytest.raises(SettingsError, match=message):
        build_transforms([spec], (8, 8))


def test_random_resized_crop_is_uniform_in_area_and_position_and_log_uniform_in_aspect():
    torch.manual_seed(0)
    boxes = [random_box(120, 200, (8, 8), scale=(0.1, 0.28), ratio=(0.5, 2.0)) for _ in range(1200)]  # all of them fit
    top, left, height, width = np.array(boxes).T
    assert min(top.min(), left.min()) >= 0
    assert ((top + height).max() <= 120, (left + width).max() <= 200) == (True, True)
    area, aspect = height * width / (120 * 200), np.log(width / height)
    for values, low, high in ((area, 0.1, 0.28), (aspect, np.log(0.5), np.log(2))):
        shares, _ = np.histogram(values, bins=4, range=(low, high))
        assert shares.sum() > 1150, "all values are in range, except for rounding"
        assert shares / shares.sum() == pytest.approx(np.full(4, 0.25), abs=0.05)
    room = np.stack([top / (120 - height), left / (200 - width)])
    assert room.mean(axis=1) == pytest.approx([0.5, 0.5], abs=0.03)
    assert room.std(axis=1) == pytest.approx([12**-0.5] * 2, abs=0.03)


def test_random_resized_crop_resizes_its_random_box():
    torch.manual_seed(1)
    top, left, height, width = random_box(40, 30, (8, 8), (0.2, 0.6), (0.5, 2.0))
    torch.manual_seed(1)
    crop = random_resized_crop(IMAGE, (8, 8), (0.2, 0.6), (0.5, 2.0))
    assert torch.equal(crop, resize(IMAGE[:, top : top + height, left : left + width], (8, 8)))
    full = random_resized_crop(IMAGE, (20, 15), scale=(1.0, 1.0), ratio=(30 / 40, 30 / 40))
    assert torch.equal(full, resize(IMAGE, (20, 15)))
    narrow = random_resized_crop(IMAGE[:, :4], (4, 4), scale=(1.0, 1.0), ratio=(1, 1))
    assert torch.equal(narrow, IMAGE[:, :4, 13:17]), "a box that never fits gives a centre crop"


@pytest.mark.parametrize("spec", [{"name": "horizontal_flip"}, {"name": "brightness", "amount": 0.5}])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_probability_is_the_share_of_changed_images(spec, p):
    transform = build_transforms([{**spec, "p": p}], (40, 30))
    torch.manual_seed(0)
    changed = sum(not torch.equal(transform(IMAGE), IMAGE) for _ in range(400))
    assert changed / 400 == pytest.approx(p, abs=0.06)


def test_resize_does_not_depend_on_the_memory_layout():
    rows = IMAGE.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    crop = (slice(None), slice(3, 33), slice(2, 29))
    for size in ((24, 24), (40, 13), (60, 70)):
        expected = v2.resize(IMAGE[crop].contiguous(), size, antialias=True)
        assert torch.equal(resize(IMAGE[crop], size), expected)
        resized = resize(rows[crop], size)
        assert torch.equal(resized, expected)
        assert resized.permute(1, 2, 0).is_contiguous(), "channels-last input must stay channels-last, which is fast"


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


def test_remap_axes_stretches_from_the_top_left_corner_and_fills_with_white():
    stretched = remap_axes(RAMP, torch.ones(1), torch.tensor([1.05]), 255)
    np.testing.assert_allclose(stretched[0, 0, :95].float(), np.arange(95) * 1.05, atol=0.51)
    assert (stretched[:, :, 96:] == 255).all()
    assert (remap_axes(RAMP, torch.ones(1), torch.tensor([0.97]), 255) != 255).all()
    stretched = remap_axes(RAMP, torch.ones(1), torch.tensor([0.5, 1.5]), 255)[0, 0].float()
    assert (stretched[10], stretched[50], stretched[90]) == (5, 25, 85)
    assert torch.equal(grid_distortion(IMAGE, 4, [0.0, 0.0], 0), IMAGE)


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


@pytest.mark.parametrize("seed", range(3))
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
