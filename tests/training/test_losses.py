import pytest
import torch
import torch.nn.functional as F

from fivefold.training.losses import cross_entropy
from fivefold.training.objectives import Rows, distill, supervised

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-3.0, 4.0, 1.0], [0.0, 0.0, 0.0]])
CODES = torch.tensor([0, 2, 1, 1])
ONE_HOT = F.one_hot(CODES, 3).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_cross_entropy_is_torchs(smoothing):
    ours = cross_entropy(smoothing)(LOGITS, ONE_HOT)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, CODES, label_smoothing=smoothing))


def test_cross_entropy_of_soft_targets_is_torchs():
    soft = torch.tensor([[0.2, 0.3, 0.5]] * 4)
    torch.testing.assert_close(cross_entropy(0.1)(LOGITS, soft), F.cross_entropy(LOGITS, soft, label_smoothing=0.1))


def test_a_row_without_a_label_counts_for_nothing():
    targets = ONE_HOT.clone()
    targets[1] = 0
    labelled = [0, 2, 3]
    expected = cross_entropy(0.1)(LOGITS[labelled], ONE_HOT[labelled])
    torch.testing.assert_close(cross_entropy(0.1)(LOGITS, targets), expected)
    assert cross_entropy(0.1)(LOGITS, torch.zeros_like(targets)) == 0


def test_distillation_by_hand():
    """α·T²·KL + (1 - α)·CE of two classes, worked by hand from the definition."""
    logits, teacher, temperature, alpha = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.75, 0.25]]), 2.0, 0.7
    student = torch.softmax(logits / temperature, dim=1)
    kl = 0.75 * torch.log(0.75 / student[0, 0]) + 0.25 * torch.log(0.25 / student[0, 1])
    hard = -torch.log(torch.softmax(logits, dim=1)[0, 0])
    rows = Rows(logits, torch.tensor([[1.0, 0.0]]), teacher)
    result = distill(cross_entropy(0.0), alpha, temperature)(torch.nn.Identity(), rows)
    torch.testing.assert_close(result.loss, alpha * temperature**2 * kl + (1 - alpha) * hard)


def test_distillation_without_its_teachers_term_is_supervised():
    rows = Rows(LOGITS, ONE_HOT, torch.full((4, 3), 1 / 3))
    without = distill(cross_entropy(0.1), alpha=0.0, temperature=3.0)(torch.nn.Identity(), rows)
    plain = supervised(cross_entropy(0.1))(torch.nn.Identity(), rows)
    torch.testing.assert_close(without.loss, plain.loss)


def test_a_student_that_equals_its_teacher_has_no_loss_left():
    temperature = 1.7
    teacher = torch.softmax(LOGITS / temperature, dim=1)
    result = distill(cross_entropy(0.0), 1.0, temperature)(torch.nn.Identity(), Rows(LOGITS, ONE_HOT, teacher))
    assert abs(float(result.loss)) < 1e-6
