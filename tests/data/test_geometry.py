"""What a chain of transforms shows, as numbers: drawn as the transforms draw, and refused where it is no geometry."""

import numpy as np
import pytest
import torch

from fivefold.data.geometry import Sight, obstacle, sight_of
from fivefold.data.transforms import build_transforms

CHAINS = {
    "nothing": [],
    "crop and flip": [{"name": "random_resized_crop", "scale": [0.3, 1.0]}, "horizontal_flip"],
    "flip and crop": ["horizontal_flip", {"name": "random_resized_crop", "scale": [0.2, 0.9]}, "horizontal_flip"],
    "no box fits": [{"name": "random_resized_crop", "scale": [0.99, 1.0], "ratio": [3, 4]}],
    "at times": [{"name": "random_resized_crop", "p": 0.5}, {"name": "horizontal_flip", "p": 0.3}],
    "centre": [{"name": "centre_crop", "share": 0.8, "p": 0.7}, "horizontal_flip"],
    "reflected": [{"name": "random_crop", "padding": 4, "mode": "reflect"}, "horizontal_flip"],
    "black": ["horizontal_flip", {"name": "random_crop", "padding": 6, "mode": "constant"}],
    "repeated": ["resize", {"name": "random_crop", "padding": 5, "mode": "replicate", "p": 0.8}],
    "twice": ["random_crop", "horizontal_flip", {"name": "random_crop", "padding": 3, "mode": "constant"}],
    "all": ["horizontal_flip", "random_resized_crop", "horizontal_flip", "random_crop", "resize"],
}
NOT_GEOMETRY = {
    "RandomVerticalFlip": ["vertical_flip"],
    "ColorJitter": ["random_resized_crop", {"name": "color_jitter", "brightness": 0.1}],
    "gaussian_noise": ["random_resized_crop", {"name": "gaussian_noise", "p": 0.1}],
    "shift_scale_rotate": ["shift_scale_rotate"],
    "random_resized_crop": ["resize", "random_resized_crop"],
    "centre_crop_resize": [{"name": "random_resized_crop", "p": 0.5}, "centre_crop"],
}
SIZE = (16, 24)


@pytest.mark.parametrize("name", CHAINS)
def test_as_many_numbers_are_drawn_as_the_transforms_draw(name):
    transform = build_transforms(CHAINS[name], SIZE)
    assert obstacle(transform) == ""
    for seed in range(20):
        torch.manual_seed(seed)
        transform(torch.zeros(3, 50, 40, dtype=torch.uint8))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        sight = sight_of(transform, 50, 40)
        assert torch.equal(torch.get_rng_state(), after)
        assert (len(sight.rows), len(sight.columns)) == SIZE
        assert 0 <= sight.top <= sight.top + sight.height <= 50
        assert 0 <= sight.left <= sight.left + sight.width <= 40


@pytest.mark.parametrize("name", NOT_GEOMETRY)
def test_what_is_no_geometry_or_resizes_twice_is_named(name):
    assert obstacle(build_transforms(NOT_GEOMETRY[name], SIZE)) == name


def test_a_transform_that_is_no_chain_is_named():
    assert obstacle(torch.nn.Identity()) == "Identity"


def test_a_box_of_a_mirrored_image_is_counted_from_its_other_side():
    sight = Sight(10, 20)
    sight.mirror()
    sight.crop(1, 2, 5, 6)
    assert (sight.top, sight.left, sight.height, sight.width) == (1, 12, 5, 6)
    sight.crop(1, 1, 2, 3)
    assert (sight.top, sight.left) == (2, 14)
    sight.resize((2, 4))
    assert sight.columns.tolist() == [3, 2, 1, 0]
    sight.mirror()
    assert sight.columns.tolist() == [0, 1, 2, 3]
    sight.pick(np.array([1, -1]), np.array([-1, 3]))
    assert (sight.rows.tolist(), sight.columns.tolist()) == ([1, -1], [-1, 3])
