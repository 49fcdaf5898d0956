"""Plots: complete PNG files of legible size for all shapes of data, without a warning."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from fivefold.errors import DataError, SettingsError
from fivefold.evaluation import metrics, plots
from fivefold.evaluation.plots import CAPTION, COLUMNS, GAP, SIDE, THEMES, evenly_spaced, plot_image_grid

LOG_HEADER = "epoch,train_loss,train_acc,val_loss,val_acc,val_logloss,val_f1_macro,lr\n"


def render(plot: object, *arguments: object) -> Image.Image:
    """Return the image that `plot(*arguments, target)` writes."""
    target = BytesIO()
    plot(*arguments, target)
    image = Image.open(target, formats=["PNG"])
    image.load()
    return image.convert("RGB")


def write_train_log(path: Path, rows: int, validated: bool = True) -> Path:
    scores = "0.5,0.8,0.5,0.7" if validated else ",,,"
    path.write_text(LOG_HEADER + "".join(f"{epoch},{1 / epoch},0.5,{scores},0.001\n" for epoch in range(1, rows + 1)))
    return path


ODD_NAMES = ("가방", "$x$", "\\frac{", "", " ", "an exceedingly long name of a class", "no font has \U0010fffd", "<b>")


@pytest.mark.parametrize("copies", [1, 4])
def test_confusion_plot_accepts_any_class_name(copies):
    names = ODD_NAMES * copies
    matrix = np.eye(len(names), dtype=int) * 5
    matrix[0, 1] = 3
    assert min(render(plots.plot_confusion, matrix, names).size) > 400


def test_plots_of_400_classes_and_certain_rows_have_bounded_size():
    image = render(plots.plot_confusion, np.eye(400, dtype=int), [str(code) for code in range(400)])
    assert max(image.size) < 2500
    log_probs, codes = np.log(np.array([[1.0, 1e-30]] * 4)), np.zeros(4, int)  # all correct and all certain
    assert min(render(plots.plot_reliability, metrics.reliability_table(log_probs, codes), 0.0).size) > 400
    assert min(render(plots.plot_confidence, log_probs, codes).size) > 400
    table = metrics.per_class_table(np.log(np.eye(400) + 1e-9), np.arange(400))
    assert render(plots.plot_class_f1, table, [str(code) for code in range(400)]).height < 3000


@pytest.mark.parametrize(("rows", "validated"), [(1, True), (30, True), (3, False)])
def test_curves_are_plotted_for_few_and_many_models_with_and_without_validation(tmp_path, rows, validated):
    log = write_train_log(tmp_path / "log.csv", rows, validated)
    assert min(render(plots.plot_training_curves, log).size) > 800
    few, many = ({f"fold {n}": log for n in range(count)} for count in (5, 30))
    assert render(plots.plot_fold_curves, few).size == render(plots.plot_fold_curves, many).size


def test_training_curves_refuse_an_invalid_log(tmp_path):
    (tmp_path / "log.csv").write_text(LOG_HEADER + "1,high,0.5,,,,,0.1\n")
    with pytest.raises(DataError, match=r"log\.csv is not a training log"):
        plots.plot_training_curves(tmp_path / "log.csv", BytesIO())


def test_same_plot_has_the_same_bytes_and_themes_differ():
    def render_bytes(theme: str) -> bytes:
        target = BytesIO()
        plots.plot_confusion(np.eye(2, dtype=int), ["a", "b"], target, theme)
        return target.getvalue()

    assert render_bytes("light") == render_bytes("light") != render_bytes("dark")
    with pytest.raises(SettingsError, match="dark, light"):
        render_bytes("darc")


LONG_NAMES = (
    "효율적인_컨브넥스트_베이스_384_라벨스무딩_오리지널_모델",
    "caformer_b36.sail_in22k_ft_in1k_384 · 5 folds · 3 views",
)


@pytest.mark.parametrize("count", [2, 6, 60])
def test_score_and_agreement_plots_have_a_legible_size(count):
    names = [f"{LONG_NAMES[n % 2]} {n}" for n in range(count)]
    score = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "logloss": 0.3}
    image = render(plots.plot_scores, names, [{}, score | {"logloss": None}, *[score] * (count - 2)])
    assert image.width > 1000
    matrix = np.clip(np.eye(count) + 0.8, 0, 1)
    matrix[0, 1] = matrix[1, 0] = np.nan
    image = render(plots.plot_agreement, dict(enumerate(names, start=1)), matrix, matrix)
    assert 500 < image.height < 3000


def test_numbered_labels_wrap_long_names_without_loss():
    names = plots.numbered_labels({3: "convnext_tiny_mixup_rdrop_sam_ema_200_epochs", 7: "x" * 100})
    assert names[0].startswith("3  convnext")
    assert names[0].replace("\n", "") == "3  convnext_tiny_mixup_rdrop_sam_ema_200_epochs"
    for name in names:
        assert max(map(len, name.split("\n"))) <= plots.MAX_LINE_CELLS


RED, GREEN, BLUE = (230, 20, 20), (20, 230, 20), (20, 20, 230)


def render_grid(images: list[np.ndarray], truth: list[str], guesses: list[str], theme: str = "light") -> np.ndarray:
    return np.asarray(render(lambda target: plot_image_grid(images, truth, guesses, target, theme)))


def make_image(colour: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


@pytest.mark.parametrize("theme", THEMES)
def test_image_grid_shows_every_image_completely_at_its_position(theme: str):
    colours = [RED, GREEN, BLUE, RED, GREEN]
    input_sizes = [(40, 20), (500, 1000), (1, 1), (320, 320), (7, 900)]
    images = [make_image(colour, *size) for colour, size in zip(colours, input_sizes, strict=True)]
    shown_sizes = [(320, 160), (160, 320), (320, 320), (320, 320), (2, 320)]
    pixels = render_grid(images, ["a"] * 5, ["a"] * 4 + ["b"], theme)
    assert [evenly_spaced(count)[[0, -1]].tolist() for count in (3, 1000)] == [[0, 2], [0, 999]]
    assert pixels.shape == (3 * GAP + 2 * CAPTION + 320 + 2, COLUMNS * (SIDE + GAP) + GAP, 3)
    for number, (colour, (height, width)) in enumerate(zip(colours, shown_sizes, strict=True)):
        left = GAP + number % COLUMNS * (SIDE + GAP)
        top = GAP + CAPTION + number // COLUMNS * (CAPTION + SIDE + GAP)
        assert (pixels[top : top + height, left : left + width] == colour).all()
        around = pixels[top : top + SIDE, left + width : left + SIDE + GAP]
        assert not (around == colour).all(axis=2).any()


def test_image_grid_captions_have_the_colour_of_correct_or_wrong():
    images = [make_image((128, 128, 128), 10, 10)] * 2
    pixels = render_grid(images, ["cat", "cat"], ["cat", "dog"]).astype(int)
    correct, wrong = map(ImageColor.getrgb, (THEMES["light"].text, THEMES["light"].wrong))
    for number, (expected, other) in enumerate(((correct, wrong), (wrong, correct))):
        left = GAP + number * (SIDE + GAP)
        caption = pixels[GAP : GAP + CAPTION, left : left + SIDE]
        assert (np.abs(caption - expected).sum(axis=2) < 30).sum() > 20
        assert not (np.abs(caption - other).sum(axis=2) < 30).any()
