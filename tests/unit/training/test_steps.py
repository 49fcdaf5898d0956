import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from fivefold.errors import SettingsError
from fivefold.models.classifier import Classifier
from fivefold.training.callbacks import Ema
from fivefold.training.losses import Loss, build_loss, cross_entropy
from fivefold.training.objectives import MicroBatch, distillation_loss, label_loss, rdrop, single_pass
from fivefold.training.optim import Schedule, build_optimizer
from fivefold.training.steps import build_update
from toy_training import CPU

OBJECTIVE = single_pass(label_loss(cross_entropy(0.1)))
BF16, FP16 = (replace(CPU, dtype=dtype) for dtype in (torch.bfloat16, torch.float16))


def make_network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), *layers, nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)).train()


def make_sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return build_optimizer("sgd", model, lr=lr, weight_decay=0.0, momentum=0.0)


def make_rows(count: int, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (count,), generator=generator)
    return MicroBatch(torch.randn(count, 3, 2, 2, generator=generator), nn.functional.one_hot(codes, 3).float())


def flat_weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True, fused=True)),
    ],
)
def test_plain_step_matches_torch(name, reference):
    model = make_network()
    reference_model = copy.deepcopy(model)
    decayed = [p for p in reference_model.parameters() if p.ndim >= 2]
    others = [p for p in reference_model.parameters() if p.ndim < 2]
    optimizer = reference([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    built_optimizer = build_optimizer(name, model, lr=0.01, weight_decay=0.1, momentum=0.9)
    update = build_update(model, OBJECTIVE, built_optimizer, CPU, clip=0.5)
    for step in range(5):
        batch = make_rows(6, step)
        update([batch])
        optimizer.zero_grad()
        cross_entropy(0.1)(reference_model(batch.images), batch.targets).backward()
        nn.utils.clip_grad_norm_(reference_model.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(flat_weights(model), flat_weights(reference_model), rtol=0, atol=0)


RARE = torch.tensor([0.4, 1.0, 9.0])
ACCUMULATED = {
    "labels": OBJECTIVE,
    "class weights": single_pass(label_loss(build_loss("cross_entropy", 0.1, RARE))),
    "class weights, focal": single_pass(label_loss(build_loss("focal", 0.0, RARE))),
    "distillation": single_pass(distillation_loss(build_loss("bce", 0.0, RARE), lambda: 0.6, lambda: 2.0)),
    "R-Drop": rdrop(label_loss(build_loss("cross_entropy", 0.0, RARE)), 0.5),
}


@pytest.mark.parametrize("rho", [0.0, 0.2])
@pytest.mark.parametrize("objective", ACCUMULATED.values(), ids=ACCUMULATED)
def test_accumulated_micro_batches_equal_one_large_batch(rho, objective):
    """Some rows have no label. SAM accumulates, climbs once and accumulates again, rather than once per micro-batch."""
    large_batch_model, accumulating_model = make_network(), make_network()
    large = make_rows(9, 1)
    large.targets[2:5] = 0
    teacher = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    large, losses = replace(large, teacher=teacher), []
    micro_batches = [
        MicroBatch(large.images[a:b], large.targets[a:b], teacher[a:b]) for a, b in ((0, 4), (4, 5), (5, 9))
    ]
    for model, batches in ((large_batch_model, [large]), (accumulating_model, micro_batches)):
        results = build_update(model, objective, make_sgd(model), CPU, clip=0.0, rho=rho)(batches)
        losses.append(sum(float(result.loss) for result in results))
        assert not any(result.loss.requires_grad or result.logits.requires_grad for result in results)
    torch.testing.assert_close(flat_weights(large_batch_model), flat_weights(accumulating_model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_clipping_bounds_the_gradient_and_for_sam_the_second_one(rho):
    model = make_network()
    before = flat_weights(model).clone()
    build_update(model, OBJECTIVE, make_sgd(model, lr=1.0), CPU, clip=1e-3, rho=rho)([make_rows(8, 2)])
    assert float((flat_weights(model) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_sam_with_a_negligible_radius_equals_the_plain_step_bit_for_bit(name):
    """With dropout (the same masks in both passes), BatchNorm (updated once), accumulation and clipping."""
    results = []
    for rho in (0.0, 1e-30):
        model = make_network(nn.BatchNorm1d(8), nn.Dropout(0.5))
        optimizer = build_optimizer(name, model, lr=0.1, weight_decay=0.01, momentum=0.0)
        update = build_update(model, OBJECTIVE, optimizer, CPU, clip=0.05, rho=rho)
        torch.manual_seed(3)
        losses = [r.loss for n in range(4) for r in update([make_rows(count, n) for count in (6, 6, 3)])]
        results.append([model.state_dict(), losses, torch.rand(1)])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_sam_matches_a_manual_calculation_for_a_quadratic():
    """L = ½·a·w² in two dimensions: g = a·w, and the step takes a·(w + ρ·g/‖g‖)."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0, 1.0]))

        def forward(self, images):
            return self.w.expand(len(images), 2)

    curvature, model = torch.tensor([1.0, 4.0]), Point()
    half_square = Loss(lambda logits, targets: (curvature * logits**2).sum(dim=1).mean() / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update = build_update(model, single_pass(label_loss(half_square)), optimizer, CPU, clip=0.0, rho=0.5)
    update([MicroBatch(torch.zeros(2, 1), torch.zeros(2, 2))])
    gradient = torch.tensor([3.0, 4.0])  # ‖g‖ = 5, so the climb is (.3, .4)
    expected = torch.tensor([3.0, 1.0]) - 0.1 * curvature * (torch.tensor([3.0, 1.0]) + 0.5 * gradient / 5)
    torch.testing.assert_close(model.w.detach(), expected)


def test_sam_updates_running_statistics_at_the_original_weights():
    buffers = []
    for rho in (0.0, 0.5):
        model = make_network(nn.BatchNorm1d(8))
        build_update(model, OBJECTIVE, make_sgd(model), CPU, 0.0, rho)([make_rows(8, 2), make_rows(8, 3)])
        buffers.append(dict(model.named_buffers()))
    torch.testing.assert_close(buffers[1], buffers[0], rtol=0, atol=0)


def test_sam_rejects_fp16_with_a_hint_to_bf16():
    model = make_network()
    with pytest.raises(SettingsError, match=r"train\.sam_rho=0\.05 .* fp16.*train\.precision=bf16"):
        build_update(model, OBJECTIVE, make_sgd(model), FP16, clip=0.0, rho=0.05)
    (result,) = build_update(model, OBJECTIVE, make_sgd(model), BF16, clip=0.0, rho=0.05)([make_rows(8, 5)])
    assert bool(torch.isfinite(result.loss))


def test_defect_car_b5_scaled_gradient_is_unscaled_before_clipping():
    """The original clipped the gradient while fp16's loss scale multiplied it, which left almost nothing of it."""
    changes = []
    for runtime in (CPU, FP16):
        model = make_network()
        before = flat_weights(model).clone()
        build_update(model, OBJECTIVE, make_sgd(model, lr=1.0), runtime, clip=0.1)([make_rows(8, 2)])
        changes.append(flat_weights(model) - before)
    assert float(changes[0].norm()) == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(changes[1], changes[0], rtol=0, atol=5e-3)


@pytest.mark.parametrize("max_decay", [0.9, 0.0])
def test_ema_follows_its_formula_and_counts_batches(max_decay):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    ema = Ema(model, decay=max_decay)
    expected = model[1].running_mean.clone()
    for step in range(1, 4):
        model(torch.randn(4, 3, 2, 2) + 5)
        ema()
        decay = min(max_decay, (1 + step) / (10 + step))
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
def test_schedule_sets_the_rate_of_every_step_and_resumes_from_its_state(name, options, expected):
    def make_schedule() -> Schedule:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return Schedule(name, optimizer, total=40, steps_per_epoch=4, **options)

    with pytest.raises(SettingsError, match="warmup_epochs"):
        Schedule(name, make_schedule().optimizer, total=40, steps_per_epoch=4, warmup_epochs=10)
    schedule, rates = make_schedule(), []
    for number in range(40):
        if number == 17:
            resumed = make_schedule()
            resumed.optimizer.load_state_dict(schedule.optimizer.state_dict())
            resumed.load_state_dict(schedule.state_dict())
            schedule = resumed
        rates.append(schedule.lr)
        schedule.optimizer.step()
        schedule()
    assert rates == pytest.approx(expected, abs=1e-12)


def test_muon_updates_later_backbone_layers_and_adamw_all_other_parameters():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 3)]
    model = Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(6, 3))
    reference_model = copy.deepcopy(model)
    optimizer = build_optimizer("muon", model, 0.02, 0.1, 0.95)
    assert type(optimizer) is timm.optim.Muon
    matrices = [reference_model.backbone[2].weight, reference_model.backbone[3].weight]
    others = [p for p in reference_model.parameters() if all(p is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in others if (p.ndim >= 2) is decays], "weight_decay": 0.1 * decays} for decays in (True, False)],
        lr=0.02, betas=(0.9, 0.95),
    )  # fmt: skip
    flat = [nn.Parameter(p.detach().flatten(1)) for p in matrices]
    muon = torch.optim.Muon(flat, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for parameter, reference in zip(model.parameters(), reference_model.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            reference.grad = parameter.grad.clone()
        for flat_matrix, matrix in zip(flat, matrices, strict=True):
            flat_matrix.grad = matrix.grad.flatten(1)
        for stepped in (optimizer, adamw, muon):
            stepped.step()
    for flat_matrix, matrix in zip(flat, matrices, strict=True):
        matrix.data = flat_matrix.data.view_as(matrix)
    for parameter, reference in zip(model.parameters(), reference_model.parameters(), strict=True):
        is_matrix = any(reference is matrix for matrix in matrices)
        torch.testing.assert_close(parameter, reference, rtol=0, atol=4 * 0.02 * 0.02 if is_matrix else 1e-6)


def test_tokens_positions_and_scales_have_no_weight_decay():
    """Exempt are the parameters that timm exempts and vectors stored as [1, 1, D] or [C, 1, 1]."""

    class ScaledBackbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.scale = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(8, 1, 1))
            self.layer = nn.Conv2d(8, 8, 1)

    for backbone in (timm.create_model("test_vit", num_classes=0), ScaledBackbone()):
        model = Classifier(backbone, nn.Linear(8, 3))
        optimizer = build_optimizer("adamw", model, 0.1, 0.5, 0.9)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        decays = {name: decay[id(parameter)] for name, parameter in backbone.named_parameters()}
        assert not [name for name in decays if decays[name] and name.endswith(("token", "pos_embed", "scale", "bias"))]
        assert {name for name in decays if decays[name]} >= {name for name in decays if name.endswith("proj.weight")}
        assert set(decays.values()) == {0.0, 0.5}
