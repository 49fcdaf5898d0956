from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.data.batched import together
from fivefold.data.dataset import ImageSet, derive_seed
from fivefold.data.jitter import drawn_colours, drawn_similarity, recoloured, sampled
from fivefold.data.store import FolderStore
from fivefold.data.transforms import build_transforms
from fivefold.settings import arguments_layer, load

CHAINS = {
    "a crop, a flip": [{"name": "random_crop", "padding": 3}, "horizontal_flip"],
    "black around": [{"name": "random_crop", "padding": 5, "mode": "constant"}],
    "edges repeated": [
        {"name": "random_crop", "padding": 2, "mode": "replicate"},
        {"name": "horizontal_flip", "p": 0.2},
    ],
    "the other side": [{"name": "random_crop", "padding": 2, "mode": "circular"}],
    "a step now and then": [
        "resize",
        {"name": "shift_scale_rotate", "shift": 0.1, "p": 0.5},
        {"name": "linear_colour_jitter", "cast": 0.1, "p": 0.3},
        "horizontal_flip",
    ],
    "a step that never is": ["resize", {"name": "linear_colour_jitter", "p": 0}],
}


def images_of(count: int, chain: list, size: tuple[int, int], stored: list[tuple[int, int]]) -> ImageSet:
    random = np.random.default_rng(1)
    found = ImageSet(FolderStore(Path()), [""] * count, build_transforms(chain, size), seed=3)
    found.kept = [random.integers(0, 256, (*stored[row % len(stored)], 3), dtype=np.uint8) for row in range(count)]
    return found


def alone(images: ImageSet, epoch: int, row: int) -> torch.Tensor:
    """The sample as its chain makes it of one image."""
    torch.manual_seed(derive_seed(images.seed, epoch, row))
    return images.transform(torch.from_numpy(images.kept[row]).permute(2, 0, 1))


@pytest.mark.parametrize("stored", [[(12, 16)], [(12, 16), (30, 20), (9, 40)]], ids=["as large", "of many sizes"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_sample_is_the_same_bytes_in_a_batch_as_alone(name, stored):
    images = images_of(40, CHAINS[name], (12, 16), stored)
    assert images.together is not None
    samples = [(epoch, row) for epoch in (1, 2) for row in range(40)]
    batch = images.__getitems__(samples).images
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for found, (epoch, row) in zip(batch, samples, strict=True):
        assert torch.equal(found, alone(images, epoch, row))
    first, second = batch[:40], batch[40:]
    assert torch.equal(first, second) == (name == "a step that never is")


def test_the_recipe_of_small_images_works_together_whatever_the_batch_and_the_threads():
    chain = list(load([arguments_layer(["recipe=small_images"])]).augment.train)
    images = images_of(64, chain, (32, 32), [(32, 32)])
    samples = [(4, row) for row in range(64)]
    whole = images.__getitems__(samples).images
    parts = torch.cat([images.__getitems__(samples[start : start + 7]).images for start in range(0, 64, 7)])
    assert torch.equal(whole, parts)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        assert torch.equal(whole, images.__getitems__(samples).images)
    finally:
        torch.set_num_threads(threads)


def test_what_is_kept_is_not_written_to():
    images = images_of(8, CHAINS["a step now and then"], (12, 16), [(12, 16)])
    before = [pixels.copy() for pixels in images.kept]
    images.__getitems__([(1, row) for row in range(8)])
    assert all(np.array_equal(pixels, old) for pixels, old in zip(images.kept, before, strict=True))


@pytest.mark.parametrize(
    "chain",
    [["random_resized_crop"], ["horizontal_flip"], ["resize", "color_jitter"], [{"name": "random_crop", "p": 0.5}]],
    ids=["boxes of their own", "sizes of their own", "a transform of torchvision's", "a size now and then"],
)
def test_other_chains_transform_each_image_by_itself(chain):
    assert together(build_transforms(chain, (12, 16))) is None


def test_maps_are_those_of_matrices():
    """Against the same maps as matrix products, in float64 where it counts."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 10, 14), dtype=torch.uint8)
    moves = torch.tensor([drawn_similarity(0.1, (0.8, 1.25), 20, 1.3) for _ in range(5)], dtype=torch.float64)
    grid = torch.nn.functional.affine_grid(shaped(moves, 10 / 14), (5, 3, 10, 14), align_corners=False)
    expected = torch.nn.functional.grid_sample(images.double(), grid, padding_mode="reflection", align_corners=False)
    assert (sampled(images, moves).double() - expected).abs().max() <= 0.51

    colours = torch.tensor([drawn_colours(0.1, 0.3, 0.4, 0.05) for _ in range(5)], dtype=torch.float64)
    mixing = torch.diag_embed(colours[:, :1].expand(5, 3)) + colours[:, 1, None, None]
    mixed = mixing @ images.double().flatten(2) + colours[:, 2:, None]
    found = recoloured(images, colours).double().flatten(2)
    assert (found - mixed.clamp(0, 255)).abs().max() <= 0.51


def shaped(moves: torch.Tensor, ratio: float) -> torch.Tensor:
    """The numbers as matrices [N, 2, 3] for sides that are 2 long each."""
    found = moves.view(-1, 2, 3).clone()
    found[:, 0, 1] *= ratio
    found[:, 1, 0] /= ratio
    return found
