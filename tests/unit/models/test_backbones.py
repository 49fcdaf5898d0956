import copy
import errno
import os

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import Conv2dStaticSamePadding
from torch import nn

from fivefold.errors import DataError, RetryableError, SettingsError
from fivefold.models.backbones import build_backbone, count_features
from fivefold.models.classifier import Classifier, build_head
from fivefold.models.cpu_convs import DepthwiseConv2d, use_fast_convs
from fivefold.models.weights import load_matching, load_strict, read_weights, save_weights

LARGE = [
    ("torchvision/resnext50_32x4d", 64, 2048),
    ("torchvision/resnext101_32x8d", 64, 2048),
    ("torchvision/vgg19", 32, 4096),
    ("timm/caformer_b36.sail_in22k", 64, 768),
    ("efficientnet_pytorch/efficientnet-b4", 64, 1792),
    ("efficientnet_pytorch/efficientnet-b5", 64, 2048),
]


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("timm/resnet10t", 32, 512),
        ("timm/mobilenetv3_small_050", 32, 1024),
        ("torchvision/resnet18", 32, 512),
        ("torchvision/mobilenet_v3_small", 32, 1024),
        ("torchvision/convnext_tiny", 32, 768),
        ("efficientnet_pytorch/efficientnet-b0", 32, 1280),
        ("torchvision/resnet34", 32, 512),
        ("timm/efficientnet_b5", 32, 2048),
        ("efficientnet_pytorch/efficientnet-b3", 32, 1536),
        ("fivefold/small_net", 32, 256),
        ("fivefold/base_model", 32, 128),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE),
    ],
)
def test_backbones_of_every_family_give_features(name, size, features):
    backbone = build_backbone(name, False, {})
    assert count_features(backbone, (size, size)) == features
    assert backbone.training
    network = Classifier(backbone, build_head("linear", features, 7, 0.1)).eval()
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "names no family"),
        ("tim/resnet18", "did you mean 'timm'"),
        ("timm/resnet1888", "did you mean"),
        ("torchvision/resnet19", "did you mean 'resnet1"),
        ("efficientnet_pytorch/efficientnet-b99", "did you mean 'efficientnet-b"),
        ("fivefold/no", "unknown fivefold backbone"),
    ],
)
def test_unknown_names_are_explained(name, message):
    with pytest.raises(SettingsError, match=message):
        build_backbone(name, False, {})


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("timm/resnet18", lambda net: max(getattr(m, "drop_prob", 0.0) or 0.0 for m in net.modules())),
        ("torchvision/convnext_tiny", lambda net: max(getattr(m, "p", 0.0) for m in net.modules())),
        ("efficientnet_pytorch/efficientnet-b0", lambda net: net._global_params.drop_connect_rate),
    ],
)
def test_stochastic_depth_has_one_name_in_all_families_and_unknown_options_are_refused(name, share):
    with pytest.raises(SettingsError, match="no_such_option"):
        build_backbone(name, False, {"no_such_option": 1})
    assert share(build_backbone(name, False, {}, drop_path=0.3)) == pytest.approx(0.3)
    assert share(build_backbone(name, False, {})) < 0.3
    assert share(build_backbone(name, False, {}, drop_path=0.0)) == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [("fivefold/small_net", "for drop_path 'fivefold'"), ("torchvision/resnet18", "stochastic_depth_prob")],
)
def test_stochastic_depth_of_a_network_without_it_is_refused(name, message):
    with pytest.raises(SettingsError, match=message):
        build_backbone(name, False, {}, drop_path=0.1)


def test_a_bare_backbone_gives_what_comes_out_of_the_pooling():
    bare = build_backbone("torchvision/convnext_tiny", False, {"bare": True}).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(bare(images), bare.features(images).mean(dim=(2, 3)))
    assert bare(images).shape == (2, 768)
    with pytest.raises(SettingsError, match="nothing before its last layer"):
        build_backbone("torchvision/resnet18", False, {"bare": True})


def test_the_base_model_has_the_mask_systems_layers():
    with pytest.raises(SettingsError, match="no_such_option"):
        build_backbone("fivefold/base_model", False, {"no_such_option": 1})
    network = build_backbone("fivefold/base_model", False, {})
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    shapes = [(m.in_channels, m.out_channels, *m.kernel_size) for m in convolutions]
    assert shapes == [(3, 32, 7, 7), (32, 64, 3, 3), (64, 128, 3, 3)]
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    # Without padding: 40 - 6 - 2 = 32, halved, 16 - 2 = 14, halved.
    assert network[:-2](torch.zeros(1, 3, 40, 40)).shape == (1, 128, 7, 7)


def test_a_size_that_the_backbone_cannot_take_is_a_setting():
    with pytest.raises(SettingsError, match="images of 40x40"):
        count_features(build_backbone("timm/vit_tiny_patch16_224", False, {}), (40, 40))


def test_pretrained_weights_without_a_network_name_the_way_out(monkeypatch, tmp_path):
    # An address that refuses every connection, in place of the hub.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(RetryableError, match=r"model\.weights=PATH"):
        build_backbone("torchvision/resnet18", True, {})


def test_weights_come_back_as_they_were_saved(tmp_path):
    network, other = (
        Classifier(build_backbone("timm/resnet10t", False, {}), build_head("linear", 512, 3, 0.0)) for _ in range(2)
    )
    (tmp_path / "plain").touch()
    save_weights(tmp_path / "model.safetensors", network.state_dict())
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it"
    load_strict(other, tmp_path / "model.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    start = build_backbone("timm/resnet10t", False, {})
    load_matching(start, tmp_path / "model.safetensors")
    assert torch.equal(start.state_dict()["conv1.0.weight"], network.backbone.state_dict()["conv1.0.weight"])


def test_weights_of_another_network_are_not_ours(tmp_path):
    save_weights(tmp_path / "other.safetensors", nn.Linear(3, 3).state_dict())
    with pytest.raises(DataError, match=r"model\.json"):
        load_strict(nn.Linear(4, 3), tmp_path / "other.safetensors")


@pytest.mark.parametrize("size", [64, 45])
def test_efficientnet_pytorch_pads_inside_its_convolutions_and_gives_the_same(size):
    torch.manual_seed(0)
    theirs = EfficientNet.from_name("efficientnet-b0")
    theirs._fc = nn.Identity()
    torch.manual_seed(0)
    ours = build_backbone("efficientnet_pytorch/efficientnet-b0", False, {})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    padded = [name for name, module in ours.named_modules() if isinstance(module, Conv2dStaticSamePadding)]
    strided = [name for name, module in ours.named_modules() if getattr(module, "stride", None) in ((2, 2), [2, 2])]
    assert padded == strided
    assert len(padded) == 5
    quick = [
        each for each in use_fast_convs(copy.deepcopy(ours), amx=False).modules() if isinstance(each, DepthwiseConv2d)
    ]
    assert [each.stride for each in quick] == [(1, 1)] * 12
    images = torch.randn(4, 3, size, size)
    found = []
    for network in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        features = network(images)
        features.square().sum().backward()
        found.append([features.detach(), *(each.grad for each in network.parameters() if each.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-6)


def test_weights_are_written_where_the_file_system_knows_no_modes(tmp_path, monkeypatch):
    for number in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "chmod", refuse)
            save_weights(tmp_path / "w.safetensors", nn.Linear(3, 3).state_dict())
        assert set(read_weights(tmp_path / "w.safetensors")) == {"weight", "bias"}
