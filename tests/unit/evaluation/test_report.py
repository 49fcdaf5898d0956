"""Parts of the report page. The tests of the evaluate stage cover the whole page."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fivefold.evaluation import report


@pytest.mark.parametrize(
    ("value", "text"), [(1234567, "1,234,567"), (0.5, "0.5000"), (None, "–"), (float("nan"), "–"), (float("inf"), "∞")]
)
def test_numbers_and_percentages_are_formatted_for_people(value, text):
    assert report.format_number(value) == text
    shares = {0: "0.0", 0.1234: "12.3", 0.99999: "99.9", 1: "100"}  # a share below 1 is never 100 percent
    assert [report.format_percent(share) for share in shares] == [
        f"{percent}\N{NO-BREAK SPACE}%" for percent in shares.values()
    ]


@pytest.mark.parametrize(
    ("shape", "format", "size"),
    [((8, 8), "PNG", (8, 8)), ((600, 300), "JPEG", (80, 160)), ((3, 2000), "JPEG", (160, 1))],
)
def test_thumbnails_keep_small_images_exact_and_shrink_large_ones(shape, format, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    thumbnail = report.thumbnail(pixels)
    with Image.open(BytesIO(thumbnail)) as image:
        assert (image.format, image.size) == (format, size)
        if format == "PNG":
            np.testing.assert_array_equal(np.asarray(image), pixels)
    assert report.data_uri(thumbnail).startswith(f"data:image/{format.lower()};base64,")
