import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from fivefold.data.transforms.registry import (
    TRANSFORMS,
    build_transforms,
    horizontal_flip,
    random_box,
    random_resized_crop,
    resize,
)
from fivefold.errors import SettingsError

IMAGE = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PARAMETERS = {"perspective": {"p": 1.0}, "affine": {"degrees": 10, "translate": [0.1, 0.1]}}


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_every_transform_returns_the_requested_size_and_repeats_by_seed(name):
    transform, image = build_transforms([{"name": name, **PARAMETERS.get(name, {})}], (24, 32)), IMAGE.clone()
    for seed in range(5):
        outputs = []
        for _ in range(2):
            torch.manual_seed(seed)
            outputs.append(transform(image))
        assert (outputs[0].shape, outputs[0].dtype) == ((3, 24, 32), torch.uint8)
        assert torch.equal(*outputs)
    assert torch.equal(image, IMAGE), "a transform must not modify its input"


def test_random_crop_shifts_the_image_by_at_most_its_padding():
    ramp = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32).contiguous()
    transform = build_transforms([{"name": "random_crop", "padding": 2, "mode": "constant"}], (32, 32))
    shifts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        shifts.add(int(transform(ramp)[0, 16, 16]) - 16)
    assert shifts == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("horizontal_flop", "did you mean 'horizontal_flip'"),
        ("BestAugmentation", "did you mean 'bestAugmentation'"),
        ({}, "unknown transform ''"),
        ({"name": "bestAugmentation", "p": 0.5}, "takes no parameters"),
        ({"name": "random_crop", "pad": 4}, "did you mean 'padding'"),
        ({"name": "random_crop", "mode": "mirror"}, "mode='mirror' "),
        ({"name": "rotation", "angle": 4}, "rotation"),
        ({"name": "rotation", "p": 1.5}, "p=1.5"),
        ({"name": "rotation", "interpolation": "cubic"}, "cubic"),
        ({"name": "random_erasing", "inplace": True}, "inplace=true"),
        ({"name": "gaussian_noise", "sigma": "much"}, "gaussian_noise"),
        ({"name": "unsharp_mask", "kernel": 6}, "kernel=6 "),
        ({"name": "coarse_dropout", "holes": 8}, "holes=8 "),
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


def test_random_resized_crop_that_never_fits_is_a_centre_crop():
    image = IMAGE[:, :4]
    crop = random_resized_crop(image, (4, 4), scale=(1.0, 1.0), ratio=(1, 1))
    assert torch.equal(crop, image[:, :, 13:17])


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_horizontal_flip_occurs_with_its_probability(p):
    torch.manual_seed(0)
    flips = sum(not torch.equal(horizontal_flip(IMAGE, p), IMAGE) for _ in range(400))
    assert flips / 400 == pytest.approx(p, abs=0.06)


def test_resize_does_not_depend_on_the_memory_layout():
    rows = IMAGE.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    crop = (slice(None), slice(3, 33), slice(2, 29))
    for size in ((24, 24), (40, 13), (60, 70)):
        expected = v2.resize(IMAGE[crop].contiguous(), size, antialias=True)
        assert torch.equal(resize(IMAGE[crop], size), expected)
        resized = resize(rows[crop], size)
        assert torch.equal(resized, expected)
        assert resized.permute(1, 2, 0).is_contiguous(), "channels-last input must stay channels-last, which is fast"
