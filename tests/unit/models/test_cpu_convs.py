import copy

import pytest
import torch
from efficientnet_pytorch.utils import Conv2dStaticSamePadding
from timm.layers import Conv2dSame
from torch import nn

from fivefold.models.backbones import build_backbone
from fivefold.models.cpu_convs import (
    CHUNK_IMAGES,
    DepthwiseConv2d,
    Float32Mixin,
    MatmulGradConv2d,
    has_slow_grouped_convs,
    is_depthwise,
    run_grouped_convs_in_fp32,
    use_fast_convs,
)

WIDE_GEOMETRIES = [  # kernel, padding, size, stride, dilation
    ((3, 3), (1, 1), (7, 7), (1, 1), (1, 1)),
    ((3, 3), (0, 0), (5, 9), (2, 2), (1, 1)),
    ((1, 3), (0, 1), (6, 6), (1, 2), (1, 1)),
    ((5, 5), (2, 2), (4, 3), (1, 1), (1, 1)),
]
DEPTHWISE_GEOMETRIES = [
    ((3, 3), (1, 1), (9, 9), (1, 1), (1, 1)),
    ((5, 5), (2, 2), (7, 7), (1, 1), (1, 1)),
    ((7, 7), (3, 3), (14, 5), (1, 1), (1, 1)),
    ((5, 7), (0, 3), (6, 4), (1, 1), (1, 1)),
    ((7, 5), (6, 4), (1, 1), (1, 1), (1, 1)),
    ((5, 5), (5, 2), (6, 6), (1, 1), (1, 1)),
    ((11, 1), (5, 0), (9, 12), (1, 1), (1, 1)),
    ((4, 4), (1, 2), (9, 8), (1, 1), (1, 1)),
    ((5, 3), (2, 1), (9, 8), (2, 2), (1, 1)),
    ((5, 5), (4, 4), (9, 9), (1, 1), (2, 2)),
    ((3, 5), (0, 4), (11, 8), (2, 1), (1, 2)),
]


def compute_gradients(convolution: nn.Module, images: torch.Tensor, bf16: bool = False) -> list[torch.Tensor]:
    """Return the gradients of images, weight and bias for a fixed output gradient that bf16 represents exactly."""
    convolution, images = copy.deepcopy(convolution), images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = convolution(images)
    slope = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).sin().reshape(output.shape).bfloat16()
    output.backward(slope.to(output.dtype))
    return [images.grad, *(parameter.grad for parameter in convolution.parameters())]


def measure_errors(convolution: nn.Conv2d, images: torch.Tensor, bf16: bool) -> list[tuple[float, float]]:
    """Return for each gradient the relative errors of the fast and the torch convolution against float64."""
    (fast,) = use_fast_convs(nn.Sequential(copy.deepcopy(convolution)), amx=True)
    assert type(fast) is (DepthwiseConv2d if convolution.groups > 1 else MatmulGradConv2d)
    exact_gradients = compute_gradients(copy.deepcopy(convolution).double(), images.double())
    fast_gradients, torch_gradients = (compute_gradients(module, images, bf16) for module in (fast, convolution))
    return [
        tuple(float((gradient.double() - exact_gradient).norm() / exact_gradient.norm()) for gradient in pair)
        for *pair, exact_gradient in zip(fast_gradients, torch_gradients, exact_gradients, strict=True)
    ]


def make_convolution(geometry: tuple, channels: int, groups: int, count: int) -> tuple[nn.Conv2d, torch.Tensor]:
    kernel, padding, size, stride, dilation = geometry
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups, bias=count == 3)
    for parameter in convolution.parameters():
        parameter.data = parameter.data.bfloat16().float()  # exact in both data types
    images = torch.randn(count, channels, *size).bfloat16().float()
    return convolution.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("geometry", "channels", "groups", "count"),
    [
        *((geometry, 128, 1, 3) for geometry in WIDE_GEOMETRIES),
        *((geometry, 16, 16, 3) for geometry in DEPTHWISE_GEOMETRIES),
        *((DEPTHWISE_GEOMETRIES[2], n, n, count) for n, count in ((2, 1), (17, CHUNK_IMAGES), (32, CHUNK_IMAGES + 3))),
    ],
    ids=str,
)
def test_gradients_match_torch_within_the_precision(geometry, channels, groups, count):
    convolution, images = make_convolution(geometry, channels, groups, count)
    for fast_error, torch_error in measure_errors(convolution, images, bf16=True):
        assert fast_error < 5e-3, "of the order of one rounding to 8 bits"
        assert fast_error < 1.5 * torch_error + 1e-3
    assert all(fast_error < 2e-6 for fast_error, _ in measure_errors(convolution, images, bf16=False))


@pytest.mark.parametrize(("channels", "groups"), [(128, 1), (8, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_frozen_weights_and_images_get_no_gradient(stride, channels, groups):
    (fast,) = use_fast_convs(nn.Sequential(nn.Conv2d(channels, channels, 5, stride, 2, groups=groups)), amx=True)
    for trainable in (True, False):
        images = torch.randn(2, channels, 6, 6, requires_grad=not trainable)
        fast.zero_grad()
        fast.requires_grad_(trainable)
        with torch.autocast("cpu", torch.bfloat16):
            fast(images).sum().backward()
        assert ((images.grad is None), (fast.weight.grad is None)) == (trainable, not trainable)


@pytest.mark.parametrize(
    ("arguments", "depthwise"),
    [
        ({"groups": 8}, True),
        ({"groups": 8, "padding": 5, "stride": 2, "dilation": 2}, True),
        ({"groups": 8, "padding": "same"}, False),
        ({"groups": 8, "padding": 2, "padding_mode": "reflect"}, False),
        ({"groups": 8, "out_channels": 16}, False),
        ({"groups": 4}, False),
        ({"in_channels": 128, "out_channels": 128, "dilation": 2}, False),
        ({"in_channels": 128, "out_channels": 128, "kernel_size": 1}, False),
        ({"in_channels": 64, "out_channels": 256}, False),
    ],
)
def test_unsupported_convolutions_stay_unchanged(arguments, depthwise):
    convolution = nn.Conv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 5} | arguments)
    assert is_depthwise(convolution) is depthwise
    (converted,) = use_fast_convs(nn.Sequential(convolution), amx=True)
    assert type(converted) is (DepthwiseConv2d if depthwise else nn.Conv2d)


def test_wide_convolution_without_autocast_or_on_large_maps_is_plain():
    plain = nn.Conv2d(128, 128, 3, padding=1)
    (fast,) = use_fast_convs(nn.Sequential(copy.deepcopy(plain)), amx=True)
    for size, bf16 in ((4, False), (9, True)):
        images = torch.randn(2, 128, size, size)
        gradients = (compute_gradients(network, images, bf16) for network in (fast, plain))
        assert all(torch.equal(actual, expected) for actual, expected in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "size", "kind", "count"),
    [("timm/convnext_atto", 64, DepthwiseConv2d, 12), ("fivefold/small_net", 32, MatmulGradConv2d, 3)],
)
def test_network_keeps_names_parameters_outputs_and_predictions(name, size, kind, count):
    torch.manual_seed(0)
    network = build_backbone(name, {})
    before = list(network.parameters())
    converted = use_fast_convs(use_fast_convs(copy.deepcopy(network), amx=True), amx=True)
    kinds = [type(module) for module in converted.modules()]
    assert kinds.count(kind) == count
    assert list(converted.state_dict()) == list(network.state_dict())
    assert [type(module) for module in copy.deepcopy(converted).modules()] == kinds
    after = use_fast_convs(network, amx=False).parameters()
    assert all(parameter is original for parameter, original in zip(after, before, strict=True))
    images = torch.randn(2, 3, size, size)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert torch.equal(converted.train()(images), network.train()(images)), "the forward pass is torch's"
            with torch.inference_mode():
                assert torch.equal(converted.eval()(images), network.eval()(images))


GROUPED_CONVOLUTIONS = {
    "torch's": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "two groups": lambda: nn.Conv2d(8, 16, 3, stride=2, groups=2),
    "timm's same": lambda: Conv2dSame(8, 8, 3, stride=2, groups=8),
    "efficientnet_pytorch's same": lambda: Conv2dStaticSamePadding(8, 8, 5, image_size=9, stride=2, groups=8),
}


@pytest.mark.parametrize("kind", GROUPED_CONVOLUTIONS)
def test_grouped_convolutions_in_float32_match_torch_within_rounding(kind):
    torch.manual_seed(0)
    plain = GROUPED_CONVOLUTIONS[kind]()
    images = torch.randn(4, 8, 9, 9).bfloat16().float().contiguous(memory_format=torch.channels_last)
    float32 = run_grouped_convs_in_fp32(nn.Sequential(copy.deepcopy(plain)))[0]
    assert isinstance(float32, Float32Mixin)
    assert torch.equal(float32.eval()(images), plain(images)), "without autocast"
    with torch.autocast("cpu", torch.bfloat16):
        output = float32(images)
    assert torch.equal(output, plain(images).bfloat16())
    gradients = compute_gradients(float32, images, True), compute_gradients(plain, images)
    for actual, expected in zip(*gradients, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 1e-6


def test_grouped_convolutions_keep_parameters_and_fast_bf16_ones_stay_unchanged():
    fast = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 5, 2, groups=8))
    assert not has_slow_grouped_convs(fast)
    assert not has_slow_grouped_convs(use_fast_convs(fast, amx=False))
    assert not any(isinstance(module, Float32Mixin) for module in run_grouped_convs_in_fp32(fast))
    network = build_backbone("timm/tf_mobilenetv3_small_075", {})
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    assert has_slow_grouped_convs(network)
    converted = run_grouped_convs_in_fp32(run_grouped_convs_in_fp32(network))
    assert {name: id(parameter) for name, parameter in converted.named_parameters()} == before
    kinds = [type(module) for module in converted.modules()]
    assert sum(issubclass(kind, Float32Mixin) for kind in kinds) == 4
    assert [type(module) for module in copy.deepcopy(converted).modules()] == kinds
