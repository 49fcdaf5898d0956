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
from fivefold.models.weights import load_strict, read_weights, save_weights


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("timm/resnet10t", 32, 512),
        ("timm/efficientnet_b5", 32, 2048),
        ("torchvision/resnet18", 32, 512),
        ("torchvision/mobilenet_v3_small", 32, 1024),
        ("torchvision/convnext_tiny", 32, 768),
        ("torchvision/resnext101_32x8d", 64, 2048),
        ("torchvision/vgg19", 32, 4096),
        ("efficientnet_pytorch/efficientnet-b0", 32, 1280),
        ("efficientnet_pytorch/efficientnet-b5", 64, 2048),
        ("fivefold/small_net", 32, 256),
        ("fivefold/base_model", 32, 128),
    ],
)
def test_backbones_of_every_family_return_features(name, size, features):
    with torch.device("meta"):  # only shapes
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
def test_unknown_backbone_names_are_rejected_with_a_hint(name, message):
    with pytest.raises(SettingsError, match=message):
        build_backbone(name, False, {})


@pytest.mark.parametrize(
    ("name", "get_rate"),
    [
        ("timm/resnet18", lambda net: max(getattr(m, "drop_prob", 0.0) or 0.0 for m in net.modules())),
        ("torchvision/convnext_tiny", lambda net: max(getattr(m, "p", 0.0) for m in net.modules())),
        ("efficientnet_pytorch/efficientnet-b0", lambda net: net._global_params.drop_connect_rate),
    ],
)
def test_drop_path_works_in_all_families_and_unknown_options_are_rejected(name, get_rate):
    with pytest.raises(SettingsError, match="no_such_option"):
        build_backbone(name, False, {"no_such_option": 1})
    with torch.device("meta"):
        rates = [get_rate(build_backbone(name, False, {}, drop_path=rate)) for rate in (0.3, None, 0.0)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[1] < 0.3
    assert rates[2] == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [("fivefold/small_net", "for drop_path 'fivefold'"), ("torchvision/resnet18", "stochastic_depth_prob")],
)
def test_drop_path_is_rejected_by_networks_without_stochastic_depth(name, message):
    with pytest.raises(SettingsError, match=message):
        build_backbone(name, False, {}, drop_path=0.1)


def test_bare_is_rejected_by_networks_with_nothing_before_their_last_layer():
    with torch.device("meta"), pytest.raises(SettingsError, match="bare"):
        build_backbone("torchvision/resnet18", False, {"bare": True})


def test_base_model_has_the_layers_of_the_mask_system():
    with pytest.raises(SettingsError, match="no_such_option"):
        build_backbone("fivefold/base_model", False, {"no_such_option": 1})
    network = build_backbone("fivefold/base_model", False, {})
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    shapes = [(m.in_channels, m.out_channels, *m.kernel_size) for m in convolutions]
    assert shapes == [(3, 32, 7, 7), (32, 64, 3, 3), (64, 128, 3, 3)]
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    # Without padding: 40 - 6 - 2 = 32, halved, 16 - 2 = 14, halved.
    assert network[:-2](torch.zeros(1, 3, 40, 40)).shape == (1, 128, 7, 7)


def test_unsupported_image_size_raises_a_settings_error():
    with pytest.raises(SettingsError, match="images of 40x40"):
        count_features(build_backbone("timm/vit_tiny_patch16_224", False, {}), (40, 40))


def test_failed_weight_download_suggests_model_weights(monkeypatch, tmp_path):
    # A proxy that refuses every connection stands in for an offline machine.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(RetryableError, match=r"model\.weights=PATH"):
        build_backbone("torchvision/resnet18", True, {})


def test_saved_weights_load_unchanged(tmp_path):
    network, loaded = (
        Classifier(build_backbone("fivefold/small_net", False, {"widths": [8]}), nn.Linear(8, 3)) for _ in range(2)
    )
    (tmp_path / "plain").touch()
    save_weights(tmp_path / "model.safetensors", network.state_dict())
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    load_strict(loaded, tmp_path / "model.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_loading_weights_of_another_network_fails(tmp_path):
    save_weights(tmp_path / "other.safetensors", nn.Linear(3, 3).state_dict())
    with pytest.raises(DataError, match=r"model\.json"):
        load_strict(nn.Linear(4, 3), tmp_path / "other.safetensors")


def test_efficientnet_pytorch_pads_in_its_convolutions_and_matches_the_original():
    torch.manual_seed(0)
    reference = EfficientNet.from_name("efficientnet-b0")
    reference._fc = nn.Identity()
    torch.manual_seed(0)
    backbone = build_backbone("efficientnet_pytorch/efficientnet-b0", False, {})
    assert list(backbone.state_dict()) == list(reference.state_dict())
    padded = [name for name, module in backbone.named_modules() if isinstance(module, Conv2dStaticSamePadding)]
    strided = [name for name, module in backbone.named_modules() if getattr(module, "stride", None) in ((2, 2), [2, 2])]
    assert padded == strided
    assert len(padded) == 5
    converted = use_fast_convs(copy.deepcopy(backbone), amx=False)
    depthwise = [module for module in converted.modules() if isinstance(module, DepthwiseConv2d)]
    assert [module.stride for module in depthwise] == [(1, 1)] * 12
    images, results = torch.randn(2, 3, 45, 45), []
    for network in (backbone.train(), reference.train()):
        torch.manual_seed(1)
        features = network(images)
        features.square().sum().backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        results.append([features.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(backbone.eval()(images), reference.eval()(images), rtol=1e-5, atol=1e-6)


def test_weights_are_saved_on_file_systems_without_chmod(tmp_path, monkeypatch):
    for number in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):

        def refuse(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "chmod", refuse)
            save_weights(tmp_path / "w.safetensors", nn.Linear(3, 3).state_dict())
        assert set(read_weights(tmp_path / "w.safetensors")) == {"weight", "bias"}
