"""Heads against their layers as torch and torchvision write them, and by reduction."""

import pytest
import torch
from torch import nn

from fivefold.errors import SettingsError
from fivefold.models.backbones import build_backbone
from fivefold.models.classifier import Classifier, MultiSampleDropout, build_head


def kinds(head: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in head]


def test_the_linear_head_is_torchs_own_layers_with_the_same_start():
    torch.manual_seed(0)
    head = build_head("linear", 5, 3, 0.25)
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Dropout(0.25), nn.Linear(5, 3))
    assert kinds(head) == kinds(reference)
    assert head[0].p == 0.25
    for name, tensor in reference.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor)


def test_the_head_of_the_cars():
    head = build_head({"name": "mlp", "hidden": 512, "norm": "batch", "dropout": 0.3}, 2048 + 3, 396, 0.0)
    assert kinds(head) == ["Dropout", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert (head[0].p, head[1].in_features, head[1].out_features) == (0.0, 2051, 512)
    assert (head[4].p, head[5].in_features, head[5].out_features) == (0.3, 512, 396)


def test_the_head_of_the_product_images():
    spec = {"name": "mlp", "hidden": 640, "norm": "layer", "before": 0.4, "dropout": 0.2}
    head = build_head(spec, 1280, 4, 0.0)
    assert kinds(head) == ["Dropout", "Linear", "LayerNorm", "ReLU", "Dropout", "Linear"]
    assert (head[0].p, head[4].p, head[2].normalized_shape) == (0.4, 0.2, (640,))


def test_the_convnext_head_on_the_bare_backbone_is_torchvisions_network():
    from torchvision import models

    torch.manual_seed(0)
    whole = models.convnext_tiny(num_classes=7).eval()
    nn.init.normal_(whole.classifier[0].weight)
    own = Classifier(
        build_backbone("torchvision/convnext_tiny", False, {"bare": True}), build_head("convnext", 768, 7, 0.3)
    )
    own.backbone.load_state_dict(whole.state_dict(), strict=False)
    own.head.load_state_dict(
        {f"{n and 2}.{name}": whole.classifier[n].state_dict()[name] for n in (0, 2) for name in ("weight", "bias")}
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(images), whole(images))


def test_the_settings_dropout_is_for_a_head_that_gives_none():
    assert build_head("mlp", 4, 2, 0.5)[4].p == 0.5
    assert build_head({"name": "mlp", "dropout": 0.1}, 4, 2, 0.5)[4].p == 0.1


@pytest.mark.parametrize("name", ["linear", "mlp", "convnext"])
def test_multi_sample_dropout_is_the_mean_of_the_logits_over_masks(name):
    torch.manual_seed(0)
    head = build_head({"name": name, "samples": 5, "dropout": 0.5}, 8, 3, 0.0)
    *first, dropout, last = head
    features = nn.Sequential(*first)(torch.randn(6, 8))
    torch.manual_seed(1)
    found = last(dropout(features))
    torch.manual_seed(1)
    expected = torch.stack([last(nn.functional.dropout(features, 0.5)) for _ in range(5)]).mean(dim=0)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, last(nn.functional.dropout(features, 0.5)))


def test_multi_sample_dropout_changes_nothing_at_prediction_and_one_sample_is_plain_dropout():
    features = torch.randn(4, 8)
    assert torch.equal(MultiSampleDropout(0.5, 5).eval()(features), features)
    assert type(build_head({"name": "linear", "samples": 1}, 8, 3, 0.5)[0]) is nn.Dropout


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("liner", "unknown head 'liner'; did you mean 'linear'"),
        ({"hidden": 3}, "unknown head ''"),
        ({"name": "linear", "hidden": 3}, "head 'linear' has no parameter 'hidden'; it takes dropout, samples"),
        ({"name": "mlp", "hiden": 3}, "no parameter 'hiden'; did you mean 'hidden'"),
        ({"name": "mlp", "hidden": 0}, "hidden=0 is not a whole number from 1"),
        ({"name": "mlp", "hidden": "many"}, "hidden='many'"),
        ({"name": "mlp", "norm": "bach"}, "unknown norm 'bach'; did you mean 'batch'"),
        ({"name": "mlp", "norm": 3}, "unknown norm"),
        ({"name": "mlp", "before": 1.0}, "before=1.0 is not a number from 0 to below 1"),
        ({"name": "convnext", "dropout": -0.1}, "dropout=-0.1"),
        ({"name": "linear", "samples": 2.5}, "samples=2.5"),
    ],
)
def test_a_head_that_cannot_be_is_explained(spec, message):
    with pytest.raises(SettingsError, match=message):
        build_head(spec, 8, 3, 0.0)
