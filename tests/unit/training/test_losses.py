import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from fivefold.errors import SettingsError
from fivefold.training.losses import LOSSES, balanced_weights, bce, binary_focal, build_loss, cross_entropy, f1, focal
from fivefold.training.objectives import MicroBatch, distillation_loss

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-3.0, 4.0, 1.0], [0.0, 0.0, 0.0]])
CODES = torch.tensor([0, 2, 1, 1])
ONE_HOT = F.one_hot(CODES, 3).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_cross_entropy_matches_torch(smoothing):
    actual = cross_entropy(smoothing)(LOGITS, ONE_HOT)
    torch.testing.assert_close(actual, F.cross_entropy(LOGITS, CODES, label_smoothing=smoothing))


def test_distillation_matches_a_manual_calculation():
    """α·T²·KL + (1 - α)·CE of two classes, from the definition. A sigmoid student that equals its teacher has no loss."""
    logits, teacher, temperature, alpha = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.75, 0.25]]), 2.0, 0.7
    student = torch.softmax(logits / temperature, dim=1)
    kl = 0.75 * torch.log(0.75 / student[0, 0]) + 0.25 * torch.log(0.25 / student[0, 1])
    hard = -torch.log(torch.softmax(logits, dim=1)[0, 0])
    rows = MicroBatch(logits, torch.tensor([[1.0, 0.0]]), teacher)
    loss = distillation_loss(cross_entropy(0.0), lambda: alpha, lambda: temperature)(logits, rows)
    torch.testing.assert_close(loss, alpha * temperature**2 * kl + (1 - alpha) * hard)
    loss = distillation_loss(bce(0.0), lambda: 1.0, lambda: 1.0)(teacher.logit(), rows)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_focal_loss_matches_a_manual_calculation():
    """p = 0.8 for the true class: 0.5 · 0.2² · -ln 0.8 = 0.004463; for a 50:50 target, the mean of 0.5·0.2²·-ln .8 and 0.5·0.8²·-ln .2."""
    logits = torch.tensor([[4.0, 1.0]]).log()
    loss = focal(0.0, gamma=2.0, alpha=0.5)
    assert float(loss(logits, torch.tensor([[1.0, 0.0]]))) == pytest.approx(0.004463, abs=1e-6)
    assert float(loss(logits, torch.tensor([[0.5, 0.5]]))) == pytest.approx((0.004463 + 0.515020) / 2, abs=1e-6)


def test_focal_gradient_is_finite_for_certain_predictions():
    logits = torch.tensor([[60.0, -60.0], [-60.0, 60.0]], requires_grad=True)
    focal(0.0, gamma=0.5)(logits, torch.tensor([[1.0, 0.0], [1.0, 0.0]])).backward()
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_binary_focal_matches_torchvision_and_bce_matches_torch(gamma):
    expected = sigmoid_focal_loss(LOGITS, ONE_HOT, alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(binary_focal(0.0, gamma=gamma)(LOGITS, ONE_HOT), expected)
    if not gamma:
        soft = torch.tensor([[0.2, 0.3, 0.5]] * 4)
        torch.testing.assert_close(bce(0.0)(LOGITS, soft), F.binary_cross_entropy_with_logits(LOGITS, soft))


def test_label_smoothing_is_spread_over_the_other_classes():
    """The true class gets 1 - s, and each of the two others s/2."""
    target = torch.full((4, 3), 0.1).scatter(1, CODES[:, None], 0.8)
    actual = build_loss({"name": "label_smoothing", "smoothing": 0.2})(LOGITS, ONE_HOT)
    torch.testing.assert_close(actual, F.cross_entropy(LOGITS, target))


def test_f1_loss_matches_a_manual_calculation():
    """Certain predictions match scikit-learn. For p .8/.2 and .4/.6 of classes 0 and 1, F1 is 1.6/2.2 and 1.2/1.8; absent classes are ignored."""
    truth, predicted = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 1, 2, 0, 2])
    certain = f1(0.0)(F.one_hot(predicted, 3) * 100.0, F.one_hot(truth, 3).float())
    assert float(certain) == pytest.approx(1 - f1_score(truth, predicted, average="macro"), abs=1e-6)
    logits = torch.tensor([[0.8, 0.2, 1e-30], [0.4, 0.6, 1e-30]]).log()
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert float(f1(0.0)(logits, targets)) == pytest.approx(1 - (1.6 / 2.2 + 1.2 / 1.8) / 2, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_accepts_soft_targets_ignores_unlabelled_rows_and_has_a_gradient(name):
    loss = build_loss(name)
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 0.0], [0.0, 0.4, 0.6], [0.0, 1.0, 0.0]])
    logits = LOGITS.clone().requires_grad_()
    value = loss(logits, targets)
    torch.testing.assert_close(value, loss(LOGITS[[0, 2, 3]], targets[[0, 2, 3]]))
    value.backward()
    value = value.detach()
    assert float(logits.grad[1].abs().max()) == 0
    assert float(logits.grad[0].abs().max()) > 0
    assert float(loss(LOGITS, torch.zeros_like(targets))) == 0
    assert float(loss(LOGITS - 0.01 * logits.grad, targets)) < float(value)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_class_weights_match_torch(gamma):
    weights = torch.tensor([0.5, 2.0, 1.3])
    loss = build_loss({"name": "focal", "gamma": gamma}, weights=weights)
    log_p = LOGITS.log_softmax(dim=1)
    expected = F.nll_loss((1 - log_p.exp()) ** gamma * log_p, CODES, weight=weights)
    torch.testing.assert_close(loss(LOGITS, ONE_HOT), expected)
    if not gamma:
        actual = build_loss("cross_entropy", weights=weights)(LOGITS, ONE_HOT)
        torch.testing.assert_close(actual, F.cross_entropy(LOGITS, CODES, weight=weights))


def test_balanced_weights_match_scikit_learn():
    codes = np.repeat([0, 1, 2], [7, 2, 1])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=codes)
    actual = balanced_weights(F.one_hot(torch.from_numpy(codes), 3).float())
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "smoothing", "message"),
    [
        ("focall", 0.0, "unknown loss 'focall'; did you mean 'focal'"),
        ({"name": "focal", "gama": 2}, 0.0, "gama"),
        ({"name": "focal", "gamma": -1}, 0.0, "at least 0"),
        ({"name": "focal", "alpha": 0}, 0.0, "above 0"),
        ({"name": "label_smoothing", "smoothing": 1}, 0.0, "smoothing < 1"),
        ("label_smoothing", 0.1, "train.label_smoothing=0"),
    ],
)
def test_invalid_losses_are_rejected_with_a_reason(spec, smoothing, message):
    with pytest.raises(SettingsError, match=message):
        build_loss(spec, smoothing)


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_link_returns_the_true_probabilities_at_the_minimum_of_the_loss(name):
    """One class has .9, nine have .0111: softmax of logits trained with binary cross-entropy would give .989."""
    truth = torch.tensor([[0.9] + [0.1 / 9] * 9], dtype=torch.float64)
    logits = (truth.logit() if name == "bce" else truth.log()).requires_grad_()
    loss = build_loss(name)
    loss(logits, truth).backward()
    assert float(logits.grad.abs().max()) < 1e-12, "the loss is at its minimum"
    torch.testing.assert_close(loss.scores(logits.detach()).softmax(dim=1), truth)


def test_only_bce_and_binary_focal_use_sigmoid_links():
    assert {name for name in LOSSES if build_loss(name).link == "sigmoid"} == {"bce", "binary_focal"}
