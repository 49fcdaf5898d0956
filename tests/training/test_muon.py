"""Muon against torch's own for matrices, and against AdamW for all else."""

import copy

import pytest
import torch
from torch import nn

from fivefold.models.classifier import Classifier
from fivefold.models.small import SmallNet
from fivefold.training.muon import BETAS, Muon, hidden_weights, orthogonalised
from fivefold.training.optim import build_optimizer

LR, DECAY, MOMENTUM = 0.02, 0.1, 0.95


def gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps_of(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 4) -> None:
    for seed in range(count):
        gradients(parameters, seed)
        optimizer.step()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_matrices_step_as_by_torchs_own_muon(shape: tuple[int, int]):
    torch.manual_seed(0)
    own = nn.Parameter(torch.randn(shape))
    theirs = copy.deepcopy(own)
    group = {"params": [own], "weight_decay": DECAY, "orthogonal": True}
    steps_of(Muon([group], LR, MOMENTUM), [own])
    reference = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    steps_of(reference, [theirs])
    torch.testing.assert_close(own, theirs, rtol=0, atol=4 * LR * 0.02)


def test_a_convolution_is_the_matrix_of_its_filters_whatever_its_memory_format():
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(16, 8 * 9))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(matrix.detach().reshape(16, 8, 3, 3).clone(memory_format=memory_format))
        flat = copy.deepcopy(matrix)
        steps_of(Muon([{"params": [flat], "orthogonal": True}], LR, MOMENTUM), [flat])
        steps_of(Muon([{"params": [weight], "orthogonal": True}], LR, MOMENTUM), [weight])
        torch.testing.assert_close(weight.flatten(1), flat, rtol=0, atol=1e-6)


def test_all_else_steps_as_by_adamw():
    torch.manual_seed(0)
    own = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(9))]
    theirs = copy.deepcopy(own)
    steps_of(Muon([{"params": own, "weight_decay": DECAY}], LR, MOMENTUM), own)
    steps_of(torch.optim.AdamW(theirs, lr=LR, betas=BETAS, weight_decay=DECAY), theirs)
    torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_singular_values_end_near_one_in_the_same_directions(shape: tuple[int, int]):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(matrix := torch.randn(shape), full_matrices=False)
    found = orthogonalised(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    off = left.t() @ found @ right.t()
    assert (off - off.diagonal().diag()).abs().max() < 0.05


def test_it_is_for_the_backbones_layers_after_the_first():
    network = Classifier(SmallNet(widths=(8, 16), stem=4), nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 3)))
    optimizer = build_optimizer("muon", network, LR, DECAY, MOMENTUM)
    taken = {id(parameter) for group in optimizer.param_groups if group["orthogonal"] for parameter in group["params"]}
    named = {name for name, parameter in network.named_parameters() if id(parameter) in taken}
    assert named == {f"backbone.blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (0, 4)}
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(everything) == len(list(network.parameters()))


def test_depthwise_filters_are_no_matrices():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Linear(4, 2))
    assert hidden_weights(layers) == {id(layers[2].weight), id(layers[3].weight)}


def test_a_saved_state_goes_on_to_the_same_bits():
    torch.manual_seed(0)
    first = [nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4))]
    groups = lambda rows: [{"params": rows[:1], "orthogonal": True}, {"params": rows[1:]}]  # noqa: E731
    whole = Muon(groups(first), LR, MOMENTUM)
    steps_of(whole, first)
    second, state = copy.deepcopy(first), copy.deepcopy(whole.state_dict())
    resumed = Muon(groups(second), LR, MOMENTUM)
    resumed.load_state_dict(state)
    steps_of(whole, first)
    steps_of(resumed, second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
