"""The weight gradient by a matrix product is the convolution's own, for every geometry."""

import copy

import pytest
import torch
from torch import nn

from fivefold.models.convolution import MatmulGradConv2d, quicken
from fivefold.models.small import SmallNet


def gradients(convolution: nn.Conv2d, images: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    """Gradients of images, weight and bias under a fixed gradient of the output."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = convolution(images)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape)
    (out.double() * weights).sum().backward()
    return [images.grad, *(parameter.grad for parameter in convolution.parameters())]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "bias"),
    [
        (3, 1, 1, (7, 7), False),
        (3, 2, 1, (8, 8), True),
        (3, 1, 0, (5, 9), True),
        ((1, 3), (1, 2), (0, 1), (6, 6), False),
        (5, 1, 2, (4, 3), False),
    ],
)
def test_gradients_are_the_convolutions_own_within_the_precision(kernel, stride, padding, size, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(128, 130, kernel, stride, padding, bias=bias).to(memory_format=torch.channels_last)
    images = torch.randn(6, 128, *size).contiguous(memory_format=torch.channels_last)
    exact = gradients(copy.deepcopy(plain).double(), images.double(), bf16=False)
    own = nn.Sequential(copy.deepcopy(plain))
    assert isinstance(quicken(own)[0], MatmulGradConv2d)
    for ours, theirs, reference in zip(
        gradients(own[0], images, bf16=True), gradients(plain, images, bf16=True), exact, strict=True
    ):
        error = [(found.double() - reference).norm() / reference.norm() for found in (ours, theirs)]
        assert error[0] < max(1.2 * error[1], 1e-7), (ours.shape, error)


def test_without_autocast_and_on_large_maps_it_is_the_plain_convolution():
    torch.manual_seed(0)
    plain = nn.Conv2d(128, 128, 3, padding=1)
    own = quicken(nn.Sequential(copy.deepcopy(plain)))[0]
    for size, bf16 in ((4, False), (9, True)):
        images = torch.randn(2, 128, size, size)
        for ours, theirs in zip(gradients(own, images, bf16), gradients(plain, images, bf16), strict=True):
            assert torch.equal(ours, theirs)
        own.zero_grad()
        plain.zero_grad()


def test_parameters_and_their_names_stay():
    network = SmallNet()
    before, names = list(network.parameters()), list(network.state_dict())
    quick = quicken(network)
    assert all(a is b for a, b in zip(before, quick.parameters(), strict=True))
    assert list(quick.state_dict()) == names
    assert sum(isinstance(module, MatmulGradConv2d) for module in quick.modules()) == 3
    copied = copy.deepcopy(quick)
    assert all(a is not b for a, b in zip(copied.parameters(), before, strict=True))


def test_what_cannot_gain_stays_as_it_is():
    kept = [
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3, groups=2),
        nn.Conv2d(128, 128, 3, dilation=2),
        nn.Conv2d(64, 256, 3),
        nn.Conv2d(128, 128, 3, padding="same"),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
    ]
    assert [type(module) for module in quicken(nn.Sequential(*kept))] == [nn.Conv2d] * len(kept)
