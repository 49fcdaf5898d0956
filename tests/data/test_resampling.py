"""Boxes resized at once in whole numbers are, to the byte, what torch makes of each on a CPU."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fivefold.data.resampling import Boxes, Taps, count_taps, resampled
from fivefold.data.transforms import resize

CPU = torch.device("cpu")
SIZES = [(1, 1), (8, 8), (7, 64), (64, 7), (33, 50), (224, 224), (300, 200)]


def laid_out(images: Sequence[np.ndarray]) -> tuple[Tensor, list[int]]:
    """All pixels [P, 3] one image after the other, and where each image begins."""
    ends = np.cumsum([image.shape[0] * image.shape[1] for image in images])
    return torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images])), [0, *ends.tolist()]


def drawn(random: np.random.Generator, most: int, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Images of noise, up to `most` pixels high and wide, and a box (top, left, height, width) in each."""
    images, boxes = [], []
    for _ in range(count):
        height, width = random.integers(1, most + 1, 2)
        h, w = random.integers(1, height + 1), random.integers(1, width + 1)
        images.append(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        boxes.append((random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w))
    return images, np.array(boxes)


def made(images: Sequence[np.ndarray], boxes: np.ndarray, size: tuple[int, int], device: torch.device = CPU) -> Tensor:
    pixels, begins = laid_out(images)
    origin = [begin + b[0] * i.shape[1] + b[1] for begin, b, i in zip(begins, boxes, images, strict=False)]
    stride = [image.shape[1] for image in images]
    rows, columns = (torch.arange(n).expand(len(images), n) for n in size)
    numbers = [torch.tensor(each) for each in (origin, stride, boxes[:, 2], boxes[:, 3])]
    there = [each.to(device) for each in (*numbers, rows, columns)]
    return resampled(pixels.to(device), Boxes(*there, int(boxes[:, 2].max()), int(boxes[:, 3].max()), size)).cpu()


def one_by_one(images: Sequence[np.ndarray], boxes: np.ndarray, size: tuple[int, int]) -> Tensor:
    shown = [
        torch.from_numpy(image).permute(2, 0, 1)[:, top : top + height, left : left + width]
        for image, (top, left, height, width) in zip(images, boxes, strict=True)
    ]
    return torch.stack([resize(each, size) for each in shown])


@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_are_those_of_a_resize_of_each(size):
    images, boxes = drawn(np.random.default_rng(size), 320, 24)
    found = made(images, boxes, size)
    assert torch.equal(found, one_by_one(images, boxes, size))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_whatever_the_batch_it_is_in():
    images, boxes = drawn(np.random.default_rng(1), 100, 6)
    alone = [made([image], box[None], (20, 30)) for image, box in zip(images, boxes, strict=True)]
    assert torch.equal(torch.cat(alone), made(images, boxes, (20, 30)))


def test_extremes_black_white_and_shrunk_a_hundredfold():
    random = np.random.default_rng(2)
    values = [np.zeros, np.ones, lambda shape: random.integers(0, 2, shape), lambda shape: random.random(shape)]
    images = [(255 * value((900, 700, 3))).astype(np.uint8) for value in values]
    boxes = np.array([(0, 0, 900, 700)] * 4)
    assert torch.equal(made(images, boxes, (9, 5)), one_by_one(images, boxes, (9, 5)))


def test_weights_of_a_case_worked_by_hand():
    # four pixels to two: a triangle 2 pixels to each side of 1 and of 3, so 3/4, 3/4 and 1/4 of seven fourths
    taps = Taps.of(torch.tensor([4]), torch.tensor([[0, 1, -1]]), 2, 4)
    assert taps.bits.tolist() == [16]  # 3/7 of 2^16 is below 2^15, of 2^17 it is not
    assert taps.weights[:, 0, 0].tolist() == [28087, 28087, 9362, 0, 0]
    assert taps.at[:3, 0, 0].tolist() == [0, 1, 2]
    assert taps.weights[:, 0, 1].tolist() == [9362, 28087, 28087, 0, 0]
    assert taps.at[:3, 0, 1].tolist() == [1, 2, 3]
    assert taps.weights[:, 0, 2].tolist() == [0] * 5, "black"


@pytest.mark.parametrize(("length", "size", "count"), [(5, 5, 3), (1, 9, 3), (4, 2, 5), (5, 2, 7), (100, 1, 201)])
def test_how_many_pixels_one_is_a_sum_of_at_most(length, size, count):
    assert count_taps(length, size) == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_the_bytes_are_the_cpus(size):
    images, boxes = drawn(np.random.default_rng(size), 320, 24)
    assert torch.equal(made(images, boxes, size, torch.device("cuda")), one_by_one(images, boxes, size))
