"""Pictures: whole PNG files of legible size for the shapes of data that occur, without a warning."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fivefold.errors import DataError, SettingsError
from fivefold.evaluation import calibration, metrics, plots

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
    assert min(picture(plots.confusion, matrix, names).size) > 400


def test_confusions_and_hits_have_colours_of_their_own():
    drawn = np.asarray(picture(plots.confusion, np.array([[9, 1], [0, 5]]), ["a", "b"]), int)
    red, green, blue = drawn[..., 0], drawn[..., 1], drawn[..., 2]
    assert ((blue > red + 60) & (blue > green + 60)).sum() > 10_000
    assert ((red > blue + 30) & (red > green + 60)).sum() > 10_000


def test_400_classes_make_a_picture_of_bounded_size():
    drawn = picture(plots.confusion, np.eye(400, dtype=int), [str(code) for code in range(400)])
    assert max(drawn.size) < 2500
    table = metrics.per_class_table(np.log(np.eye(400) + 1e-9), np.arange(400))
    assert picture(plots.class_f1, table, [str(code) for code in range(400)]).height < 3000


@pytest.mark.parametrize(("rows", "validated"), [(1, True), (30, True), (3, False)])
def test_curves_of_one_model_with_and_without_validation(tmp_path, rows, validated):
    drawn = picture(plots.training_curves, train_log(tmp_path / "log.csv", rows, validated))
    assert min(drawn.size) > 800


def test_curves_of_few_and_of_many_models(tmp_path):
    log = train_log(tmp_path / "log.csv", 4)
    few, many = ({f"fold {n}": log for n in range(count)} for count in (5, 30))
    assert picture(plots.fold_curves, few).size == picture(plots.fold_curves, many).size


def test_a_log_that_is_none_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text(LOG + "1,high,0.5,,,,,0.1\n")
    with pytest.raises(DataError, match=r"log\.csv is not a training log"):
        plots.training_curves(tmp_path / "log.csv", BytesIO())


def test_calibration_of_rows_that_are_all_right_and_all_certain():
    log_probs, codes = np.log(np.array([[1.0, 1e-30]] * 4)), np.zeros(4, int)
    table = calibration.reliability_table(log_probs, codes)
    assert min(picture(plots.reliability, table, 0.0).size) > 400
    assert min(picture(plots.confidence_histogram, log_probs, codes).size) > 400


def test_themes_differ_and_the_same_picture_has_the_same_bytes():
    def drawn(theme: str) -> bytes:
        target = BytesIO()
        plots.confusion(np.eye(2, dtype=int), ["a", "b"], target, theme)
        return target.getvalue()

    assert drawn("light") == drawn("light") != drawn("dark")
    with pytest.raises(SettingsError, match="dark, light"):
        drawn("darc")
