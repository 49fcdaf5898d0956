"""Fivefold's transforms and albumentations 2.0.8 (MIT) with equal parameters; docs/from-albumentations.md lists the differences.

Differences are in levels of 255.
"""

import numpy as np
import pytest
import torch

from fivefold.data.transforms.registry import brightness, centre_crop_pixels, horizontal_flip, remap_axes, unsharp_mask

COARSE = torch.rand(1, 3, 12, 9, generator=torch.Generator().manual_seed(0))
SMOOTH = torch.nn.functional.interpolate(COARSE, (96, 72), mode="bicubic")[0].mul(255).clamp(0, 255).to(torch.uint8)
NOISE = torch.randint(0, 256, (3, 96, 72), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = pytest.mark.parametrize("image", [SMOOTH, NOISE], ids=["smooth", "noise"])


@pytest.fixture
def albumentations(monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import checks the network for a newer version
    import albumentations

    return albumentations


def absolute_difference(actual: torch.Tensor, expected: np.ndarray) -> np.ndarray:
    assert actual.shape == expected.shape
    return np.abs(actual.numpy().astype(float) - expected)


EXACT = [
    (lambda image: horizontal_flip(image, 1.0), lambda lib: lib.HorizontalFlip(p=1), 0),
    (lambda image: brightness(image, -0.2), lambda lib: lib.RandomBrightnessContrast((-0.2, -0.2), (0, 0), p=1), 1),
    (lambda image: centre_crop_pixels(image, 96, 20), lambda lib: lib.CenterCrop(96, 20, pad_if_needed=True), 0),
    (lambda image: centre_crop_pixels(image, 120, 90), lambda lib: lib.CenterCrop(120, 90, pad_if_needed=True), 0),
]


@IMAGES
@pytest.mark.parametrize(("transform", "make_reference", "levels"), EXACT)
def test_flip_brightness_and_centre_crop_match_albumentations(albumentations, image, transform, make_reference, levels):
    expected = make_reference(albumentations)(image=image.permute(1, 2, 0).numpy())["image"].transpose(2, 0, 1)
    assert absolute_difference(transform(image), expected).max() <= levels


@IMAGES
@pytest.mark.parametrize(("amount", "threshold"), [(0.5, 10), (1.0, 10), (1.5, 10), (1.5, 25)])
def test_unsharp_mask_matches_albumentations_within_one_level(albumentations, image, amount, threshold):
    pixel = albumentations.augmentations.pixel.functional
    expected = pixel.unsharp_mask(image.permute(1, 2, 0).numpy(), 7, 1.5, amount, threshold).transpose(2, 0, 1)
    distances = absolute_difference(unsharp_mask(image, 7, 1.5, amount, threshold), expected)
    # A difference at the threshold may fall on either side of it, which changes its neighbours slightly.
    assert (distances > 1).mean() < 0.002
    assert distances.max() <= 12


@pytest.mark.parametrize("factors", [[1.25], [0.8], [0.7, 1.1, 1.0, 1.2]])
def test_grid_distortion_matches_albumentations_within_two_pixels(albumentations, factors):
    """A ramp shows the source of each pixel. Albumentations spreads a step's pixels over its ends, Fivefold over its width."""
    ramp = torch.arange(72, dtype=torch.uint8).expand(3, 96, 72).contiguous()
    ones = [1.0] * len(factors)
    geometric = albumentations.augmentations.geometric.functional
    from_x, _ = geometric.generate_grid((96, 72), [*factors, 1.0], [*ones, 1.0], len(factors))
    actual = remap_axes(ramp, torch.tensor(ones), torch.tensor(factors), 255)[0, 48].numpy().astype(float)
    inside = from_x[48] < 70
    assert inside.sum() > 50
    assert np.abs(actual - from_x[48])[inside].max() < 2
    assert np.abs(np.arange(72) - from_x[48])[inside].max() > 4
