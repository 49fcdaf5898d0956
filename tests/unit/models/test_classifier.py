import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from fivefold.errors import SettingsError
from fivefold.models.backbones import build_backbone
from fivefold.models.classifier import Classifier, Standardize, build_head
from fivefold.training.callbacks import Ema


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        ({"hidden": 512, "norm": "batch", "dropout": 0.3}, nn.BatchNorm1d),
        ({"hidden": 640, "norm": "layer", "before": 0.4, "dropout": 0.2}, nn.LayerNorm),
    ],
)
def test_mlp_heads_have_the_layers_of_the_car_and_product_systems(options, norm):
    assert build_head("mlp", 4, 2, 0.5)[4].p == 0.5, "model.dropout applies to heads that set no dropout themselves"
    head, hidden = build_head({"name": "mlp", **options}, 2051, 396, 0.0), options["hidden"]
    assert [type(layer) for layer in head] == [nn.Dropout, nn.Linear, norm, nn.ReLU, nn.Dropout, nn.Linear]
    assert (head[0].p, head[4].p) == (options.get("before", 0.0), options["dropout"])
    assert [head[n].weight.shape for n in (1, 2, 5)] == [(hidden, 2051), (hidden,), (396, hidden)]


def test_convnext_head_on_the_bare_backbone_matches_torchvision():
    with torch.device("meta"):  # the weights come below
        reference = models.convnext_tiny(num_classes=7)
        backbone = build_backbone("torchvision/convnext_tiny", {"bare": True})
    torch.manual_seed(0)
    for parameter in reference.to_empty(device="cpu").parameters():
        nn.init.normal_(parameter, std=0.1)
    classifier = Classifier(backbone, build_head("convnext", 768, 7, 0.3))
    classifier.backbone.load_state_dict(reference.state_dict(), strict=False, assign=True)
    classifier.head.load_state_dict(
        {f"{n and 2}.{name}": reference.classifier[n].state_dict()[name] for n in (0, 2) for name in ("weight", "bias")}
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(images), reference.eval()(images))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("liner", "unknown head 'liner'; did you mean 'linear'"),
        ({"name": "mlp", "hiden": 3}, "head 'mlp' .*'hiden'"),
        ({"name": "mlp", "hidden": 0}, "hidden=0 is not a whole number from 1"),
        ({"name": "mlp", "norm": "bach"}, "unknown norm 'bach'; did you mean 'batch'"),
        ({"name": "mlp", "hidden": 8.5}, "head 'mlp'"),
        ({"name": "convnext", "dropout": -0.1}, "head 'convnext'.*-0.1"),
    ],
)
def test_invalid_heads_are_rejected_with_a_hint(spec, message):
    with pytest.raises(SettingsError, match=message):
        build_head(spec, 8, 3, 0.0)


def test_standardize_matches_numpy_and_only_centres_constant_columns():
    rows = np.random.default_rng(0).normal(5, 3, (50, 3)).astype(np.float32)
    rows[:, 1] = 0.1
    layer = Standardize(3)
    layer.fit(torch.from_numpy(rows))
    actual = layer(torch.from_numpy(rows)).numpy()
    expected = (rows - rows.mean(axis=0, dtype=np.float64)) / np.where([1, 0, 1], rows.std(axis=0), 1)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(layer(torch.full((1, 3), 0.6))[0, 1], 0.5, rtol=1e-6)


def test_meta_features_follow_the_backbone_features_and_ema_keeps_their_scale():
    network = Classifier(nn.Flatten(), nn.Identity(), Standardize(1))
    network.meta.fit(torch.tensor([[1.0], [3.0]]))
    features = network(torch.zeros(2, 3, 2, 2), torch.tensor([[1.0], [4.0]]))
    assert features.shape == (2, 13)
    torch.testing.assert_close(features[:, 12], torch.tensor([-1.0, 2.0]))
    network.meta.fit(torch.tensor([[0.1], [0.7], [0.3]]))
    ema = Ema(network, 0.9)
    ema()
    assert all(map(torch.equal, ema.model.meta.buffers(), network.meta.buffers()))
    assert not list(network.meta.parameters())
