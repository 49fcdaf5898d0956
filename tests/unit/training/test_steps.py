"""Updates, averaging, optimisers and schedules against torch's own and by reduction."""

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from fivefold.errors import SettingsError
from fivefold.inference.predictor import make_runtime
from fivefold.models.classifier import Classifier
from fivefold.training.callbacks import Ema
from fivefold.training.losses import build_loss, cross_entropy
from fivefold.training.objectives import MicroBatch, distillation_loss, label_loss, rdrop, single_pass
from fivefold.training.optim import Schedule, build_optimizer
from fivefold.training.steps import plain_step, sam_step

OBJECTIVE = single_pass(label_loss(cross_entropy(0.1)))
CPU = make_runtime(torch.device("cpu"), None, False, [0.5] * 3, [0.5] * 3)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))


def rows(count: int, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (count,), generator=generator)
    return MicroBatch(torch.randn(count, 3, 2, 2, generator=generator), nn.functional.one_hot(codes, 3).float())


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True, fused=True)),
    ],
)
def test_a_plain_step_is_torchs_own(name, reference):
    ours = network()
    theirs = copy.deepcopy(ours)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = reference([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    own = build_optimizer(name, ours, lr=0.01, weight_decay=0.1, momentum=0.9)
    update = plain_step(ours, OBJECTIVE, own, CPU, clip=0.5)
    for step in range(5):
        batch = rows(6, step)
        update([batch])
        optimizer.zero_grad()
        cross_entropy(0.1)(theirs(batch.images), batch.targets).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=0)


RARE = torch.tensor([0.4, 1.0, 9.0])
ACCUMULATED = {
    "labels": OBJECTIVE,
    "class weights": single_pass(label_loss(build_loss("cross_entropy", 0.1, RARE))),
    "class weights, focal": single_pass(label_loss(build_loss("focal", 0.0, RARE))),
    "a teacher": single_pass(distillation_loss(build_loss("bce", 0.0, RARE), lambda: 0.6, lambda: 2.0)),
    "two passes": rdrop(label_loss(build_loss("cross_entropy", 0.0, RARE)), 0.5),
}


@pytest.mark.parametrize("update", [plain_step, sam_step])
@pytest.mark.parametrize("objective", ACCUMULATED.values(), ids=ACCUMULATED)
def test_accumulated_batches_are_one_large_batch_whatever_their_rows_count(update, objective):
    """Some rows have no label. SAM accumulates, climbs once and accumulates again: not a climb a micro-batch."""
    whole, parts = network(), network()
    large = rows(9, 1)
    large.targets[2:5] = 0
    teacher = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    large, found = replace(large, teacher=teacher), []
    pieces = [MicroBatch(large.images[a:b], large.targets[a:b], teacher[a:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
    for model, batches in ((whole, [large]), (parts, pieces)):
        optimizer = build_optimizer("sgd", model, lr=0.1, weight_decay=0.0, momentum=0.0)
        results = update(model, objective, optimizer, CPU, clip=0.0, rho=0.2)(batches)
        found.append(sum(float(result.loss) for result in results))
    torch.testing.assert_close(weights(whole), weights(parts))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("update", [plain_step, sam_step])
def test_who_keeps_the_results_of_a_step_keeps_no_graph(update):
    model = network()
    optimizer = build_optimizer("sgd", model, lr=0.1, weight_decay=0.0, momentum=0.0)
    results = update(model, OBJECTIVE, optimizer, CPU, clip=0.0, rho=0.1)([rows(4, 1), rows(4, 2)])
    assert [result.loss.grad_fn for result in results] == [None, None]
    assert [result.logits.grad_fn for result in results] == [None, None]


@pytest.mark.parametrize("update", [plain_step, sam_step])
def test_clipping_bounds_the_gradient_and_of_sam_the_second(update):
    model = network()
    before = weights(model).clone()
    optimizer = build_optimizer("sgd", model, lr=1.0, weight_decay=0.0, momentum=0.0)
    update(model, OBJECTIVE, optimizer, CPU, clip=1e-3, rho=0.5)([rows(8, 2)])
    assert float((weights(model) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("most", [0.9, 0.0])
def test_the_average_follows_its_formula_and_counts_batches(most):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    ema = Ema(model, decay=most)
    expected = model[1].running_mean.clone()
    for step in range(1, 4):
        model(torch.randn(4, 3, 2, 2) + 5)
        ema()
        decay = min(most, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[1].running_mean
    torch.testing.assert_close(ema.model[1].running_mean, expected)
    assert int(ema.model[1].num_batches_tracked) == 3
    assert not ema.model.training


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {}, [1.0] * 40),
        ("cosine", {}, [0.5 * (1 + math.cos(math.pi * n / 40)) for n in range(40)]),
        ("cosine", {"warmup_epochs": 2}, [(n + 1) / 8 for n in range(8)] + [0.5 * (1 + math.cos(math.pi * n / 32)) for n in range(32)]),
        ("step", {"lr_step_epochs": 5, "gamma": 0.5}, [1.0] * 20 + [0.5] * 20),
    ],
)  # fmt: skip
def test_a_schedule_sets_the_rate_of_every_step_and_goes_on_from_its_state(name, options, expected):
    def fresh() -> Schedule:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return Schedule(name, optimizer, total=40, steps_per_epoch=4, **options)

    with pytest.raises(SettingsError, match="warmup_epochs"):
        Schedule(name, fresh().optimizer, total=40, steps_per_epoch=4, warmup_epochs=10)
    schedule, rates = fresh(), []
    for number in range(40):
        if number == 17:
            resumed = fresh()
            resumed.optimizer.load_state_dict(schedule.optimizer.state_dict())
            resumed.load_state_dict(schedule.state_dict())
            schedule = resumed
        rates.append(schedule.lr)
        schedule.optimizer.step()
        schedule()
    assert rates == pytest.approx(expected, abs=1e-12)


def test_muon_is_timms_for_the_backbones_layers_after_the_first_and_adamw_for_all_else():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 3)]
    ours = Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(6, 3))
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer("muon", ours, 0.02, 0.1, 0.95)
    assert type(optimizer) is timm.optim.Muon
    matrices = [theirs.backbone[2].weight, theirs.backbone[3].weight]
    others = [p for p in theirs.parameters() if all(p is not each for each in matrices)]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in others if (p.ndim >= 2) is decays], "weight_decay": 0.1 * decays} for decays in (True, False)],
        lr=0.02, betas=(0.9, 0.95),
    )  # fmt: skip
    flat = [nn.Parameter(p.detach().flatten(1)) for p in matrices]
    muon = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for one, other in zip(flat, matrices, strict=True):
            one.grad = other.grad.flatten(1)
        for each in (optimizer, adamw, muon):
            each.step()
    for one, other in zip(flat, matrices, strict=True):
        other.data = one.data.view_as(other)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        is_matrix = any(other is each for each in matrices)
        torch.testing.assert_close(one, other, rtol=0, atol=4 * 0.02 * 0.02 if is_matrix else 1e-6)


def test_tokens_positions_and_scales_do_not_decay():
    """What timm's networks exempt, and vectors that a network keeps as [1, 1, D] or [C, 1, 1]."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.scale = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(8, 1, 1))
            self.layer = nn.Conv2d(8, 8, 1)

    for backbone in (timm.create_model("test_vit", num_classes=0), Scaled()):
        model = Classifier(backbone, nn.Linear(8, 3))
        optimizer = build_optimizer("adamw", model, 0.1, 0.5, 0.9)
        decay = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
        found = {name: decay[id(parameter)] for name, parameter in backbone.named_parameters()}
        assert not [name for name in found if found[name] and name.endswith(("token", "pos_embed", "scale", "bias"))]
        assert {name for name in found if found[name]} >= {name for name in found if name.endswith("proj.weight")}
        assert set(found.values()) == {0.0, 0.5}
