import numpy as np
import pytest
import torch

from fivefold.data.pipeline.dataset import Stream, count_batches, make_generator
from fivefold.data.pipeline.loader import REPEAT, SAMPLERS, balanced, shuffle
from fivefold.training.mixing import Mixing
from fivefold.training.objectives import MicroBatch

CODES = np.repeat([0, 1, 2], [60, 9, 3])


def rows_of(batches) -> np.ndarray:
    return np.array([row for batch in batches for _, row in batch])


def test_balanced_draws_classes_equally_and_repeats_rows_evenly():
    rows = rows_of(balanced(CODES, 8, seed=3, epoch=2))
    assert np.bincount(CODES[rows]).tolist() == [24, 24, 24]
    repeats = np.bincount(rows, minlength=len(CODES))
    for code in range(3):
        assert np.ptp(repeats[code == CODES]) <= 1


def test_balanced_gives_the_remainder_to_varying_classes():
    codes = np.repeat([0, 1, 2], [5, 5, 1])
    counts = [np.bincount(codes[rows_of(balanced(codes, 4, 0, epoch))], minlength=3) for epoch in range(40)]
    assert all(count.max() - count.min() <= 1 for count in counts)
    assert {tuple(count - 3) for count in counts} >= {(1, 1, 0), (1, 0, 1), (0, 1, 1)}


def test_repeated_rows_get_different_augmentation_seeds():
    first = balanced(CODES, 8, seed=3, epoch=1)
    assert balanced(CODES, 8, seed=3, epoch=1) == first
    assert first not in (balanced(CODES, 8, seed=3, epoch=2), balanced(CODES, 8, seed=4, epoch=1))
    samples = [sample for batch in first for sample in batch]
    assert len(set(samples)) == len(samples)
    assert {epoch % REPEAT for epoch, _ in samples} == {1}


def test_balanced_draws_each_unlabelled_row_once():
    codes = np.array([0, 0, 0, 0, 1, 1, -1, -1, -1])
    rows = rows_of(balanced(codes, 3, seed=0, epoch=1))
    assert sorted(rows[codes[rows] == -1].tolist()) == [6, 7, 8]
    assert np.bincount(codes[rows][codes[rows] >= 0]).tolist() == [3, 3]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("codes", [np.zeros(9, int), np.arange(9) % 4, np.full(9, -1)])
def test_every_sampler_returns_the_scheduled_number_of_batches(name, codes):
    for size in (1, 2, 4, 20):
        for drop_last in (False, True):
            assert len(SAMPLERS[name](codes, size, 0, 1, drop_last)) == count_batches(len(codes), size, drop_last)


def test_random_streams_are_independent():
    """NumPy pads keys with zeros: (seed, epoch) alone would equal (seed, epoch, step 0, part 0)."""
    (batch,) = shuffle(range(40), 40, 7, 3)
    plain = [np.random.default_rng(key).permutation(40).tolist() for key in ([7, 3], (7, 3, 0, 0))]
    assert [row for _, row in batch] == plain[0] == plain[1]
    streams = [
        make_generator(stream, 7, 3, *rest).permutation(40).tolist() for stream in Stream for rest in ((), (0, 0))
    ]
    assert len({tuple(order) for order in [plain[0], *streams]}) == 1 + 2 * len(Stream)
    mixed = Mixing("mixup", 1.0, 1.0)(
        MicroBatch(torch.zeros(40, 3, 2, 2), torch.arange(40.0)[:, None]), 3, (7, 3, 0, 0)
    )
    random = make_generator(Stream.MIX, 7, 3, 0, 0)
    random.random()
    lam, order = random.beta(1.0, 1.0), random.permutation(40)
    np.testing.assert_allclose(mixed.targets[:, 0], lam * np.arange(40) + (1 - lam) * order, rtol=1e-5)
