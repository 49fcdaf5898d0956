"""Ours beside albumentations 2.0.8 (MIT), with the same parameters; docs/from-albumentations.md names the differences.

Distances are in levels of 255.
"""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or the import asks the network for a newer version

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.augmentations.geometric import functional as geometric
from albumentations.augmentations.pixel import functional as pixel

from fivefold.data.transforms.functional import brightness, centre_crop_pixels, remap_axes, unsharp_mask
from fivefold.data.transforms.registry import horizontal_flip

COARSE = torch.rand(1, 3, 12, 9, generator=torch.Generator().manual_seed(0))
SMOOTH = torch.nn.functional.interpolate(COARSE, (96, 72), mode="bicubic")[0].mul(255).clamp(0, 255).to(torch.uint8)
NOISE = torch.randint(0, 256, (3, 96, 72), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = pytest.mark.parametrize("image", [SMOOTH, NOISE], ids=["smooth", "noise"])


def theirs(transform: A.BasicTransform, image: torch.Tensor) -> np.ndarray:
    """The image [3, H, W] as albumentations changes it."""
    return transform(image=image.permute(1, 2, 0).numpy())["image"].transpose(2, 0, 1)


def distance(ours: torch.Tensor, other: np.ndarray) -> np.ndarray:
    assert ours.shape == other.shape
    return np.abs(ours.numpy().astype(float) - other)


EXACT = [
    (lambda image: horizontal_flip(image, 1.0), A.HorizontalFlip(p=1), 0),
    (lambda image: brightness(image, -0.2), A.RandomBrightnessContrast((-0.2, -0.2), (0, 0), p=1), 1),
    (lambda image: brightness(image, 0.2), A.RandomBrightnessContrast((0.2, 0.2), (0, 0), p=1), 1),
    (lambda image: centre_crop_pixels(image, 96, 20), A.CenterCrop(96, 20, pad_if_needed=True), 0),
    (lambda image: centre_crop_pixels(image, 120, 90), A.CenterCrop(120, 90, pad_if_needed=True), 0),
]


@IMAGES
@pytest.mark.parametrize(("ours", "other", "levels"), EXACT)
def test_flip_fixed_brightness_and_centre_crop_are_equal(image, ours, other, levels):
    assert distance(ours(image), theirs(other, image)).max() <= levels


@IMAGES
@pytest.mark.parametrize(("amount", "threshold"), [(0.5, 10), (1.0, 10), (1.5, 10), (1.5, 25)])
def test_unsharp_mask_is_within_a_level(image, amount, threshold):
    found = pixel.unsharp_mask(image.permute(1, 2, 0).numpy(), 7, 1.5, amount, threshold).transpose(2, 0, 1)
    away = distance(unsharp_mask(image, 7, 1.5, amount, threshold), found)
    # A difference just at the threshold may fall on either side of it, and moves its neighbours a little.
    assert (away > 1).mean() < 0.002
    assert away.max() <= 12


@pytest.mark.parametrize("factors", [[1.25], [0.8], [0.7, 1.1, 1.0, 1.2]])
def test_grid_distortion_reads_a_given_grid_within_two_pixels(factors):
    """A ramp shows where each pixel comes from. Theirs lays a step's pixels over its ends, ours over its width."""
    ramp = torch.arange(72, dtype=torch.uint8).expand(3, 96, 72).contiguous()
    ones = [1.0] * len(factors)
    from_x, _ = geometric.generate_grid((96, 72), [*factors, 1.0], [*ones, 1.0], len(factors))
    ours = remap_axes(ramp, torch.tensor(ones), torch.tensor(factors), 255)[0, 48].numpy().astype(float)
    inside = from_x[48] < 70
    assert inside.sum() > 50
    assert np.abs(ours - from_x[48])[inside].max() < 2
    assert np.abs(np.arange(72) - from_x[48])[inside].max() > 4
