import numpy as np
import torch
from torch import nn

from fivefold.models.classifier import Classifier, Standardised
from fivefold.training.phases import Ema


def test_numbers_are_standardised_as_numpy_does_and_constant_ones_only_centred():
    rows = np.random.default_rng(0).normal(5, 3, (50, 3)).astype(np.float32)
    rows[:, 1] = 0.1
    layer = Standardised(3)
    layer.fit(torch.from_numpy(rows))
    found = layer(torch.from_numpy(rows)).numpy()
    expected = (rows - rows.mean(axis=0, dtype=np.float64)) / np.where([1, 0, 1], rows.std(axis=0), 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(layer(torch.full((1, 3), 0.6))[0, 1], 0.5, rtol=1e-6)


def test_meta_features_stand_behind_the_backbones():
    layer = Standardised(1)
    layer.fit(torch.tensor([[1.0], [3.0]]))
    network = Classifier(nn.Flatten(), nn.Identity(), layer)
    found = network(torch.zeros(2, 3, 2, 2), torch.tensor([[1.0], [4.0]]))
    assert found.shape == (2, 13)
    torch.testing.assert_close(found[:, 12], torch.tensor([-1.0, 2.0]))


def test_without_meta_features_nothing_is_added_to_the_weights():
    network = Classifier(nn.Flatten(), nn.Linear(12, 3))
    assert list(network.state_dict()) == ["head.weight", "head.bias"]


def test_the_average_of_the_weights_keeps_mean_and_std_to_the_bit():
    network = Classifier(nn.Flatten(), nn.Linear(13, 3), Standardised(1))
    network.meta.fit(torch.tensor([[0.1], [0.7], [0.3]]))
    ema = Ema(network, 0.9)
    for _ in range(3):
        ema()
    assert torch.equal(ema.model.meta.mean, network.meta.mean)
    assert torch.equal(ema.model.meta.std, network.meta.std)
    assert not [name for name, _ in network.named_parameters() if name.startswith("meta")]
