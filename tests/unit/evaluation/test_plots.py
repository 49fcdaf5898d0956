"""Pictures: whole PNG files of legible size for the shapes of data that occur, without a warning."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from fivefold.errors import DataError, SettingsError
from fivefold.evaluation import metrics, plots
from fivefold.evaluation.plots import CAPTION, COLUMNS, GAP, SIDE, THEMES, evenly_spaced, plot_image_grid

LOG = "epoch,train_loss,train_acc,val_loss,val_acc,val_logloss,val_f1_macro,lr\n"


def picture(draw: object, *arguments: object) -> Image.Image:
    """What `draw(*arguments, target)` drew."""
    target = BytesIO()
    draw(*arguments, target)
    found = Image.open(target, formats=["PNG"])
    found.load()
    return found.convert("RGB")


def train_log(path: Path, rows: int, validated: bool = True) -> Path:
    scores = "0.5,0.8,0.5,0.7" if validated else ",,,"
    path.write_text(LOG + "".join(f"{epoch},{1 / epoch},0.5,{scores},0.001\n" for epoch in range(1, rows + 1)))
    return path


ODD_NAMES = ("가방", "$x$", "\\frac{", "", " ", "an exceedingly long name of a class", "no font has \U0010fffd", "<b>")


@pytest.mark.parametrize("copies", [1, 4])
def test_any_name_of_a_class_can_be_drawn(copies):
    names = ODD_NAMES * copies
    matrix = np.eye(len(names), dtype=int) * 5
    matrix[0, 1] = 3
    assert min(picture(plots.plot_confusion, matrix, names).size) > 400


def test_400_classes_and_certain_rows_make_pictures_of_bounded_size():
    drawn = picture(plots.plot_confusion, np.eye(400, dtype=int), [str(code) for code in range(400)])
    assert max(drawn.size) < 2500
    log_probs, codes = np.log(np.array([[1.0, 1e-30]] * 4)), np.zeros(4, int)  # all right and all certain
    assert min(picture(plots.plot_reliability, metrics.reliability_table(log_probs, codes), 0.0).size) > 400
    assert min(picture(plots.plot_confidence, log_probs, codes).size) > 400
    table = metrics.per_class_table(np.log(np.eye(400) + 1e-9), np.arange(400))
    assert picture(plots.plot_class_f1, table, [str(code) for code in range(400)]).height < 3000


@pytest.mark.parametrize(("rows", "validated"), [(1, True), (30, True), (3, False)])
def test_curves_of_one_few_and_many_models_with_and_without_validation(tmp_path, rows, validated):
    log = train_log(tmp_path / "log.csv", rows, validated)
    assert min(picture(plots.plot_training_curves, log).size) > 800
    few, many = ({f"fold {n}": log for n in range(count)} for count in (5, 30))
    assert picture(plots.plot_fold_curves, few).size == picture(plots.plot_fold_curves, many).size


def test_a_log_that_is_none_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text(LOG + "1,high,0.5,,,,,0.1\n")
    with pytest.raises(DataError, match=r"log\.csv is not a training log"):
        plots.plot_training_curves(tmp_path / "log.csv", BytesIO())


def test_themes_differ_and_the_same_picture_has_the_same_bytes():
    def drawn(theme: str) -> bytes:
        target = BytesIO()
        plots.plot_confusion(np.eye(2, dtype=int), ["a", "b"], target, theme)
        return target.getvalue()

    assert drawn("light") == drawn("light") != drawn("dark")
    with pytest.raises(SettingsError, match="dark, light"):
        drawn("darc")


LONG = (
    "효율적인_컨브넥스트_베이스_384_라벨스무딩_오리지널_모델",
    "caformer_b36.sail_in22k_ft_in1k_384 · 5 folds · 3 views",
)


@pytest.mark.parametrize("count", [2, 6, 60])
def test_pictures_have_a_size_that_can_be_read(count):
    names = [f"{LONG[n % 2]} {n}" for n in range(count)]
    score = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "logloss": 0.3}
    drawn = picture(plots.plot_scores, names, [{}, score | {"logloss": None}, *[score] * (count - 2)])
    assert drawn.width > 1000
    matrix = np.clip(np.eye(count) + 0.8, 0, 1)
    matrix[0, 1] = matrix[1, 0] = np.nan
    drawn = picture(plots.plot_agreement, dict(enumerate(names, start=1)), matrix, matrix)
    assert 500 < drawn.height < 3000


def test_long_names_stand_in_lines_and_keep_all_their_letters():
    names = plots.numbered_labels({3: "convnext_tiny_mixup_rdrop_sam_ema_200_epochs", 7: "x" * 100})
    assert names[0].startswith("3  convnext")
    assert names[0].replace("\n", "") == "3  convnext_tiny_mixup_rdrop_sam_ema_200_epochs"
    for name in names:
        assert max(map(len, name.split("\n"))) <= plots.MAX_LINE_CELLS


RED, GREEN, BLUE = (230, 20, 20), (20, 230, 20), (20, 20, 230)


def grid(images: list[np.ndarray], truth: list[str], guesses: list[str], theme: str = "light") -> np.ndarray:
    return np.asarray(picture(lambda target: plot_image_grid(images, truth, guesses, target, theme)))


def plain(colour: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


@pytest.mark.parametrize("theme", THEMES)
def test_every_image_stands_whole_in_its_place(theme: str):
    colours = [RED, GREEN, BLUE, RED, GREEN]
    drawn = [(40, 20), (500, 1000), (1, 1), (320, 320), (7, 900)]
    images = [plain(colour, *size) for colour, size in zip(colours, drawn, strict=True)]
    sizes = [(320, 160), (160, 320), (320, 320), (320, 320), (2, 320)]
    shown = grid(images, ["a"] * 5, ["a"] * 4 + ["b"], theme)
    assert [evenly_spaced(count)[[0, -1]].tolist() for count in (3, 1000)] == [[0, 2], [0, 999]]
    assert shown.shape == (3 * GAP + 2 * CAPTION + 320 + 2, COLUMNS * (SIDE + GAP) + GAP, 3)
    for number, (colour, (height, width)) in enumerate(zip(colours, sizes, strict=True)):
        left = GAP + number % COLUMNS * (SIDE + GAP)
        top = GAP + CAPTION + number // COLUMNS * (CAPTION + SIDE + GAP)
        assert (shown[top : top + height, left : left + width] == colour).all()
        around = shown[top : top + SIDE, left + width : left + SIDE + GAP]
        assert not (around == colour).all(axis=2).any()


def test_captions_are_in_the_colour_of_what_they_say():
    images = [plain((128, 128, 128), 10, 10)] * 2
    shown = grid(images, ["cat", "cat"], ["cat", "dog"]).astype(int)
    right, wrong = map(ImageColor.getrgb, (THEMES["light"].text, THEMES["light"].wrong))
    for number, (own, other) in enumerate(((right, wrong), (wrong, right))):
        left = GAP + number * (SIDE + GAP)
        caption = shown[GAP : GAP + CAPTION, left : left + SIDE]
        assert (np.abs(caption - own).sum(axis=2) < 30).sum() > 20
        assert not (np.abs(caption - other).sum(axis=2) < 30).any()
