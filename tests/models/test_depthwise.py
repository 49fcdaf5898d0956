"""The quick gradients of depthwise convolutions are torch's own, for every geometry."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fivefold.models.depthwise import Depthwise, may_gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "padding", "size"),
    [
        ((3, 3), (1, 1), (9, 9)),
        ((5, 5), (2, 2), (7, 7)),
        ((7, 7), (3, 3), (14, 5)),
        ((7, 7), (3, 3), (20, 20)),
        ((5, 7), (0, 3), (6, 4)),
        ((5, 5), (4, 1), (5, 16)),
        ((7, 5), (6, 4), (1, 1)),
    ],
)
def test_all_gradients_are_torchs_own_within_rounding(kernel, padding, size, bias, dtype):
    torch.manual_seed(0)
    images = torch.randn(3, 6, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 1, *kernel, dtype=dtype)
    given = [images, weight, *([torch.randn(6, dtype=dtype)] if bias else [])]
    ours, theirs = ([each.clone().requires_grad_() for each in given] for _ in range(2))
    found = Depthwise.apply(ours[0], ours[1], ours[2] if bias else None, padding)
    expected = F.conv2d(*theirs, stride=1, padding=padding, groups=6)
    assert torch.equal(found, expected)
    slope = torch.linspace(-1, 1, found.numel(), dtype=dtype).sin().reshape(found.shape)
    (found * slope).sum().backward()
    (expected * slope).sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for one, other in zip(ours, theirs, strict=True):
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < tolerance, one.shape


def test_frozen_weights_get_no_gradient():
    images, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 1, 5, 5)
    Depthwise.apply(images, weight, None, (2, 2)).sum().backward()
    assert weight.grad is None
    assert images.grad is not None


@pytest.mark.parametrize(
    ("arguments", "gains"),
    [
        ({}, True),
        ({"padding": 2}, True),
        ({"stride": 2}, False),
        ({"dilation": 2}, False),
        ({"padding": "same"}, False),
        ({"padding": 5}, False),
        ({"padding": 2, "padding_mode": "reflect"}, False),
        ({"groups": 4}, False),
    ],
)
def test_other_kinds_are_left_to_torch(arguments, gains):
    assert may_gain(nn.Conv2d(8, 8, 5, **{"groups": 8} | arguments)) is gains
    assert not may_gain(nn.Conv2d(8, 16, 5, groups=8))
