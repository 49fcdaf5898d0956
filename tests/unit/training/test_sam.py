"""SAM: its formula by hand, its reduction to the plain step, and the state its second pass must not change."""

import pytest
import torch
from torch import nn

from fivefold.errors import SettingsError
from fivefold.inference.predictor import make_runtime
from fivefold.training.losses import Loss, cross_entropy
from fivefold.training.objectives import MicroBatch, label_loss, single_pass
from fivefold.training.optim import build_optimizer
from fivefold.training.steps import plain_step, sam_step

CPU = make_runtime(torch.device("cpu"), None, False, [0.5] * 3, [0.5] * 3)
OBJECTIVE = single_pass(label_loss(cross_entropy(0.1)))


def make_network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), *layers, nn.ReLU(), nn.Linear(8, 3)).train()


def make_batches(seed: int, *counts: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(seed)
    micro_batches = []
    for count in counts:
        codes = torch.randint(0, 3, (count,), generator=generator)
        images = torch.randn(count, 3, 2, 2, generator=generator)
        micro_batches.append(MicroBatch(images, nn.functional.one_hot(codes, 3).float()))
    return micro_batches


def make_optimizer(model: nn.Module, name: str = "sgd", lr: float = 0.1):
    return build_optimizer(name, model, lr=lr, weight_decay=0.01, momentum=0.0)


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_sam_at_rho_zero_equals_the_plain_step_bit_for_bit(name):
    """With dropout (the same masks in both passes), BatchNorm, accumulation and clipping."""
    results = {}
    for update in (plain_step, sam_step):
        model = make_network(nn.BatchNorm1d(8), nn.Dropout(0.5))
        torch.manual_seed(3)
        step = update(model, OBJECTIVE, make_optimizer(model, name), CPU, 0.05, 0.0)
        losses = [result.loss.item() for n in range(4) for result in step(make_batches(n, 6, 6, 3))]
        results[update] = (copy_state(model), losses, torch.rand(1))
    assert results[plain_step][1:] == results[sam_step][1:]
    for key, tensor in results[plain_step][0].items():
        assert torch.equal(tensor, results[sam_step][0][key]), key


def test_sam_matches_a_manual_calculation_for_a_quadratic():
    """L = ½·a·w² in two dimensions: g = a·w, and the step takes a·(w + ρ·g/‖g‖)."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0, 1.0]))

        def forward(self, images):
            return self.w.expand(len(images), 2)

    curvature = torch.tensor([1.0, 4.0])
    model = Point()

    def half_square(logits, targets):
        return (curvature * logits**2).sum(dim=1).mean() / 2

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam_step(model, single_pass(label_loss(Loss(half_square))), optimizer, CPU, clip=0.0, rho=0.5)(
        [MicroBatch(torch.zeros(2, 1), torch.zeros(2, 2))]
    )
    gradient = torch.tensor([3.0, 4.0])  # ‖g‖ = 5, so the climb is (.3, .4)
    expected = torch.tensor([3.0, 1.0]) - 0.1 * curvature * (torch.tensor([3.0, 1.0]) + 0.5 * gradient / 5)
    torch.testing.assert_close(model.w.detach(), expected)


def test_both_passes_use_the_same_dropout_masks():
    """A layer after the dropout records its input: each mask occurs twice, in the same order."""
    masks = []

    class RecordMask(nn.Module):
        def forward(self, images):
            masks.append((images == 0).clone())
            return images

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), RecordMask(), nn.Linear(12, 3)).train()
    sam_step(model, OBJECTIVE, make_optimizer(model), CPU, clip=0.0, rho=0.2)(make_batches(0, 6, 6))
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_updated_once_at_the_original_weights(momentum):
    buffers = []
    for update in (plain_step, sam_step):
        model = make_network(nn.BatchNorm1d(8, momentum=momentum))
        update(model, OBJECTIVE, make_optimizer(model), CPU, 0.0, 0.5)(make_batches(2, 8, 8))
        buffers.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    assert int(buffers[1]["2.num_batches_tracked"]) == 2
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name


def test_frozen_parameters_stay_unchanged():
    model = make_network()
    model[1].requires_grad_(False)
    optimizer = build_optimizer("sgd", model, lr=0.1, weight_decay=0.0, momentum=0.0)
    before = copy_state(model)
    sam_step(model, OBJECTIVE, optimizer, CPU, clip=1.0, rho=0.5)(make_batches(4, 8))
    assert torch.equal(model[1].weight, before["1.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


def test_fp16_is_rejected_with_a_hint_to_bf16():
    fp16 = make_runtime(torch.device("cpu"), torch.float16, False, [0.5] * 3, [0.5] * 3)
    model = make_network()
    with pytest.raises(SettingsError, match=r"train\.sam_rho=0\.05 .* fp16.*train\.precision=bf16"):
        sam_step(model, OBJECTIVE, make_optimizer(model), fp16, clip=0.0, rho=0.05)
    bf16 = make_runtime(torch.device("cpu"), torch.bfloat16, False, [0.5] * 3, [0.5] * 3)
    results = sam_step(model, OBJECTIVE, make_optimizer(model), bf16, clip=0.0, rho=0.05)(make_batches(5, 8))
    assert bool(torch.isfinite(results[0].loss))
