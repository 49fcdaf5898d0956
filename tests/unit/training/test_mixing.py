import numpy as np
import pytest
import torch

from fivefold.errors import SettingsError
from fivefold.training.mixing import Mixing, cutmix, mixup
from fivefold.training.objectives import MicroBatch

IMAGES = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).reshape(4, 3, 8, 8)
TARGETS = torch.eye(4)
ORDER = torch.tensor([1, 2, 3, 0])


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_returns_the_remaining_area_as_lambda(seed):
    zeros, ones = torch.zeros(2, 3, 16, 12), torch.ones(2, 3, 16, 12)
    stacked = torch.cat([zeros, ones])
    mixed, lam = cutmix(stacked, 0.6, stacked[[2, 3, 0, 1]], np.random.default_rng(seed))
    assert lam == pytest.approx(1 - float(mixed[0].mean()))
    assert lam == pytest.approx(float(mixed[2].mean()))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_are_mixed_like_the_images(name):
    constant = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    rows = MicroBatch(constant, TARGETS, teacher=TARGETS.clone(), meta=torch.arange(4.0)[:, None])
    mixed = Mixing(name, alpha=1.0, p=1.0)(rows, 1, (1, 2, 3))
    torch.testing.assert_close(mixed.targets.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(mixed.teacher, mixed.targets)
    torch.testing.assert_close(mixed.images.mean(dim=(1, 2, 3)), mixed.targets @ torch.arange(4.0))
    torch.testing.assert_close(mixed.meta[:, 0], mixed.targets @ torch.arange(4.0))


def test_mixing_depends_only_on_the_seed():
    mixing = Mixing("cutmix", alpha=1.0, p=0.5)
    first = mixing(MicroBatch(IMAGES, TARGETS), 1, (1, 2, 3))
    torch.rand(7)
    np.random.default_rng().random()
    second = mixing(MicroBatch(IMAGES, TARGETS), 1, (1, 2, 3))
    torch.testing.assert_close(first.images, second.images)
    is_mixed = {
        bool((mixing(MicroBatch(IMAGES, TARGETS), 1, (0, step)).targets != TARGETS).any()) for step in range(30)
    }
    assert is_mixed == {True, False}
    with pytest.raises(SettingsError, match="did you mean 'cutmix'"):
        Mixing("cutmx", 1.0, 1.0)(MicroBatch(IMAGES, TARGETS), 1, (0,))


@pytest.mark.parametrize(("name", "last", "mixed"), [("cutmix", 3, [1, 3]), ("mixup", -3, []), ("none", None, [])])
def test_mixing_stops_after_its_last_epoch(name, last, mixed):
    mixing, rows = Mixing(name, alpha=1.0, p=1.0, last=last), MicroBatch(IMAGES, TARGETS)
    assert [epoch for epoch in (1, 3, 4, 9) if mixing(rows, epoch, (0, epoch)) is not rows] == mixed


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_with_lambda_one_is_the_identity(mix):
    images, lam = mix(IMAGES, 1.0, IMAGES[ORDER], np.random.default_rng(0))
    torch.testing.assert_close(images, IMAGES)
    assert lam == 1.0
