"""R-Drop: its formula, its reduction, and what it says of a network that has nothing to drop."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from fivefold.training.losses import cross_entropy
from fivefold.training.objectives import Rows, by_labels, by_teacher, divergence, rdrop, supervised

IMAGES = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
TARGETS = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).float()
ROWS = Rows(IMAGES, TARGETS, torch.full((6, 3), 1 / 3))
LOSS = cross_entropy(0.1)


def network(*dropping: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), *dropping, nn.Linear(8, 3)).train()


def both_passes(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the two halves of one doubled batch, as R-Drop draws them."""
    torch.manual_seed(5)
    return model(torch.cat([IMAGES, IMAGES])).chunk(2)


def test_rdrop_is_the_mean_loss_and_the_mean_of_both_divergences():
    model = network(nn.Dropout(0.5))
    first, second = both_passes(model)
    log_p, log_q = first.log_softmax(dim=1), second.log_softmax(dim=1)
    forth = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    back = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    expected = (LOSS(first, TARGETS) + LOSS(second, TARGETS)) / 2 + 0.5 * (forth + back) / 2
    torch.manual_seed(5)
    result = rdrop(by_labels(LOSS), 0.5)(model, ROWS)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.parts["rdrop"], (forth + back).detach() / 2)
    assert float(result.parts["rdrop"]) > 0.001


def test_rdrop_by_hand():
    """p = (.75, .25), q = (.5, .5): KL(p‖q) = .130812, KL(q‖p) = .143841."""
    found = divergence(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log())
    assert float(found) == pytest.approx((0.130812 + 0.143841) / 2, abs=1e-6)


def test_rdrop_at_alpha_zero_is_the_mean_loss_of_both_passes():
    model = network(nn.Dropout(0.5))
    first, second = both_passes(model)
    torch.manual_seed(5)
    found = rdrop(by_labels(LOSS), 0.0)(model, ROWS).loss
    torch.testing.assert_close(found, (LOSS(first, TARGETS) + LOSS(second, TARGETS)) / 2, rtol=0, atol=0)


def test_rdrop_teaches_both_passes():
    model = network(nn.Dropout(0.5))
    criterion = by_teacher(LOSS, lambda: 0.7, lambda: 2.0)
    first, second = both_passes(model)
    torch.manual_seed(5)
    result = rdrop(criterion, 0.5)(model, ROWS)
    expected = (criterion(first, ROWS)[0] + criterion(second, ROWS)[0]) / 2 + 0.5 * divergence(first, second)
    torch.testing.assert_close(result.loss, expected)
    assert set(result.parts) == {"teacher", "labels", "rdrop"}


@pytest.mark.parametrize("dropping", [nn.Dropout(0.0), DropPath(0.0), StochasticDepth(0.0, "row"), nn.Identity()])
def test_a_network_with_nothing_to_drop_is_warned_of_once_and_trains_as_without(dropping, caplog):
    model, objective = network(dropping), rdrop(by_labels(LOSS), 0.5)
    for _ in range(2):
        torch.testing.assert_close(objective(model, ROWS).loss, supervised(LOSS)(model, ROWS).loss)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "no active dropout or stochastic depth" in warnings[0]


@pytest.mark.parametrize("dropping", [nn.Dropout(0.1), DropPath(0.1), StochasticDepth(0.1, "row")])
def test_a_network_that_drops_something_is_not_warned_of(dropping, caplog):
    rdrop(by_labels(LOSS), 0.5)(network(dropping), ROWS)
    assert not caplog.records


def test_batch_statistics_are_counted_once():
    model = network(nn.BatchNorm1d(8), nn.Dropout(0.5))
    rdrop(by_labels(LOSS), 0.5)(model, ROWS)
    assert int(model[3].num_batches_tracked) == 1
