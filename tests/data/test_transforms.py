import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from fivefold.data.transforms import TRANSFORMS, build_transforms, horizontal_flip, random_resized_crop, resize
from fivefold.errors import SettingsError

IMAGE = torch.randint(0, 256, (3, 40, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PARAMETERS = {"perspective": {"p": 1.0}, "affine": {"degrees": 10, "translate": [0.1, 0.1]}}


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_every_transform_gives_an_image_of_the_size_and_repeats_by_seed(name):
    transform = build_transforms([{"name": name, **PARAMETERS.get(name, {})}], (24, 32))
    torch.manual_seed(3)
    first = transform(IMAGE)
    torch.manual_seed(3)
    again = transform(IMAGE)
    assert first.shape == (3, 24, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)


def test_resize_is_torchvisions():
    assert torch.equal(resize(IMAGE, (17, 23)), v2.resize(IMAGE, [17, 23], antialias=True))


def test_flip_with_certainty_mirrors_and_twice_is_the_identity():
    assert torch.equal(horizontal_flip(IMAGE, 1.0), v2.horizontal_flip(IMAGE))
    assert torch.equal(horizontal_flip(horizontal_flip(IMAGE, 1.0), 1.0), IMAGE)
    assert torch.equal(horizontal_flip(IMAGE, 0.0), IMAGE)


def test_a_crop_of_everything_is_a_resize():
    whole = random_resized_crop(IMAGE, (20, 15), scale=(1.0, 1.0), ratio=(30 / 40, 30 / 40))
    assert torch.equal(whole, resize(IMAGE, (20, 15)))


def test_a_random_crop_moves_the_image_by_at_most_its_padding():
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
        ({"name": "random_crop", "pad": 4}, "no parameter 'pad'"),
        ({"name": "rotation", "angle": 4}, "rotation"),
        ({}, "unknown transform ''"),
    ],
)
def test_what_does_not_exist_is_explained(spec, message):
    with pytest.raises(SettingsError, match=message):
        build_transforms([spec], (8, 8))


def test_the_scale_of_a_random_resized_crop_is_kept():
    blocks = torch.zeros(3, 100, 100, dtype=torch.uint8)
    blocks[:, :50] = 255
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        shares.append(random_resized_crop(blocks, (10, 10), scale=(0.25, 0.5), ratio=(1, 1)).float().mean() / 255)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.std(shares) > 0.1
