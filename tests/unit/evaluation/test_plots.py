from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from fivefold.errors import DataError
from fivefold.evaluation import metrics, plots
from fivefold.evaluation.report import render_png

LOG_HEADER = "epoch,train_loss,train_acc,val_loss,val_acc,val_logloss,val_f1_macro,lr\n"
ODD_NAMES = ("가방", "$x$", "\\frac{", "", " ", "an exceedingly long name of a class", "no font has \U0010fffd", "<b>")
SCORE = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "logloss": 0.3}
CERTAIN_AND_CORRECT = metrics.reliability_table(np.log(np.array([[1.0, 1e-30]] * 4)), np.zeros(4, int))
AGREEMENT = np.where(np.eye(8, k=1) + np.eye(8, k=-1), np.nan, np.clip(np.eye(8) + 0.8, 0, 1))
MANY_NAMES = [str(number) for number in range(400)]


def read_png(content: bytes) -> np.ndarray:
    """Return the pixels [H, W, 3] of a complete PNG."""
    return np.asarray(Image.open(BytesIO(content), formats=["PNG"]).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("plot", "arguments"),
    [
        (plots.plot_confusion, (np.eye(8, dtype=int) * 5 + np.eye(8, k=1, dtype=int), ODD_NAMES)),
        (plots.plot_confusion, (np.eye(400, dtype=int), MANY_NAMES)),
        (plots.plot_reliability, (CERTAIN_AND_CORRECT, 0.0)),
        (plots.plot_scores, (ODD_NAMES, [{}, SCORE | {"logloss": None}, *[SCORE] * 6])),
        (plots.plot_agreement, (dict(enumerate(ODD_NAMES, start=1)), AGREEMENT, AGREEMENT)),
    ],
)
def test_plot_has_a_legible_size_for_odd_names_and_many_classes(plot, arguments):
    height, width, _ = read_png(render_png(plot, *arguments)).shape
    assert 400 < min(height, width) < max(height, width) < 3000


def test_training_curves_are_plotted_with_and_without_validation_and_refuse_an_invalid_log(tmp_path: Path):
    log, not_validated = tmp_path / "log.csv", tmp_path / "not_validated.csv"
    log.write_text(LOG_HEADER + "".join(f"{epoch},{1 / epoch},0.5,0.5,0.8,0.5,0.7,0.001\n" for epoch in range(1, 21)))
    not_validated.write_text(LOG_HEADER + "1,0.5,0.5,,,,,0.001\n")
    images = [
        render_png(plots.plot_training_curves, logs) for logs in ({"x": log, "y": not_validated}, {"y": not_validated})
    ]
    assert min(read_png(images[0]).shape[:2]) > 800
    assert images[0] != images[1]
    log.write_text(LOG_HEADER + "1,high,0.5,,,,,0.1\n")
    with pytest.raises(DataError, match=r"log\.csv"):
        plots.plot_training_curves({"fold 0": log}, BytesIO())


def test_same_plot_has_the_same_bytes():
    first, second = (render_png(plots.plot_confusion, np.eye(2, dtype=int), ["a", "b"]) for _ in range(2))
    assert first == second


def test_labels_are_cut_and_names_without_a_font_are_replaced_by_their_number():
    assert plots.numbered_labels({3: "convnext", 7: "x" * 100, 9: "\U0010fffd"}) == [
        "3  convnext",
        f"7  {'x' * 23}…",
        "9  #9",
    ]


def test_image_grid_shows_every_image_and_captions_in_the_colour_of_correct_or_wrong():
    colours = [(230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 20), (20, 230, 230)]
    sizes = [(40, 20), (500, 1000), (1, 1), (320, 320), (7, 90)]
    images = [np.full((*size, 3), colour, np.uint8) for colour, size in zip(colours, sizes, strict=True)]
    pixels = read_png(render_png(plots.plot_image_grid, images, ["cat"] * 5, ["cat"] * 4 + ["dog"]))
    for colour, (height, width) in zip(colours, sizes, strict=True):
        rows, columns = np.nonzero((pixels == colour).all(axis=2))
        shown = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert shown[0] * shown[1] == len(rows), "the image is complete"
        assert shown[0] / shown[1] == pytest.approx(height / width, rel=0.2)
        assert max(shown) > 200
    # The last image, below the others, is the only mistake.
    for colour, count in ((plots.TEXT, 4), (plots.WRONG, 1)):
        caption = np.abs(pixels - ImageColor.getrgb(colour)).sum(axis=2) < 30
        assert caption.sum() > 20 * count
        assert caption[len(pixels) // 2 :].any() == (count == 1)
    assert [plots.evenly_spaced(count)[[0, -1]].tolist() for count in (3, 1000)] == [[0, 2], [0, 999]]
