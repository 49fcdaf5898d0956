import numpy as np
import pytest
import torch

from fivefold.errors import SettingsError
from fivefold.training.mixing import Mixing, cutmix, mixup

IMAGES = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).reshape(4, 3, 8, 8)
TARGETS = torch.eye(4)
ORDER = torch.tensor([1, 2, 3, 0])


def test_mixup_at_lambda_one_is_the_identity():
    images, lam = mixup(IMAGES, 1.0, ORDER, np.random.default_rng(0))
    torch.testing.assert_close(images, IMAGES)
    assert lam == 1.0


def test_cutmix_at_lambda_one_is_the_identity():
    images, lam = cutmix(IMAGES, 1.0, ORDER, np.random.default_rng(0))
    torch.testing.assert_close(images, IMAGES)
    assert lam == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_says_the_share_that_is_left(seed):
    blank, other = torch.zeros(2, 3, 16, 12), torch.ones(2, 3, 16, 12)
    stacked = torch.cat([blank, other])
    mixed, lam = cutmix(stacked, 0.6, torch.tensor([2, 3, 0, 1]), np.random.default_rng(seed))
    assert lam == pytest.approx(1 - float(mixed[0].mean()))
    assert lam == pytest.approx(float(mixed[2].mean()))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(name):
    constant = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    images, targets, teacher = Mixing(name, alpha=1.0, p=1.0)(constant, TARGETS, TARGETS.clone(), (1, 2, 3))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    torch.testing.assert_close(teacher, targets)
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), targets @ torch.arange(4.0))


def test_the_seed_decides_and_nothing_else():
    mixing = Mixing("cutmix", alpha=1.0, p=0.5)
    first = mixing(IMAGES, TARGETS, None, (1, 2, 3))
    torch.rand(7)
    np.random.default_rng().random()
    again = mixing(IMAGES, TARGETS, None, (1, 2, 3))
    torch.testing.assert_close(first[0], again[0])
    kinds = {bool((mixing(IMAGES, TARGETS, None, (0, step))[1] != TARGETS).any()) for step in range(30)}
    assert kinds == {True, False}


def test_none_leaves_all_as_it_is():
    images, targets, teacher = Mixing("none", alpha=1.0, p=1.0)(IMAGES, TARGETS, None, (0,))
    assert images is IMAGES
    assert targets is TARGETS
    assert teacher is None


def test_an_unknown_name_is_explained():
    with pytest.raises(SettingsError, match="did you mean 'cutmix'"):
        Mixing("cutmx", 1.0, 1.0)(IMAGES, TARGETS, None, (0,))
