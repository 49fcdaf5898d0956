import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.errors import SettingsError
from fivefold.models.backbones import build_backbone
from fivefold.training.objectives import DistillSchedule, Teacher, soften
from fivefold.training.optim import lr_scales
from fivefold.training.trainer import Trainer, fit
from toy_training import CPU, SMALL, images_in, run_of, stand_still

LOG_PROBS = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 18)).astype(np.float32)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return images_in(tmp_path_factory.mktemp("images"), 18, noise=100, tint=120)


def make_trainer(images: ImageDataset, distill: dict | None = None, **train) -> Trainer:
    return run_of(images, {"lr": 0.02} | train, SMALL, distill=distill)[0]


def test_defect_product_frozen_backbone_keeps_its_batch_statistics(images):
    """The original kept updating the running statistics of the BatchNorms that it froze."""
    trainer = make_trainer(images, freeze_epochs=1, epochs=2, sam_rho=0.05, grad_accum_steps=2, ema_decay=0.9)
    snapshots = [copy.deepcopy(trainer.model.state_dict())]
    fit(replace(trainer, observers=[lambda row: snapshots.append(copy.deepcopy(trainer.model.state_dict()))]))
    frozen, unfrozen = (
        {name for name in after if not torch.equal(before[name], after[name])} for before, after in pairwise(snapshots)
    )
    assert {name.partition(".")[0] for name in frozen} == {"head"}
    assert {"backbone.stem.1.running_mean", "backbone.stem.0.weight"} <= unfrozen
    assert int(snapshots[-1]["backbone.stem.1.num_batches_tracked"]) == 3


def test_frozen_norm_uses_its_running_statistics(images):
    trainer = make_trainer(images, freeze_epochs=1)
    norm = trainer.model.backbone.stem[1]
    norm.running_mean.fill_(7.0)
    features = torch.randn(4, norm.num_features, 3, 3)
    trainer.model.train()
    expected = nn.functional.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(norm(features), expected)


def test_freeze_norms_keeps_the_statistics_and_trains_all_weights(images):
    trainer = make_trainer(images, freeze_norms=True, epochs=2, freeze_epochs=1)
    before = copy.deepcopy(trainer.model.state_dict())
    fit(trainer)  # the second epoch unfreezes the weights, not the statistics
    for name, after in trainer.model.state_dict().items():
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(before[name], after) == statistic, name


def test_schedule_and_optimizer_continue_correctly_after_unfreezing(images):
    rows, trainer = [], make_trainer(images, epochs=3, freeze_epochs=2, backbone_lr_scale=0.1, warmup_epochs=1.0)
    fit(replace(trainer, observers=[rows.append]))
    assert [row["lr"] for row in rows[1:]] == pytest.approx([0.02, 0.01])
    optimizer = trainer.schedule.optimizer
    steps = {int(optimizer.state[p]["step"]) for p in trainer.model.backbone.parameters()}
    assert steps == {3}  # of the last epoch: moments start when the backbone is unfrozen
    assert {int(optimizer.state[p]["step"]) for p in trainer.model.head.parameters()} == {9}


def test_backbone_uses_its_scaled_learning_rate(images):
    trainer = make_trainer(images, backbone_lr_scale=0.1, schedule="constant")
    groups = trainer.schedule.optimizer.param_groups
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rate_of[id(p)] for p in trainer.model.head.parameters()} == {0.02}
    assert {rate_of[id(p)] for p in trainer.model.backbone.parameters()} == {0.02 * 0.1}
    assert len(rate_of) == len(list(trainer.model.parameters()))
    assert trainer.schedule.lr == 0.02
    assert {group["weight_decay"] for group in groups if group["params"][0].ndim < 2} == {0.0}


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k", "test_convnext.r160_in1k"])
def test_layer_decay_matches_timm_one_layer_below_the_head(name):
    """timm counts from the last group of the network; here the head comes one layer above it."""
    network = timm.create_model(name, num_classes=0)
    scales = lr_scales(network, factor=0.5, decay=0.75)
    groups = param_groups_layer_decay(network, layer_decay=0.75)
    assert scales == {id(p): pytest.approx(0.5 * 0.75 * group["lr_scale"]) for group in groups for p in group["params"]}
    assert max(scales.values()) == 0.5 * 0.75
    assert set(scales) == {id(parameter) for parameter in network.parameters()}


def test_layer_decay_is_rejected_for_networks_without_named_layers():
    with pytest.raises(SettingsError, match=r"train\.layer_decay=1"):
        lr_scales(build_backbone("fivefold/small_net", {}), 1.0, 0.75)


def test_teacher_temperature_decays_per_epoch_to_its_minimum():
    teacher = Teacher(LOG_PROBS, 0.7, 2.0, CPU.device)
    schedule = DistillSchedule(teacher, steps_per_epoch=3, decay=0.95, end=1.7)
    temperatures = []
    for _ in range(18):
        temperatures.append(teacher.temperature)
        torch.testing.assert_close(
            teacher[torch.tensor([4])], torch.from_numpy(soften(LOG_PROBS[[4]], temperatures[-1]))
        )
        schedule()
    assert temperatures == pytest.approx([2.0] * 3 + [1.9] * 3 + [1.805] * 3 + [1.71475] * 3 + [1.7] * 6)


def test_teacher_weight_falls_to_zero_over_its_fraction_of_the_steps(images):
    """Clark et al. 2019, section 3.2: alpha falls linearly, and each step mixes both losses by its own alpha."""
    trainer = make_trainer(images, {"alpha": 0.8, "temperature": 1.0, "alpha_anneal_fraction": 0.5}, epochs=2)
    teacher, weights = trainer.train.teacher, []

    def watch(rows):
        weights.append(teacher.alpha)
        (result,) = trainer.update(rows)
        teacher_loss = nn.functional.kl_div(result.logits.log_softmax(dim=1), rows[0].teacher, reduction="batchmean")
        label_loss = nn.functional.cross_entropy(result.logits, rows[0].targets)
        torch.testing.assert_close(result.loss, weights[-1] * teacher_loss + (1 - weights[-1]) * label_loss)
        return [result]

    fit(replace(trainer, update=watch))
    assert weights == pytest.approx([0.8 * (1 - step / 3) for step in range(3)] + [0.0] * 3)


def test_defect_car_b5_validation_losses_are_comparable_while_temperature_changes(images):
    """The original validated at the temperature of the epoch: its losses fell with T and selected the wrong epoch."""
    trainer = make_trainer(images, {"temperature": 4.0, "temperature_decay": 0.5, "alpha": 1.0}, epochs=3)
    stand_still(trainer)
    for module in trainer.model.modules():  # no parameter or running mean changes
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    rows = []
    fit(replace(trainer, observers=[rows.append]))
    assert trainer.train.teacher.temperature == 1.0
    assert len({row["val_loss"] for row in rows}) == len({row["val_logloss"] for row in rows}) == 1
    assert len({round(row["train_loss"], 3) for row in rows}) == 3
