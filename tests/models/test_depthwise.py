"""The quick gradients of depthwise convolutions are torch's own, for every geometry and type, and training is otherwise as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fivefold.models.backbones import build_backbone
from fivefold.models.depthwise import IMAGES_AT_ONCE, Depthwise, DepthwiseConv2d, may_gain, quicken_depthwise

GEOMETRIES = [  # kernel, padding, size, stride, dilation
    ((3, 3), (1, 1), (9, 9), (1, 1), (1, 1)),
    ((5, 5), (2, 2), (7, 7), (1, 1), (1, 1)),
    ((7, 7), (3, 3), (14, 5), (1, 1), (1, 1)),
    ((7, 7), (3, 3), (20, 20), (1, 1), (1, 1)),
    ((5, 7), (0, 3), (6, 4), (1, 1), (1, 1)),
    ((5, 5), (4, 1), (5, 16), (1, 1), (1, 1)),
    ((7, 5), (6, 4), (1, 1), (1, 1), (1, 1)),
    ((5, 5), (5, 2), (6, 6), (1, 1), (1, 1)),
    ((1, 11), (0, 5), (9, 12), (1, 1), (1, 1)),
    ((11, 1), (5, 0), (9, 12), (1, 1), (1, 1)),
    ((4, 4), (1, 2), (9, 8), (1, 1), (1, 1)),
    ((5, 3), (2, 1), (9, 8), (2, 2), (1, 1)),
    ((7, 7), (3, 3), (15, 15), (4, 4), (1, 1)),
    ((5, 5), (4, 4), (9, 9), (1, 1), (2, 2)),
    ((3, 5), (0, 4), (11, 8), (2, 1), (1, 2)),
]


def errors(geometry, dtype, bias: bool, channels: int = 6, count: int = 3) -> list[tuple[float, float]]:
    """Of each gradient the relative error of ours and of torch's own in `dtype`, against float64 of the same numbers."""
    kernel, padding, size, stride, dilation = geometry
    torch.manual_seed(0)
    images = torch.randn(count, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    given = [images, torch.randn(channels, 1, *kernel).to(dtype)]
    given += [torch.randn(channels).to(dtype)] if bias else []
    slope = None
    gradients = []
    for convolve, kind in ((Depthwise.apply, dtype), (F.conv2d, dtype), (F.conv2d, torch.float64)):
        leaves = [each.detach().to(kind).requires_grad_() for each in given]
        rest = (stride, padding, dilation, *([channels] if convolve is F.conv2d else []))
        found = convolve(leaves[0], leaves[1], leaves[2] if bias else None, *rest)
        slope = torch.randn(found.shape).to(dtype) if slope is None else slope
        found.backward(slope.to(kind))
        gradients.append([leaf.grad for leaf in leaves])
    assert all(one.dtype == dtype for one in gradients[0])
    return [
        tuple(float((one.double() - exact).norm() / exact.norm()) for one in (ours, theirs))
        for ours, theirs, exact in zip(*gradients, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_all_gradients_are_torchs_own_within_rounding(geometry, bias, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert all(ours < tolerance for ours, _ in errors(geometry, dtype, bias))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_in_bf16_they_are_as_exact_as_torchs_own(geometry):
    for ours, theirs in errors(geometry, torch.bfloat16, bias=True, channels=16):
        assert ours < 5e-3, "of the order of one rounding to 8 bits"
        assert ours < 1.5 * theirs + 1e-3


@pytest.mark.parametrize("count", [1, IMAGES_AT_ONCE, 2 * IMAGES_AT_ONCE + 3])
@pytest.mark.parametrize("channels", [2, 17, 32])
def test_any_number_of_images_and_channels(count, channels):
    geometry = ((7, 7), (3, 3), (10, 10), (1, 1), (1, 1))
    assert all(ours < 2e-6 for ours, _ in errors(geometry, torch.float32, True, channels, count))
    assert all(ours < 5e-3 for ours, _ in errors(geometry, torch.bfloat16, True, channels, count))


def test_frozen_weights_get_no_gradient_nor_do_images_that_need_none():
    images, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 1, 5, 5)
    for stride in ((1, 1), (2, 2)):
        for learns in (images, weight):
            one, other = images.detach(), weight.detach()
            (one if learns is images else other).requires_grad_()
            Depthwise.apply(one, other, None, stride, (2, 2), (1, 1)).sum().backward()
            assert (one.grad is None, other.grad is None) == (learns is weight, learns is images)


@pytest.mark.parametrize(
    ("arguments", "gains"),
    [
        ({}, True),
        ({"padding": 2}, True),
        ({"stride": 2}, True),
        ({"dilation": 2}, True),
        ({"padding": 5}, True),
        ({"padding": "same"}, False),
        ({"padding": 2, "padding_mode": "reflect"}, False),
        ({"groups": 4}, False),
    ],
)
def test_other_kinds_are_left_to_torch(arguments, gains):
    convolution = nn.Conv2d(8, 8, 5, **{"groups": 8} | arguments)
    assert may_gain(convolution) is gains
    assert isinstance(quicken_depthwise(nn.Sequential(convolution))[0], DepthwiseConv2d) is gains
    assert not may_gain(nn.Conv2d(8, 16, 5, groups=8))
    assert not may_gain(nn.Conv2d(1, 1, 5))


def test_a_network_keeps_names_parameters_outputs_and_predictions():
    torch.manual_seed(0)
    network = build_backbone("timm/convnext_atto", False, {})
    changed = quicken_depthwise(quicken_depthwise(copy.deepcopy(network)))
    assert sum(type(module) is DepthwiseConv2d for module in changed.modules()) == 12
    assert list(changed.state_dict()) == list(network.state_dict())
    assert [type(module) for module in copy.deepcopy(changed).modules()] == [type(each) for each in changed.modules()]
    images = torch.randn(2, 3, 64, 64)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert torch.equal(changed.train()(images), network.train()(images)), "the forward pass is torch's"
            with torch.inference_mode():
                assert torch.equal(changed.eval()(images), network.eval()(images))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_network_has_torchs_gradients(bf16):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 7, 1, 3, groups=24), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 144, 2)
    )
    images, slope = torch.randn(20, 3, 12, 12), torch.randn(20, 2)

    def gradient(model: nn.Module, autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = model(images)
        found.float().backward(slope)
        return torch.cat([each.grad.flatten() for each in model.parameters()])

    exact, theirs = gradient(copy.deepcopy(network), False), gradient(copy.deepcopy(network), bf16)
    ours = gradient(quicken_depthwise(copy.deepcopy(network)), bf16)
    away = [float((each - exact).norm() / exact.norm()) for each in (ours, theirs)]
    assert away[0] < 1.2 * away[1] + 1e-6
    assert torch.equal(ours, gradient(quicken_depthwise(copy.deepcopy(network)), bf16)), "twice the same"


def curve(model: nn.Module, bf16: bool, steps: int = 15) -> torch.Tensor:
    """The losses of a short training by SGD on the same drawn batches."""
    optimizer, drawn, losses = torch.optim.SGD(model.parameters(), 0.05, 0.9), torch.Generator().manual_seed(1), []
    for _ in range(steps):
        codes = torch.randint(0, 3, (20,), generator=drawn)
        images = torch.randn(20, 3, 24, 24, generator=drawn) + codes[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images).float(), codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_the_loss_curve_is_torchs():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 48, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 7, 1, 3, groups=48), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 48, 5, 2, 2, groups=48), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3, 1, 1, groups=48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip
    exact, half = (curve(copy.deepcopy(network), bf16) for bf16 in (False, True))
    ours, ours_half = (curve(quicken_depthwise(copy.deepcopy(network)), bf16) for bf16 in (False, True))
    assert exact[-1] < exact[0] / 2, "it learns"
    assert float((ours - exact).abs().max()) < 1e-4
    assert not torch.equal(ours_half, half), "the gradients come of other kernels"
    assert float((ours_half - exact).abs().max()) <= max(2 * float((half - exact).abs().max()), 0.01)
