import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fivefold.models.backbones import build_backbone
from fivefold.models.classifier import Classifier, Standardize, build_head
from fivefold.training.losses import cross_entropy
from fivefold.training.objectives import MicroBatch, distillation_loss, is_stochastic, label_loss, rdrop, single_pass

IMAGES = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
TARGETS = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).float()
ROWS = MicroBatch(IMAGES, TARGETS, torch.full((6, 3), 1 / 3))
LOSS = cross_entropy(0.1)


def make_network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), *layers, nn.Linear(8, 3)).train()


@pytest.mark.parametrize("criterion", [label_loss(LOSS), distillation_loss(LOSS, lambda: 0.7, lambda: 2.0)])
def test_rdrop_is_the_mean_loss_plus_the_mean_divergence_of_a_doubled_batch(criterion):
    model = make_network(nn.Dropout(0.5))
    torch.manual_seed(5)
    first, second = model(torch.cat([IMAGES, IMAGES])).chunk(2)
    log_p, log_q = first.log_softmax(dim=1), second.log_softmax(dim=1)
    forward_kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    backward_kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    expected = (criterion(first, ROWS) + criterion(second, ROWS)) / 2 + 0.5 * (forward_kl + backward_kl) / 2
    torch.manual_seed(5)
    torch.testing.assert_close(rdrop(criterion, 0.5)(model, ROWS).loss, expected)
    assert float((forward_kl + backward_kl).detach()) > 0.001


def test_network_without_dropout_warns_once_and_trains_without_rdrop(caplog):
    model, objective = make_network(nn.Dropout(0.0)), rdrop(label_loss(LOSS), 0.5)
    losses = [objective(model, ROWS).loss for _ in range(2)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    torch.testing.assert_close(losses, [single_pass(label_loss(LOSS))(model, ROWS).loss] * 2)


def test_batch_statistics_are_updated_once_and_dropout_causes_no_warning(caplog):
    model = make_network(nn.BatchNorm1d(8), nn.Dropout(0.5))
    rdrop(label_loss(LOSS), 0.5)(model, ROWS)
    assert int(model[3].num_batches_tracked) == 1
    assert not caplog.records


LARGE = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
META = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
HEADS = [
    "linear",
    {"name": "mlp", "hidden": 16, "before": 0.2},
    {"name": "mlp", "hidden": 16, "norm": "layer"},
    "convnext",
]


def make_classifier(head, meta: bool = False, **options) -> Classifier:
    torch.manual_seed(0)
    backbone = build_backbone("fivefold/small_net", {"widths": [8, 16], "stem": 8} | options)
    built_head = build_head(head, 16 + 2 * meta, 3, 0.3)
    return Classifier(backbone, built_head, Standardize(2) if meta else None).train()


class OpaqueNetwork(nn.ModuleList):
    """Hide backbone and head from R-Drop, so that it runs the whole network twice."""

    def forward(self, *inputs):
        return self[0](*inputs)


def run_step(model: nn.Module, rows: MicroBatch) -> list[torch.Tensor]:
    """Return loss, gradients and the next random number after the objective's first batch."""
    torch.manual_seed(7)
    loss = rdrop(label_loss(LOSS), 0.5)(model, rows).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters()), torch.rand(1)]


@pytest.mark.parametrize("head", HEADS)
def test_one_backbone_pass_is_exact_if_only_the_head_is_random(head, caplog):
    meta = head == "linear"
    rows = MicroBatch(LARGE.double(), TARGETS.double(), meta=META.double() if meta else None)
    single_pass_model, two_pass_model = (make_classifier(head, meta).double() for _ in range(2))
    batch_sizes = []
    single_pass_model.backbone.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    with caplog.at_level("INFO"):
        actual = run_step(single_pass_model, rows)
    expected = run_step(OpaqueNetwork([two_pass_model]), rows)
    assert batch_sizes[-1] == 6, "the backbone gets the rows of the step once"
    assert "the backbone runs once" in caplog.text
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    expected_state = two_pass_model.state_dict()
    for name, actual_tensor in single_pass_model.state_dict().items():
        expected_tensor = expected_state[name]
        if name.endswith("running_var") and name.startswith("backbone"):
            # the unbiased variance of n values instead of 2n; n is the number of pixels of 6 images in one of the maps
            ratio = (actual_tensor - 0.9) / (expected_tensor - 0.9)
            possible = [n * (2 * n - 1) / ((n - 1) * 2 * n) for n in (6 * side**2 for side in range(2, 17))]
            assert min(float((ratio - value).abs().max()) for value in possible) < 1e-9, name
        else:
            torch.testing.assert_close(actual_tensor, expected_tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("timm/resnet10t", {"drop_path_rate": 0.1}),
        ("timm/resnet10t", {"drop_block_rate": 0.1}),
        ("torchvision/mobilenet_v3_small", {"dropout": 0.2}),
        ("efficientnet_pytorch/efficientnet-b0", {"drop_connect_rate": 0.2, "image_size": 64}),
    ],
)
def test_is_stochastic_detects_every_kind_of_randomness_in_a_backbone(backbone, options):
    torch.manual_seed(0)
    network = build_backbone(backbone, options).eval()
    state, images = copy.deepcopy(network.state_dict()), torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    assert is_stochastic(network, images)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert not any(module.training for module in network.modules())


def test_stochastic_backbone_runs_twice():
    model = make_classifier("linear")
    model.backbone = nn.Sequential(model.backbone, nn.Dropout(0.1))
    batch_sizes = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    rdrop(label_loss(LOSS), 0.5)(model, MicroBatch(LARGE, TARGETS))
    assert batch_sizes[-1] == 12
