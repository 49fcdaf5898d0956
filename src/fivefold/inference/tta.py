"""Views of a batch at prediction, by name: images [B, 3, H, W] to images of the same shape."""

from collections.abc import Callable

from torch import Tensor

View = Callable[[Tensor], Tensor]


def plain(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


def flip(images: Tensor) -> Tensor:
    """Mirrored left and right."""
    return images.flip(-1)


VIEWS: dict[str, View] = {
    "plain": plain,
    "flip": flip,
}
