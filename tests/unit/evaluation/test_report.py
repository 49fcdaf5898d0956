"""The page's small parts; the page as a whole is tested with the stage that writes it."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fivefold.evaluation import report


@pytest.mark.parametrize(
    ("value", "shown"), [(1234567, "1,234,567"), (0.5, "0.5000"), (None, "–"), (float("nan"), "–"), (float("inf"), "∞")]
)
def test_figures_as_people_read_them(value, shown):
    assert report.format_number(value) == shown
    shares = {0: "0.0", 0.1234: "12.3", 0.99999: "99.9", 1: "100"}  # less than all is never 100 percent
    assert [report.format_percent(share) for share in shares] == [
        f"{text}\N{NO-BREAK SPACE}%" for text in shares.values()
    ]


@pytest.mark.parametrize(
    ("shape", "format", "size"),
    [((8, 8), "PNG", (8, 8)), ((600, 300), "JPEG", (80, 160)), ((3, 2000), "JPEG", (160, 1))],
)
def test_thumbnails_keep_small_images_exact_and_make_large_ones_small(shape, format, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = report.thumbnail(pixels)
    with Image.open(BytesIO(found)) as image:
        assert (image.format, image.size) == (format, size)
        if format == "PNG":
            np.testing.assert_array_equal(np.asarray(image), pixels)
    assert report.data_uri(found).startswith(f"data:image/{format.lower()};base64,")
