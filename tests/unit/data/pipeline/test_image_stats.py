import numpy as np
import pytest
from PIL import Image

from fivefold.data.pipeline.dataset import color_mean, count_stats, image_stats
from fivefold.errors import SettingsError


@pytest.mark.parametrize(
    ("names", "count"), [([], 0), (["aspect"], 1), (["color_mean"], 3), (["color_mean", "aspect"], 4)]
)
def test_image_stats_concatenates_features_in_order(names, count):
    pixels = np.full((10, 25, 3), (255, 51, 0), np.uint8)
    expected = {"aspect": [2.5], "color_mean": [1.0, 0.2, 0.0]}
    stats = image_stats(pixels, names)
    assert stats.dtype == np.float32
    np.testing.assert_allclose(stats, [number for name in names for number in expected[name]], atol=1e-6)
    assert count_stats(names) == len(stats) == count
    with pytest.raises(SettingsError, match="did you mean 'color_mean'"):
        count_stats([*names, "color"])


def test_color_mean_is_the_mean_of_the_image_resized_to_16_pixels():
    large = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(large).resize((16, 16))).reshape(-1, 3).mean(axis=0) / 255
    np.testing.assert_allclose(color_mean(large), expected)
