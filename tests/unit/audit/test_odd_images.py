"""Each kind of odd image is found among ordinary ones, and ordinary ones are not."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from fivefold.audit.odd_images import find_odd, measure, shown
from fivefold.config.schema import Data
from fivefold.data.image_io import decode_options


def photograph(random: np.random.Generator, size: tuple[int, int] = (120, 90), background: int = 60) -> Image.Image:
    """Draw a coloured texture of blobs before a background."""
    noise = random.integers(0, 256, (size[1] // 3, size[0] // 3, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image).copy()
    pixels[: size[1] // 4] = background + random.integers(-8, 8, 3)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    target = io.BytesIO()
    image.save(target, kind)
    return target.getvalue()


def problems_of(images: list[tuple[str, bytes]]) -> dict[str, set[str]]:
    options = decode_options(Data())
    odd = find_odd(pd.DataFrame([measure(content, name, options) for name, content in images]))
    return odd.groupby("row")["problem"].agg(set).rename(lambda row: images[row][0]).to_dict()


@pytest.mark.parametrize("background", [60, 250])
def test_each_kind_of_odd_image_is_found_and_ordinary_ones_are_not(background):
    random = np.random.default_rng(1)
    ordinary = [
        photograph(random, (random.integers(110, 130), random.integers(85, 100)), background) for _ in range(80)
    ]
    image = photograph(random, background=background)
    framed = Image.new("RGB", image.size)
    framed.paste(image.resize((80, 60)), (20, 15))
    odd = {
        "dark": image.point(lambda value: value // 12),
        "bright": image.point(lambda value: 244 + value // 24),
        "blurred": image.filter(ImageFilter.GaussianBlur(6)),
        "tiny": photograph(random, (16, 12), background),
        "wide": photograph(random, (400, 60), background),
        "tall": photograph(random, (60, 400), background),
        "plain": Image.new("RGB", (120, 90), (128, 90, 60)),
        "black border": framed,
        "grey": image.convert("L"),
    }
    files = [(f"{number}.png", encode(one)) for number, one in enumerate(ordinary)]
    files += [(f"{name}.png", encode(one)) for name, one in odd.items()]
    files.append(("wrong suffix.png", encode(image, "JPEG")))
    found = problems_of(files)
    assert {name.removesuffix(".png"): True for name in found} == dict.fromkeys([*odd, "wrong suffix"], True)
    for name, problems in found.items():
        assert name.removesuffix(".png") in problems, problems


def test_images_of_one_kind_have_no_odd_ones():
    image = encode(photograph(np.random.default_rng(0)).convert("L"))
    assert problems_of([(f"{number}.png", image) for number in range(5)]) == {}


def test_figures_are_shown_in_units_of_people():
    assert [shown("shorter_side", 7.0), shown("aspect", -1.0), shown("entropy", 6.5)] == ["128 px", "0.50", "6.50"]
