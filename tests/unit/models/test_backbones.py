import errno
import os

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import Conv2dStaticSamePadding
from torch import nn

from fivefold.errors import DataError, SettingsError
from fivefold.models.backbones import build_backbone, count_features
from fivefold.models.classifier import Classifier, build_head
from fivefold.models.weights import load_strict, read_weights, save_weights


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("timm/resnet10t", 32, 512),
        ("torchvision/resnet18", 32, 512),
        ("torchvision/convnext_tiny", 32, 768),
        ("torchvision/vgg19", 32, 4096),
        ("efficientnet_pytorch/efficientnet-b0", 32, 1280),
        ("fivefold/small_net", 32, 256),
        ("fivefold/base_model", 32, 128),
    ],
)
def test_backbones_of_every_family_return_features(name, size, features):
    with torch.device("meta"):  # only shapes
        backbone = build_backbone(name, {})
        assert count_features(backbone, (size, size)) == features
        assert backbone.training
        network = Classifier(backbone, build_head("linear", features, 7, 0.1)).eval()
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "options", "drop_path", "message"),
    [
        ("resnet18", {}, None, "names no family"),
        ("tim/resnet18", {}, None, "did you mean 'timm'"),
        ("timm/resnet1888", {}, None, "did you mean"),
        ("torchvision/resnet19", {}, None, "did you mean 'resnet1"),
        ("efficientnet_pytorch/efficientnet-b99", {}, None, "did you mean 'efficientnet-b"),
        ("fivefold/no", {}, None, "unknown fivefold backbone"),
        ("fivefold/base_model", {"no_such_option": 1}, None, "no_such_option"),
        ("fivefold/small_net", {}, 0.1, "for drop_path 'fivefold'"),
        ("torchvision/resnet18", {}, 0.1, "stochastic_depth_prob"),
        ("torchvision/resnet18", {"bare": True}, None, "bare"),
    ],
)
def test_unknown_names_and_options_are_rejected_with_a_hint(name, options, drop_path, message):
    with torch.device("meta"), pytest.raises(SettingsError, match=message):
        build_backbone(name, options, drop_path)


@pytest.mark.parametrize(
    ("name", "get_rate"),
    [
        ("timm/resnet18", lambda net: max(getattr(m, "drop_prob", 0.0) or 0.0 for m in net.modules())),
        ("torchvision/convnext_tiny", lambda net: max(getattr(m, "p", 0.0) for m in net.modules())),
        ("efficientnet_pytorch/efficientnet-b0", lambda net: net._global_params.drop_connect_rate),
    ],
)
def test_drop_path_works_in_all_families_and_unknown_options_are_rejected(name, get_rate):
    with torch.device("meta"):
        with pytest.raises(SettingsError, match="no_such_option"):
            build_backbone(name, {"no_such_option": 1})
        rates = [get_rate(build_backbone(name, {}, drop_path=rate)) for rate in (0.3, None, 0.0)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[1] < 0.3
    assert rates[2] == 0.0


def test_base_model_has_the_layers_of_the_mask_system():
    network = build_backbone("fivefold/base_model", {})
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(32, 3, 7, 7), (64, 32, 3, 3), (128, 64, 3, 3)]
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    # Without padding: 40 - 6 - 2 = 32, halved, 16 - 2 = 14, halved.
    assert network[:-2](torch.zeros(1, 3, 40, 40)).shape == (1, 128, 7, 7)


def test_unsupported_image_size_raises_a_settings_error():
    with pytest.raises(SettingsError, match="images of 40x40"):
        count_features(build_backbone("timm/vit_tiny_patch16_224", {}), (40, 40))


def test_saved_weights_load_unchanged_and_only_into_the_same_network(tmp_path):
    network, loaded = (build_backbone("fivefold/small_net", {"widths": [8]}) for _ in range(2))
    (tmp_path / "plain").touch()
    save_weights(tmp_path / "model.safetensors", network.state_dict())
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    load_strict(loaded, tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(DataError, match=r"model\.json"):
        load_strict(nn.Linear(4, 3), tmp_path / "model.safetensors")


def test_efficientnet_pytorch_pads_in_its_convolutions_and_matches_the_original():
    torch.manual_seed(0)
    reference = EfficientNet.from_name("efficientnet-b0")
    reference._fc = nn.Identity()
    torch.manual_seed(0)
    backbone = build_backbone("efficientnet_pytorch/efficientnet-b0", {})
    assert list(backbone.state_dict()) == list(reference.state_dict())
    padded = [name for name, module in backbone.named_modules() if isinstance(module, Conv2dStaticSamePadding)]
    strided = [name for name, module in backbone.named_modules() if getattr(module, "stride", None) in ((2, 2), [2, 2])]
    assert padded == strided
    assert len(padded) == 5
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
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "chmod", refuse)
    save_weights(tmp_path / "w.safetensors", nn.Linear(3, 3).state_dict())
    assert set(read_weights(tmp_path / "w.safetensors")) == {"weight", "bias"}
