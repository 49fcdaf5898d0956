"""BatchNorm of several processes: another class, the same parameters, and the same figures."""

import logging

import pytest
import timm
import torch
from torch import nn

from fivefold.models.norms import with_norms_of_all
from fivefold.models.small import small_net

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "torch's": lambda: small_net([8, 16]),
    "timm's, with activations inside": lambda: timm.create_model("efficientnet_b0", num_classes=0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_on_gpus_they_are_synchronised_and_give_what_they_gave(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    names, expected = list(network.state_dict()), network.eval()(IMAGES)
    with caplog.at_level(logging.INFO, logger="fivefold"):
        made = with_norms_of_all(network, torch.device("cuda"))
    assert "SyncBatchNorm" in caplog.text
    kinds = [type(module) for module in made.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert kinds
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    assert list(made.state_dict()) == names
    torch.testing.assert_close(made(IMAGES), expected, rtol=0.0, atol=0.0)


def test_on_cpus_they_stay_and_the_log_says_what_that_means(caplog: pytest.LogCaptureFixture) -> None:
    network = small_net([8, 16])
    with caplog.at_level(logging.INFO, logger="fivefold"):
        made = with_norms_of_all(network, torch.device("cpu"))
    assert any(type(module) is nn.BatchNorm2d for module in made.modules())
    assert "each process's own rows" in caplog.text


def test_without_norms_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(30))
    with caplog.at_level(logging.INFO, logger="fivefold"):
        assert with_norms_of_all(network, torch.device("cuda")) is network
    assert not caplog.records
