"""The picture of some images with truth and prediction: all of them, of any size, in their places."""

import io

import numpy as np
import pytest
from PIL import Image

from fivefold.evaluation.drawing import THEMES
from fivefold.evaluation.examples import CAPTION, COLUMNS, GAP, SIDE, image_grid, spread_out

RED, GREEN, BLUE = (230, 20, 20), (20, 230, 20), (20, 20, 230)


def drawn(images: list[np.ndarray], truth: list[str], guesses: list[str], theme: str = "light") -> np.ndarray:
    target = io.BytesIO()
    image_grid(images, truth, guesses, target, theme)
    assert target.getvalue() == again(images, truth, guesses, theme), "the same bytes"
    return np.asarray(Image.open(target).convert("RGB"))


def again(*arguments) -> bytes:
    target = io.BytesIO()
    image_grid(*arguments[:3], target, arguments[3])
    return target.getvalue()


def plain(colour: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


@pytest.mark.parametrize("theme", THEMES)
def test_every_image_stands_whole_in_its_place(theme: str):
    colours = [RED, GREEN, BLUE, RED, GREEN]
    images = [
        plain(c, *size) for c, size in zip(colours, [(40, 20), (500, 1000), (1, 1), (320, 320), (7, 900)], strict=True)
    ]
    sizes = [(320, 160), (160, 320), (320, 320), (320, 320), (2, 320)]
    picture = drawn(images, ["a"] * 5, ["a"] * 4 + ["b"], theme)
    assert picture.shape == (3 * GAP + 2 * CAPTION + 320 + 2, COLUMNS * (SIDE + GAP) + GAP, 3)
    for number, (colour, (height, width)) in enumerate(zip(colours, sizes, strict=True)):
        left = GAP + number % COLUMNS * (SIDE + GAP)
        top = GAP + CAPTION + number // COLUMNS * (CAPTION + SIDE + GAP)
        assert (picture[top : top + height, left : left + width] == colour).all()
        around = picture[top : top + SIDE, left + width : left + SIDE + GAP]
        assert not (around == colour).all(axis=2).any()


def test_captions_are_in_the_colour_of_what_they_say():
    images = [plain((128, 128, 128), 10, 10)] * 2
    picture = drawn(images, ["cat", "cat"], ["cat", "dog"]).astype(int)
    right, wrong = (
        tuple(int(value[at : at + 2], 16) for at in (1, 3, 5))
        for value in (THEMES["light"].text, THEMES["light"].wrong)
    )
    for number, (own, other) in enumerate(((right, wrong), (wrong, right))):
        left = GAP + number * (SIDE + GAP)
        caption = picture[GAP : GAP + CAPTION, left : left + SIDE]
        assert (np.abs(caption - own).sum(axis=2) < 30).sum() > 20
        assert not (np.abs(caption - other).sum(axis=2) < 30).any()


def test_small_images_keep_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture = drawn([image], ["a"], ["a"])
    shown = picture[GAP + CAPTION : GAP + CAPTION + SIDE, GAP : GAP + SIDE]
    assert np.array_equal(shown, image.repeat(SIDE // 8, 0).repeat(SIDE // 8, 1))


def test_shown_rows_are_spread_over_all():
    assert spread_out(3).tolist() == [0, 1, 2]
    found = spread_out(1000)
    assert (len(found), found[0], found[-1]) == (16, 0, 999)
