"""What changes from epoch to epoch: a frozen backbone, learning rates by layer, a cooling teacher."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fivefold.build import build_classifier
from fivefold.config.schema import Model
from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.errors import SettingsError
from fivefold.models.backbones import build_backbone
from fivefold.training.objectives import DistillSchedule, Teacher, soften
from fivefold.training.optim import build_optimizer, lr_scales
from fivefold.training.trainer import Trainer, fit
from toy_training import CPU, SMALL, images_in, run_of, stand_still

LOG_PROBS = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 18)).astype(np.float32)


@pytest.fixture
def images(tmp_path: Path) -> ImageDataset:
    return images_in(tmp_path / "images", 18, noise=100, tint=120)


def loop(images: ImageDataset, distill: dict | None = None, **train) -> Trainer:
    return run_of(images, {"lr": 0.02} | train, SMALL, distill=distill)[0]


def states(made: Trainer) -> list[dict[str, torch.Tensor]]:
    """The model's weights and buffers before the first epoch and after each."""
    found = [{name: tensor.clone() for name, tensor in made.model.state_dict().items()}]

    def observe(row):
        found.append({name: tensor.clone() for name, tensor in made.model.state_dict().items()})

    fit(replace(made, observers=[observe]))
    return found


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_defect_product_a_frozen_backbone_keeps_its_batch_statistics_too(images, rho):
    """The original went on updating the running statistics of the BatchNorms that it froze."""
    made = loop(images, freeze_epochs=2, sam_rho=rho, grad_accum_steps=2, ema_decay=0.9, max_grad_norm=1.0)
    found = states(made)
    for before, after in ((found[0], found[1]), (found[1], found[2])):
        assert {name.partition(".")[0] for name in moved(before, after)} == {"head"}
    freed = moved(found[2], found[3])
    assert {"backbone.stem.1.running_mean", "backbone.stem.1.num_batches_tracked", "backbone.stem.0.weight"} <= freed
    assert int(found[4]["backbone.stem.1.num_batches_tracked"]) == 2 * 3


def test_a_frozen_norm_normalises_by_what_it_knows(images):
    made = loop(images, freeze_epochs=1)
    norm = made.model.backbone.stem[1]
    norm.running_mean.fill_(7.0)
    given = torch.randn(4, norm.num_features, 3, 3)
    made.model.train()
    expected = nn.functional.batch_norm(given, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(norm(given), expected)


def test_the_schedule_and_the_optimiser_go_on_rightly_after_the_thaw(images):
    rates = {}
    for frozen in (0, 3):
        rates[frozen] = rows = []
        made = loop(images, freeze_epochs=frozen, backbone_lr_scale=0.1, warmup_epochs=1.0, optimizer="adamw")
        fit(replace(made, observers=[rows.append]))
    assert [row["lr"] for row in rates[0]] == [row["lr"] for row in rates[3]]
    assert rates[3][1]["lr"] == 0.02
    optimizer = made.schedule.optimizer
    steps = {int(optimizer.state[p]["step"]) for p in made.model.backbone.parameters()}
    assert steps == {3}  # the last epoch's: moments start with the thaw
    assert {int(optimizer.state[p]["step"]) for p in made.model.head.parameters()} == {12}


def test_freezing_for_no_epoch_is_not_freezing_and_for_all_of_them_a_head_alone(images):
    assert {"backbone", "head"} == {name.partition(".")[0] for name in moved(*states(loop(images))[:2])}
    found = states(loop(images, freeze_epochs=9))
    assert {name.partition(".")[0] for name in moved(found[0], found[-1])} == {"head"}


def test_the_backbone_learns_at_its_share_of_the_rate(images):
    made = loop(images, backbone_lr_scale=0.1, schedule="constant")
    groups = made.schedule.optimizer.param_groups
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rate_of[id(p)] for p in made.model.head.parameters()} == {0.02}
    assert {rate_of[id(p)] for p in made.model.backbone.parameters()} == {0.02 * 0.1}
    assert len(rate_of) == len(list(made.model.parameters()))
    assert made.schedule.lr == 0.02
    assert {group["weight_decay"] for group in groups if group["params"][0].ndim < 2} == {0.0}


def test_at_their_defaults_the_groups_are_those_of_weight_decay_alone():
    network = build_classifier(Model(**SMALL), 3)
    shares = lr_scales(network.backbone, 1.0, 1.0)
    groups = build_optimizer("adamw", network, 0.01, 0.1, 0.9, shares).param_groups
    assert [[group["lr"], group["weight_decay"]] for group in groups] == [[0.01, 0.1], [0.01, 0.0]]


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k", "test_convnext.r160_in1k"])
def test_layer_decay_is_timms_one_layer_below_the_head(name):
    """timm counts from the network's last group, which here has the head above it."""
    network = timm.create_model(name, num_classes=0)
    found = lr_scales(network, factor=0.5, decay=0.75)
    groups = param_groups_layer_decay(network, layer_decay=0.75)
    assert found == {id(p): pytest.approx(0.5 * 0.75 * group["lr_scale"]) for group in groups for p in group["params"]}
    assert max(found.values()) == 0.5 * 0.75
    assert set(found) == {id(parameter) for parameter in network.parameters()}


def test_layer_decay_of_a_network_that_names_no_layers_is_refused():
    with pytest.raises(SettingsError, match=r"train\.layer_decay=1"):
        lr_scales(build_backbone("torchvision/resnet18", False, {}), 1.0, 0.75)


def test_a_teacher_cools_by_epochs_down_to_its_end():
    teacher = Teacher(LOG_PROBS, 0.7, 2.0, CPU.device)
    cooling = DistillSchedule(teacher, steps_per_epoch=3, decay=0.95, end=1.7)
    heats = []
    for _ in range(18):
        heats.append(teacher.temperature)
        torch.testing.assert_close(teacher[torch.tensor([4])], torch.from_numpy(soften(LOG_PROBS[[4]], heats[-1])))
        cooling()
    assert heats == pytest.approx([2.0] * 3 + [1.9] * 3 + [1.805] * 3 + [1.71475] * 3 + [1.7] * 6)


def test_the_student_is_taught_at_the_temperature_of_its_epoch(images):
    made = loop(images, {"temperature": 2.0, "temperature_decay": 0.5, "min_temperature": 0.8, "alpha": 1.0}, epochs=3)
    teacher, heats = made.train.teacher, []

    def watch(rows):
        assert all(torch.equal(batch.teacher.sum(dim=1).round(decimals=4), torch.ones(6)) for batch in rows)
        heats.append(teacher.temperature)
        return made.update(rows)

    fit(replace(made, update=watch))
    assert heats == [2.0] * 3 + [1.0] * 3 + [0.8] * 3
    assert teacher.alpha == 1.0, "without annealing the teacher's weight stays"


def test_the_teachers_weight_falls_to_nothing_over_its_share_of_the_steps(images):
    """Clark et al. 2019, section 3.2: linear from the teacher to the labels; a step's value is the mixture of that step."""
    made = loop(images, {"alpha": 0.8, "temperature": 1.0, "alpha_anneal_fraction": 0.5}, epochs=4)
    teacher, weights = made.train.teacher, []

    def watch(rows):
        weights.append(teacher.alpha)
        (result,) = made.update(rows)
        taught = nn.functional.kl_div(result.logits.log_softmax(dim=1), rows[0].teacher, reduction="batchmean")
        labelled = nn.functional.cross_entropy(result.logits, rows[0].targets)
        torch.testing.assert_close(result.loss, weights[-1] * taught + (1 - weights[-1]) * labelled)
        return [result]

    fit(replace(made, update=watch))
    assert weights == pytest.approx([0.8 * (1 - step / 6) for step in range(6)] + [0.0] * 6)


def test_defect_car_b5_validation_losses_compare_while_the_temperature_moves(images):
    """The original validated at the T of the epoch: its losses fell with T, and so chose the wrong epoch."""
    made = loop(images, {"temperature": 4.0, "temperature_decay": 0.5, "alpha": 1.0}, epochs=3)
    stand_still(made)
    for module in made.model.modules():  # nothing learns, not even a running mean
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    rows = []
    fit(replace(made, observers=[rows.append]))
    assert made.train.teacher.temperature == 1.0
    assert len({row["val_loss"] for row in rows}) == len({row["val_logloss"] for row in rows}) == 1
    assert len({round(row["train_loss"], 3) for row in rows}) == 3
