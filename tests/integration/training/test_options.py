"""All training options combined, and the selection of raw and averaged weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fivefold.data.pipeline.dataset import ImageDataset
from fivefold.training.trainer import fit, validate
from toy_training import SMALL, images_in, run_of

ALL_OPTIONS = {
    "epochs": 8, "batch_size": 8, "grad_accum_steps": 2, "lr": 0.02, "max_grad_norm": 1.0, "ema_decay": 0.95, "save_raw_weights": True, "rdrop_alpha": 0.5,
    "sam_rho": 0.05, "label_smoothing": 0.05, "class_weights": "balanced", "sampler": "balanced",
}  # fmt: skip


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return images_in(tmp_path_factory.mktemp("many"), 32, transforms=("horizontal_flip",))


def test_all_training_options_together_reduce_the_loss(many_images):
    distill = {"temperature": 2.0, "temperature_decay": 0.9}
    trainer, rows = run_of(many_images, ALL_OPTIONS, SMALL, mix="mixup", distill=distill)
    norms: list[float] = []

    def record_norm() -> None:
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    best = fit(replace(trainer, after_step=[record_norm, *trainer.after_step]))
    assert len(norms) == 8 * 2  # 32 rows in batches of 8, two per step
    assert max(norms) <= 1.0 + 1e-4
    assert rows[-1]["train_loss"] < 0.85 * rows[0]["train_loss"]
    assert best["ema"].scores["logloss"] < 0.7 * np.log(3)
    assert best["raw"].scores["acc"] > 0.9


def test_all_options_together_are_deterministic_and_each_one_has_an_effect(many_images):
    """Removing or changing any option changes the weights, so no option is read and then ignored."""

    def train_weights(**options) -> dict[str, torch.Tensor]:
        return fit(run_of(many_images, ALL_OPTIONS | {"epochs": 1} | options, SMALL, mix="mixup")[0])["raw"].state

    reference = train_weights()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in train_weights().items())
    for change in (
        {"rdrop_alpha": 0.0}, {"sam_rho": 0.0}, {"sam_rho": 0.1}, {"max_grad_norm": 0.0}, {"grad_accum_steps": 1},
        {"label_smoothing": 0.0}, {"sampler": "shuffle"}, {"loss": {"name": "focal", "gamma": 1.0}},
        {"backbone_lr_scale": 0.5}, {"freeze_epochs": 1},
    ):  # fmt: skip
        assert not torch.equal(reference["head.1.weight"], train_weights(**change)["head.1.weight"]), change


def test_defect_car_convnext_raw_and_ema_weights_are_selected_by_their_own_scores(tmp_path):
    """The original kept the raw weights of the epoch in which the average was best."""
    hard_images = images_in(tmp_path, 24, size=6, noise=180, tint=30)
    noisy_codes = (np.arange(24) + (np.arange(24) < 8)) % 3  # wrong labels, so that overconfidence soon raises the loss
    ema_settings = {"ema_decay": 0.98, "lr": 0.01, "epochs": 8, "schedule": "constant"}
    assert list(run_of(hard_images, ema_settings)[0].scored_models) == ["ema"]
    trainer, _ = run_of(hard_images, ema_settings | {"save_raw_weights": True}, valid_codes=noisy_codes)
    scores = {"ema": [], "raw": []}

    def observe(row):
        for name, model in trainer.scored_models.items():
            scores[name].append(validate(model, trainer.valid, trainer)["logloss"])

    best = fit(replace(trainer, observers=[observe]))
    assert list(best) == ["ema", "raw"]
    for name, losses in scores.items():
        assert best[name].epoch == 1 + int(np.argmin(losses))
        assert best[name].scores["logloss"] == min(losses)
        trainer.scored_models[name].load_state_dict(best[name].state)
        assert validate(trainer.scored_models[name], trainer.valid, trainer)["logloss"] == min(losses)
    assert best["ema"].epoch != best["raw"].epoch
