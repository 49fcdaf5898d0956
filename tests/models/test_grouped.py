"""Grouped convolutions in float32 under bf16 autocast: the gradients of float32 within its rounding, the curve of float32, the same names."""

import copy

import pytest
import torch
from efficientnet_pytorch.utils import Conv2dStaticSamePadding
from timm.layers import Conv2dSame
from torch import nn

from fivefold.inference.predictor import make_runtime
from fivefold.models.backbones import build_backbone
from fivefold.models.depthwise import quicken_depthwise
from fivefold.models.grouped import InFloat32, groups_in_float32, has_slow_groups
from fivefold.training.losses import cross_entropy
from fivefold.training.objectives import Rows, supervised
from fivefold.training.optim import build_optimizer
from fivefold.training.updates import plain

CONVOLUTIONS = {
    "torch's": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "two groups": lambda: nn.Conv2d(8, 16, 3, stride=2, groups=2),
    "timm's same": lambda: Conv2dSame(8, 8, 3, stride=2, groups=8),
    "efficientnet_pytorch's same": lambda: Conv2dStaticSamePadding(8, 8, 5, image_size=9, stride=2, groups=8),
}


def gradients(convolution: nn.Conv2d, images: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    """Output, and the gradients of images, weight and bias under a gradient of the output that bf16 can hold."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = convolution(images)
    found.backward(torch.linspace(-1, 1, found.numel()).reshape(found.shape).bfloat16().to(found.dtype))
    return [found.detach(), images.grad, convolution.weight.grad, convolution.bias.grad]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_output_is_float32s_and_so_are_the_gradients_within_its_rounding(kind):
    torch.manual_seed(0)
    plain_one = CONVOLUTIONS[kind]()
    images = torch.randn(4, 8, 9, 9).bfloat16().float().contiguous(memory_format=torch.channels_last)
    own = groups_in_float32(nn.Sequential(copy.deepcopy(plain_one)))[0]
    assert isinstance(own, InFloat32)
    expected = gradients(plain_one, images, bf16=False)
    found = gradients(own, images, bf16=True)
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], expected[0].bfloat16())
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_without_autocast_it_is_the_convolution_itself():
    torch.manual_seed(0)
    plain_one, images = nn.Conv2d(8, 8, 3, groups=4), torch.randn(2, 8, 6, 6)
    own = groups_in_float32(copy.deepcopy(plain_one))
    assert own(images).dtype == torch.float32
    for ours, theirs in zip(gradients(own, images, False), gradients(plain_one, images, False), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    assert torch.equal(own.eval()(images), plain_one(images))


def test_depthwise_ones_that_are_quick_in_bf16_stay():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 5, 2, groups=8))
    for each in (network, quicken_depthwise(copy.deepcopy(network))):
        assert not has_slow_groups(each)
        assert not any(isinstance(module, InFloat32) for module in groups_in_float32(each))


def test_names_parameters_and_all_else_stay_and_it_can_be_done_twice():
    network = build_backbone("timm/tf_mobilenetv3_small_075", False, {})
    before = dict(network.named_parameters())
    names, classes = list(network.state_dict()), [type(module) for module in network.modules()]
    assert has_slow_groups(network)
    assert not has_slow_groups(build_backbone("timm/resnet10t", False, {}))
    changed = groups_in_float32(groups_in_float32(network))
    assert list(changed.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in changed.named_parameters())
    kinds = [type(module) for module in changed.modules()]
    differing = [(new, old) for new, old in zip(kinds, classes, strict=True) if new is not old]
    assert len(differing) == 4
    assert all(new.__mro__[1:3] == (InFloat32, old) for new, old in differing)
    copied = copy.deepcopy(changed)
    assert [type(module) for module in copied.modules()] == kinds
    assert not {id(parameter) for parameter in copied.parameters()} & {id(each) for each in before.values()}


def curve(network: nn.Module, precision: str, steps: int = 12) -> list[float]:
    """The losses of a short training on the same drawn batches."""
    dtype = None if precision == "fp32" else torch.bfloat16
    runtime = make_runtime(torch.device("cpu"), dtype, True, [0.5] * 3, [0.5] * 3, grouped_fp32="grouped" in precision)
    model = runtime.place(copy.deepcopy(network)).train()
    optimizer = build_optimizer("sgd", model, 0.05, 0.0, 0.9)
    update = plain(model, supervised(cross_entropy(0.0)), optimizer, runtime, clip=1.0)
    drawn, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        codes = torch.randint(0, 3, (12,), generator=drawn)
        images = torch.randn(12, 3, 32, 32, generator=drawn) + codes[:, None, None, None]
        losses += [result.loss.item() for result in update([Rows(images, nn.functional.one_hot(codes, 3).float())])]
    return losses


def test_the_loss_curve_is_float32s_within_the_rounding_of_bf16():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 5, 1, 2, groups=16), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    exact, remedied, half = (torch.tensor(curve(network, name)) for name in ("fp32", "bf16_grouped_fp32", "bf16"))
    assert exact[-1] < exact[0] / 2, "it learns"
    assert not torch.equal(remedied, half), "the convolutions run in another precision"
    assert float((remedied - exact).abs().max()) <= max(2 * float((half - exact).abs().max()), 0.01)
    assert float((remedied - exact).abs().max()) < 0.03
