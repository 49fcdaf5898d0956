"""R-Drop: its formula, its reduction, and what it says of a network that has nothing to drop."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from fivefold.models.backbones import build_backbone
from fivefold.models.classifier import Classifier, Standardize, build_head
from fivefold.training.losses import cross_entropy
from fivefold.training.objectives import (
    MicroBatch,
    Objective,
    distillation_loss,
    is_stochastic,
    label_loss,
    rdrop,
    single_pass,
)

IMAGES = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
TARGETS = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).float()
ROWS = MicroBatch(IMAGES, TARGETS, torch.full((6, 3), 1 / 3))
LOSS = cross_entropy(0.1)


def network(*dropping: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), *dropping, nn.Linear(8, 3)).train()


@pytest.mark.parametrize("criterion", [label_loss(LOSS), distillation_loss(LOSS, lambda: 0.7, lambda: 2.0)])
def test_rdrop_is_the_mean_loss_and_the_mean_of_both_divergences_of_a_doubled_batch(criterion):
    model = network(nn.Dropout(0.5))
    torch.manual_seed(5)
    first, second = model(torch.cat([IMAGES, IMAGES])).chunk(2)
    log_p, log_q = first.log_softmax(dim=1), second.log_softmax(dim=1)
    forth = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    back = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    expected = (criterion(first, ROWS) + criterion(second, ROWS)) / 2 + 0.5 * (forth + back) / 2
    torch.manual_seed(5)
    torch.testing.assert_close(rdrop(criterion, 0.5)(model, ROWS).loss, expected)
    assert float((forth + back).detach()) > 0.001


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("dropping", [nn.Dropout, DropPath, partial(StochasticDepth, mode="row")])
def test_a_network_with_nothing_to_drop_is_warned_of_once_and_trains_as_without(dropping, share, caplog):
    model, objective = network(dropping(share)), rdrop(label_loss(LOSS), 0.5)
    losses = [objective(model, ROWS).loss for _ in range(2)]
    assert [record.levelname for record in caplog.records] == ([] if share else ["WARNING"])
    if not share:
        torch.testing.assert_close(losses, [single_pass(label_loss(LOSS))(model, ROWS).loss] * 2)


def test_batch_statistics_are_counted_once():
    model = network(nn.BatchNorm1d(8), nn.Dropout(0.5))
    rdrop(label_loss(LOSS), 0.5)(model, ROWS)
    assert int(model[3].num_batches_tracked) == 1


LARGE = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
META = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
HEADS = {
    "linear": "linear",
    "mlp, BatchNorm and dropout before": {"name": "mlp", "hidden": 16, "before": 0.2},
    "mlp, LayerNorm": {"name": "mlp", "hidden": 16, "norm": "layer"},
    "convnext": "convnext",
}


def classifier(head, meta: bool = False, **options) -> Classifier:
    torch.manual_seed(0)
    backbone = build_backbone("fivefold/small_net", False, {"widths": [8, 16], "stem": 8} | options)
    made = build_head(head, 16 + 2 * meta, 3, 0.3)
    return Classifier(backbone, made, Standardize(2) if meta else None).train()


class Whole(nn.Module):
    """The same network as something that R-Drop does not know the halves of."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs):
        return self.network(*inputs)


def stepped(
    objective: Objective, model: nn.Module, rows: MicroBatch, bf16: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, gradients in one row, and what is drawn next, after the objective's first batch."""
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = objective(model, rows).loss
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), torch.rand(1)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_where_the_head_alone_draws_one_pass_of_the_backbone_is_exact_in_loss_and_gradients(head, meta, caplog):
    rows = MicroBatch(LARGE.double(), TARGETS.double(), meta=META.double() if meta else None)
    once, both = (classifier(HEADS[head], meta).double() for _ in range(2))
    seen = []
    once.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with caplog.at_level("INFO"):
        found = stepped(rdrop(label_loss(LOSS), 0.5), once, rows)
    expected = stepped(rdrop(label_loss(LOSS), 0.5), Whole(both), rows)
    assert seen[-1] == 6, "rows of the step, not twice as many"
    assert "the backbone runs once" in caplog.text
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    statistics = zip(once.state_dict().items(), both.state_dict().values(), strict=True)
    for name, (ours, theirs) in ((name, (one, other)) for (name, one), other in statistics):
        if name.endswith("running_var") and name.startswith("backbone"):
            # the unbiased variance of n values instead of 2n, n being 6 images' pixels of one of the maps
            ratio = (ours - 0.9) / (theirs - 0.9)
            possible = [n * (2 * n - 1) / ((n - 1) * 2 * n) for n in (6 * side**2 for side in range(2, 17))]
            assert min(float((ratio - each).abs().max()) for each in possible) < 1e-9, name
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_under_bf16_the_first_batch_has_all_its_gradients():
    """What finds out what draws runs under no_grad within autocast, which must not keep the weights that it cast."""
    rows, criterion = MicroBatch(LARGE, TARGETS), label_loss(LOSS)
    once, both = classifier("linear"), classifier("linear")
    found = stepped(rdrop(criterion, 0.5), once, rows, bf16=True)
    expected = stepped(rdrop(criterion, 0.5), Whole(both), rows, bf16=True)
    assert float(found[1].abs().min() + expected[1].norm()) > 0
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 0.02


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("timm/resnet10t", {"drop_path_rate": 0.1}),
        ("timm/resnet10t", {"drop_block_rate": 0.1}),
        ("torchvision/mobilenet_v3_small", {"dropout": 0.2}),
        ("efficientnet_pytorch/efficientnet-b0", {"drop_connect_rate": 0.2, "image_size": 64}),
    ],
)
def test_randomness_in_the_backbone_is_found_wherever_it_is_written(backbone, options):
    torch.manual_seed(0)
    made = build_backbone(backbone, False, options)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert is_stochastic(made, images)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    modes = [module.training for module in made.eval().modules()]
    is_stochastic(made, images)
    assert [module.training for module in made.modules()] == modes


def test_a_backbone_that_draws_runs_twice():
    model = classifier("linear")
    model.backbone = nn.Sequential(model.backbone, nn.Dropout(0.1))
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    rdrop(label_loss(LOSS), 0.5)(model, MicroBatch(LARGE, TARGETS))
    assert seen[-1] == 12
