"""Samplers by name: which rows an epoch takes, in which order; (seed, epoch) alone decides."""

from collections.abc import Callable

import numpy as np

from fivefold.data.dataset import Sample, Stream, count_batches, epoch_batches, generator

Sampler = Callable[..., list[list[Sample]]]
REPEAT = 1 << 32
"""Epochs lie below it, so a repeated row has a number, and with it an augmentation, of its own."""


def shuffle(codes: np.ndarray, batch_size: int, seed: int, epoch: int, drop_last: bool = False) -> list[list[Sample]]:
    """Every row once."""
    return epoch_batches(len(codes), batch_size, seed, epoch, drop_last)


def balanced(codes: np.ndarray, batch_size: int, seed: int, epoch: int, drop_last: bool = False) -> list[list[Sample]]:
    """As many rows as there are, the classes of `codes` [N] in equal parts (they differ by one at most).

    A class goes through its rows in a new order again and again, so none is taken twice before all
    were taken once. Rows without a label (-1) are taken once each.
    """
    random = generator(Stream.BALANCE, seed, epoch)
    unlabelled = [(epoch, int(row)) for row in np.flatnonzero(codes < 0)]
    classes = random.permutation(np.unique(codes[codes >= 0]))
    quota, more = divmod(len(codes) - len(unlabelled), max(len(classes), 1))
    samples = list(unlabelled)
    for place, code in enumerate(classes):
        samples += _rounds(np.flatnonzero(codes == code), quota + (place < more), epoch, random)
    shuffled = [samples[place] for place in random.permutation(len(samples))]
    batches = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return batches[: count_batches(len(shuffled), batch_size, drop_last)]


def _rounds(rows: np.ndarray, count: int, epoch: int, random: np.random.Generator) -> list[Sample]:
    """`count` samples of `rows`, round after round."""
    rounds = -(-count // len(rows))
    samples = [(epoch + REPEAT * number, int(row)) for number in range(rounds) for row in random.permutation(rows)]
    return samples[:count]


SAMPLERS: dict[str, Sampler] = {
    "shuffle": shuffle,
    "balanced": balanced,
}
