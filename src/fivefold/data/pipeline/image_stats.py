"""Image statistics by name: a few numbers computed from the decoded image [H, W, 3] before any augmentation."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from fivefold.lookup import choose


def measure(pixels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the features `names` of an image uint8 [H, W, 3], concatenated in this order: float32 [M]."""
    features = [choose(META, "meta feature", name)(pixels) for name in names]
    return np.concatenate([np.zeros(0), *features]).astype(np.float32)


def count_numbers(names: Sequence[str]) -> int:
    """Return the length M of the features `names` together; raise a SettingsError for an unknown name."""
    return len(measure(np.zeros((1, 1, 3), np.uint8), names))


def aspect(pixels: np.ndarray) -> np.ndarray:
    """Return width over height, [1]."""
    height, width = pixels.shape[:2]
    return np.array([width / height])


def color_mean(pixels: np.ndarray) -> np.ndarray:
    """Return the mean red, green and blue of the image resized to 16x16 pixels, [3] in 0..1."""
    small = Image.fromarray(pixels).resize((16, 16))
    return np.asarray(small, np.float64).mean(axis=(0, 1)) / 255


META: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "aspect": aspect,
    "color_mean": color_mean,
}
