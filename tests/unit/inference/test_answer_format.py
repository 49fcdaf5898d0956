from pathlib import Path

import numpy as np
import pytest

from fivefold.data.readers.eval_images import SampleSubmission
from fivefold.errors import DataError, SettingsError
from fivefold.inference.submission import detect_format, write_submission
from fivefold.inference.submission_reader import has_labels_only, has_one_column, read_submission
from fivefold.predictions import Predictions
from toy_data import read_cells

BINARY, PETS, NUMBERS = ("0", "1"), ("cat", "dog"), ("0", "1", "2", "3")
ANIMALS = ("ant", "bee", "cat", "dog")
PROBABILITIES = np.array([[0.9, 0.1], [0.2, 0.8]])
FOUR_PROBABILITIES = np.array([[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])


def make_sample(column: str, *values: str, **settings: str) -> SampleSubmission:
    return SampleSubmission("id", (column,), np.array(["a", "b"], object), values=values, **settings)


def write_and_read_column(tmp_path: Path, sample: SampleSubmission, classes: tuple[str, ...]) -> list[str]:
    """Write a submission of two rows and return the values of its column."""
    log_probs = np.log(PROBABILITIES if len(classes) == 2 else FOUR_PROBABILITIES).astype(np.float32)
    predictions = Predictions(sample.ids, np.full(2, -1, np.int16), "s", classes, log_probs)
    return [row[1] for row in read_cells(write_submission(tmp_path / "s.csv", predictions, sample))[1:]]


@pytest.mark.parametrize(
    ("column", "values", "classes", "positive"),
    [
        ("has_cactus", ["0.5"], BINARY, "1"),
        ("label", ["0.5", "0.25"], ("no", "yes"), "yes"),
        ("target", ["0,5"], ("neg", "pos"), "pos"),
        ("Predicted", ["0.1"], ("False", "True"), "True"),
        ("has_cactus", ["0.5"], ("cactus", "no_cactus"), "cactus"),
        ("label", ["0.5"], ("mask", "without_mask"), "mask"),
        ("label", ["0.5"], ("-1", "1"), "1"),
        ("p", ["1e-3"], ("0.0", "1.0"), "1.0"),
        ("dog", ["0.5"], PETS, "dog"),
        ("cat", ["0"], PETS, "cat"),
        ("is_Cat", ["0.5"], PETS, "cat"),
        (" Dog ", [""], PETS, "dog"),
        ("label", ["0.0"], ("no", "yes"), "yes"),
    ],
)
def test_fractions_select_the_probability_of_the_positive_class(tmp_path, column, values, classes, positive):
    sample = make_sample(column, *values)
    assert (detect_format(sample, classes).kind, detect_format(sample, classes).names) == ("probability", (positive,))
    actual = [float(cell) for cell in write_and_read_column(tmp_path, sample, classes)]
    np.testing.assert_allclose(actual, PROBABILITIES[:, classes.index(positive)], atol=1e-6)


@pytest.mark.parametrize(
    ("column", "values", "classes", "expected"),
    [
        ("label", ["0"], BINARY, ["0", "1"]),
        ("has_cactus", ["1", "0"], BINARY, ["0", "1"]),
        ("label", ["cat"], PETS, ["cat", "dog"]),
        ("label", ["Cat", "DOG"], PETS, ["Cat", "DOG"]),
        ("label", ["x"], PETS, ["cat", "dog"]),
        ("Predicted", ["?", "cat"], PETS, ["cat", "dog"]),
        ("label", ["", " "], PETS, ["cat", "dog"]),
        ("label", ["0", "1"], ("0.0", "1.0"), ["0", "1"]),
        ("label", ["0.0"], ("0.0", "1.0"), ["0.0", "1.0"]),
        ("label", ["0"], ("no", "yes"), ["0", "1"]),
        ("label", ["0"], ("hotdog", "not hotdog"), ["1", "0"]),
        ("label", [], PETS, ["cat", "dog"]),
        ("label", ["0", "3"], NUMBERS, ["1", "3"]),
        ("label", ["0.0"], NUMBERS, ["1.0", "3.0"]),
        ("label", ["0", "2"], ANIMALS, ["1", "3"]),
        ("label", ["bee"], ANIMALS, ["bee", "dog"]),
    ],
)
def test_names_and_whole_numbers_select_the_predicted_class(tmp_path, column, values, classes, expected):
    assert write_and_read_column(tmp_path, make_sample(column, *values), classes) == expected


@pytest.mark.parametrize(
    ("column", "values", "classes"),
    [
        ("label", ["0.5"], PETS),
        ("label", ["0"], PETS),
        ("label", ["0", "1"], PETS),
        ("label", ["0.0"], BINARY),
        ("label", ["0.5"], NUMBERS),
        ("label", ["7"], NUMBERS),
        ("label", ["0"], ("10", "7", "8", "9")),
        ("label", ["0"], ("ant", "bee", "cat")),
        ("has_it", [""], PETS),
        ("has_it", ["nan"], PETS),
        ("label", ["2.5"], BINARY),
    ],
)
def test_ambiguous_samples_raise_errors_that_name_the_settings(column, values, classes):
    with pytest.raises(DataError) as caught:
        detect_format(make_sample(column, *values), classes)
    assert {"ensemble.answer", "ensemble.positive_class"} & set(str(caught.value).replace("=", " ").split())
    assert repr(column) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "values", "classes", "expected"),
    [
        ({"positive": "dog"}, ["0.5"], PETS, [0.1, 0.8]),
        ({"positive": "DOG"}, ["cat"], PETS, [0.1, 0.8]),
        ({"positive": "0"}, ["0"], BINARY, [0.9, 0.2]),
        ({"answer": "probability"}, ["0.0"], BINARY, [0.1, 0.8]),
        ({"answer": "class"}, ["0.5"], PETS, ["cat", "dog"]),
        ({"answer": "number"}, ["0"], PETS, ["0", "1"]),
    ],
)
def test_settings_override_the_detected_format(tmp_path, settings, values, classes, expected):
    actual = write_and_read_column(tmp_path, make_sample("label", *values, **settings), classes)
    assert [type(value)(cell) for cell, value in zip(actual, expected, strict=True)] == pytest.approx(expected)


def test_settings_that_contradict_the_sample_raise_errors():
    for sample in (
        make_sample("label", "0.5", positive="bird"),
        SampleSubmission("id", PETS, np.array(["a"], object), answer="class"),
    ):
        with pytest.raises(SettingsError, match=r"ensemble\.(positive_class|answer)"):
            detect_format(sample, PETS)
    with pytest.raises(DataError, match=r"ensemble\.positive_class"):
        detect_format(make_sample("label", "0.5", answer="probability"), NUMBERS)


def test_columns_match_classes_in_any_letter_case_and_unknown_ones_are_named(tmp_path):
    ids = np.array(["a", "b"], object)
    predictions = Predictions(ids, np.full(2, -1, np.int16), "s", PETS, np.log(PROBABILITIES).astype(np.float32))
    path = write_submission(tmp_path / "s.csv", predictions, SampleSubmission("id", ("DOG", " Cat"), ids))
    header, *rows = read_cells(path)
    assert header == ["id", "DOG", " Cat"]
    np.testing.assert_allclose([[float(cell) for cell in row[1:]] for row in rows], PROBABILITIES[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(np.exp(read_submission(path, ids, PETS).log_probs), PROBABILITIES, atol=1e-6)
    for columns, names in ((("cat", "bird"), ("bird", "dog")), (("cat", "Cat", "dog"), ("Cat",))):
        with pytest.raises(DataError) as caught:
            detect_format(SampleSubmission("id", columns, ids), PETS)
        assert all(repr(name) in str(caught.value) for name in names)
    with pytest.raises(DataError, match="'ant', 'cat' without a column"):
        detect_format(make_sample("bee", "0.5"), ("ant", "bee", "cat"))


@pytest.mark.parametrize(
    ("column", "values", "classes"),
    [
        ("has_cactus", ["0.5"], BINARY),
        ("dog", ["0.5"], PETS),
        ("label", ["0"], BINARY),
        ("label", ["0"], ("no", "yes")),
        ("label", ["cat"], PETS),
        ("label", ["0"], ("0.0", "1.0")),
    ],
)
def test_reader_restores_a_written_submission(tmp_path, column, values, classes):
    sample = make_sample(column, *values)
    kind = detect_format(sample, classes).kind
    write_and_read_column(tmp_path, sample, classes)
    expected = PROBABILITIES if kind == "probability" else np.eye(2)
    for options in ({"classes": classes}, {"likely": classes}):
        predictions = read_submission(tmp_path / "s.csv", sample.ids, **options)
        order = [predictions.classes.index(name) for name in classes] if kind != "class" else [0, 1]
        np.testing.assert_allclose(np.exp(predictions.log_probs)[:, order], expected, atol=1e-6)
    assert has_one_column(tmp_path / "s.csv")
    assert has_labels_only(tmp_path / "s.csv") == (kind != "probability")


def test_probability_of_an_unknown_class_needs_the_positive_class_setting(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("id,label\na,0.25\nb,1\n")
    np.testing.assert_allclose(
        np.exp(read_submission(path, classes=PETS, positive="cat").log_probs), [[0.25, 0.75], [1, 0]], atol=1e-6
    )
    for options in ({"classes": PETS}, {}, {"classes": NUMBERS}):
        with pytest.raises(DataError, match="'label'"):
            read_submission(path, **options)
