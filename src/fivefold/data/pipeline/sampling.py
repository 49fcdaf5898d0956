"""Samplers by name: which rows an epoch uses, and in which order. Only (seed, epoch) decides."""

from collections.abc import Callable

import numpy as np

from fivefold.data.pipeline.dataset import Sample, Stream, count_batches, epoch_batches, generator

Sampler = Callable[..., list[list[Sample]]]
REPEAT = 1 << 32
"""Larger than any epoch. A repetition adds it to the epoch number, so that each repetition has its own augmentation."""


def shuffle(codes: np.ndarray, batch_size: int, seed: int, epoch: int, drop_last: bool = False) -> list[list[Sample]]:
    """Return every row once, in shuffled order."""
    return epoch_batches(len(codes), batch_size, seed, epoch, drop_last)


def balanced(codes: np.ndarray, batch_size: int, seed: int, epoch: int, drop_last: bool = False) -> list[list[Sample]]:
    """Return as many samples as there are rows, with equal counts of each class in `codes` [N] (they differ by at most one).

    A class cycles through its rows in a new order each time, so no row repeats before all were used.
    Rows without a label (-1) are used once each.
    """
    random = generator(Stream.BALANCE, seed, epoch)
    unlabelled = [(epoch, int(row)) for row in np.flatnonzero(codes < 0)]
    classes = random.permutation(np.unique(codes[codes >= 0]))
    quota, more = divmod(len(codes) - len(unlabelled), max(len(classes), 1))
    samples = list(unlabelled)
    for index, code in enumerate(classes):
        samples += _rounds(np.flatnonzero(codes == code), quota + (index < more), epoch, random)
    shuffled = [samples[index] for index in random.permutation(len(samples))]
    batches = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return batches[: count_batches(len(shuffled), batch_size, drop_last)]


def _rounds(rows: np.ndarray, count: int, epoch: int, random: np.random.Generator) -> list[Sample]:
    """Return `count` samples of `rows`, with a new permutation in every pass over the rows."""
    rounds = -(-count // len(rows))
    samples = [(epoch + REPEAT * number, int(row)) for number in range(rounds) for row in random.permutation(rows)]
    return samples[:count]


SAMPLERS: dict[str, Sampler] = {
    "shuffle": shuffle,
    "balanced": balanced,
}
