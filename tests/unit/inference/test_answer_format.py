"""What a sample's single column is for: read off its values, its name and the classes, or asked for."""

from pathlib import Path

import numpy as np
import pytest

from fivefold.data.readers.eval_images import SampleSubmission, read_eval
from fivefold.errors import DataError, SettingsError
from fivefold.inference.submission import detect_format, guess_positive, write_submission
from fivefold.inference.submission_reader import has_labels_only, has_one_column, read_submission
from fivefold.predictions import Predictions
from toy_data import read_cells, write_data

BINARY, PETS, NUMBERS = ("0", "1"), ("cat", "dog"), ("0", "1", "2", "3")
SHARES = np.array([[0.9, 0.1], [0.2, 0.8]])


def sample_of(column: str, *values: str, **settings: str) -> SampleSubmission:
    return SampleSubmission("id", (column,), np.array(["a", "b"], object), values=values, **settings)


def written(
    tmp_path: Path, wanted: SampleSubmission, classes: tuple[str, ...], shares: np.ndarray = SHARES
) -> list[str]:
    """The answers to two rows, whose probabilities are `shares`."""
    table = Predictions(wanted.ids, np.full(2, -1, np.int16), "s", classes, np.log(shares).astype(np.float32))
    return [row[1] for row in read_cells(write_submission(tmp_path / "s.csv", table, wanted))[1:]]


@pytest.mark.parametrize(
    ("column", "values", "classes", "positive"),
    [
        ("has_cactus", ["0.5"], BINARY, "1"),
        ("label", ["0.5", "0.25"], ("no", "yes"), "yes"),
        ("target", ["0,5"], ("neg", "pos"), "pos"),
        ("Predicted", ["0.1"], ("False", "True"), "True"),
        ("has_cactus", ["0.5"], ("cactus", "no_cactus"), "cactus"),
        ("p", ["1e-3"], ("0.0", "1.0"), "1.0"),
        ("dog", ["0.5"], PETS, "dog"),
        ("cat", ["0"], PETS, "cat"),
        ("is_Cat", ["0.5"], PETS, "cat"),
        (" Dog ", [""], PETS, "dog"),
        ("label", ["0.0"], ("no", "yes"), "yes"),
    ],
)
def test_numbers_between_0_and_1_ask_for_the_probability_of_the_positive_class(
    tmp_path, column, values, classes, positive
):
    wanted = sample_of(column, *values)
    assert (detect_format(wanted, classes).kind, detect_format(wanted, classes).names) == ("probability", (positive,))
    found = [float(cell) for cell in written(tmp_path, wanted, classes)]
    np.testing.assert_allclose(found, SHARES[:, classes.index(positive)], atol=1e-6)


@pytest.mark.parametrize(
    ("column", "values", "classes", "answers"),
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
    ],
)
def test_names_and_whole_numbers_ask_for_the_predicted_class(tmp_path, column, values, classes, answers):
    assert written(tmp_path, sample_of(column, *values), classes) == answers


@pytest.mark.parametrize(
    ("values", "classes", "answers"),
    [
        (["0", "3"], NUMBERS, ["1", "3"]),
        (["0.0"], NUMBERS, ["1.0", "3.0"]),
        (["0"], ("10", "7", "8", "9"), None),
        (["0", "2"], ("ant", "bee", "cat", "dog"), ["1", "3"]),
        (["bee"], ("ant", "bee", "cat", "dog"), ["bee", "dog"]),
    ],
)
def test_more_than_two_classes_are_written_by_name_or_number(tmp_path, values, classes, answers):
    shares = np.array([[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    if answers is None:
        with pytest.raises(DataError, match=r"ensemble\.answer"):
            detect_format(sample_of("label", *values), classes)
    else:
        assert written(tmp_path, sample_of("label", *values), classes, shares) == answers


@pytest.mark.parametrize(
    ("column", "values", "classes"),
    [
        ("label", ["0.5"], PETS),
        ("label", ["0"], PETS),
        ("label", ["0", "1"], PETS),
        ("label", ["0.0"], BINARY),
        ("label", ["0.5"], NUMBERS),
        ("label", ["7"], NUMBERS),
        ("label", ["0"], ("ant", "bee", "cat")),
        ("has_it", [""], PETS),
        ("has_it", ["nan"], PETS),
        ("label", ["2.5"], BINARY),
    ],
)
def test_what_the_sample_does_not_say_is_asked_for_with_the_settings(column, values, classes):
    with pytest.raises(DataError) as caught:
        detect_format(sample_of(column, *values), classes)
    assert {"ensemble.answer", "ensemble.positive_class"} & set(str(caught.value).replace("=", " ").split())
    assert repr(column) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "values", "classes", "answers"),
    [
        ({"positive": "dog"}, ["0.5"], PETS, [0.1, 0.8]),
        ({"positive": "DOG"}, ["cat"], PETS, [0.1, 0.8]),
        ({"positive": "0"}, ["0"], BINARY, [0.9, 0.2]),
        ({"answer": "probability"}, ["0.0"], BINARY, [0.1, 0.8]),
        ({"answer": "class"}, ["0.5"], PETS, ["cat", "dog"]),
        ({"answer": "number"}, ["0"], PETS, ["0", "1"]),
    ],
)
def test_the_settings_say_what_the_sample_does_not(tmp_path, settings, values, classes, answers):
    found = written(tmp_path, sample_of("label", *values, **settings), classes)
    assert [type(want)(each) for each, want in zip(found, answers, strict=True)] == pytest.approx(answers)


def test_settings_that_cannot_be_are_refused():
    for wanted in (
        sample_of("label", "0.5", positive="bird"),
        SampleSubmission("id", PETS, np.array(["a"], object), answer="class"),
    ):
        with pytest.raises(SettingsError, match=r"ensemble\.(positive_class|answer)"):
            detect_format(wanted, PETS)
    with pytest.raises(DataError, match=r"ensemble\.positive_class"):
        detect_format(sample_of("label", "0.5", answer="probability"), NUMBERS)


def test_columns_are_classes_in_other_letters_too_and_strange_ones_are_named(tmp_path):
    ids = np.array(["a", "b"], object)
    table = Predictions(ids, np.full(2, -1, np.int16), "s", PETS, np.log(SHARES).astype(np.float32))
    path = write_submission(tmp_path / "s.csv", table, SampleSubmission("id", ("DOG", " Cat"), ids))
    header, *rows = read_cells(path)
    assert header == ["id", "DOG", " Cat"]
    np.testing.assert_allclose([[float(cell) for cell in row[1:]] for row in rows], SHARES[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(np.exp(read_submission(path, ids, PETS).log_probs), SHARES, atol=1e-6)
    for columns, names in ((("cat", "bird"), ("bird", "dog")), (("cat", "Cat", "dog"), ("Cat",))):
        with pytest.raises(DataError) as caught:
            detect_format(SampleSubmission("id", columns, ids), PETS)
        assert all(repr(name) in str(caught.value) for name in names)
    with pytest.raises(DataError, match="'ant', 'cat' without a column"):
        detect_format(sample_of("bee", "0.5"), ("ant", "bee", "cat"))


def test_the_values_of_one_column_are_read_with_the_sample(tmp_path):
    rows = "id,{}\na,0.5\nb,0.5\n"
    write_data(tmp_path, "a.png", "b.png", sample_submission=rows.format("has_cactus"))
    found = read_eval(tmp_path)
    assert detect_format(found.sample, BINARY).kind == "probability"
    asked = found.with_label_column("", answer="class")
    assert detect_format(asked.sample, BINARY).kind == "class"


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
def test_an_answer_is_read_again_as_it_was_written(tmp_path, column, values, classes):
    wanted = sample_of(column, *values)
    kind = detect_format(wanted, classes).kind
    written(tmp_path, wanted, classes)
    expected = SHARES if kind == "probability" else np.eye(2)
    for given in ({"classes": classes}, {"likely": classes}):
        found = read_submission(tmp_path / "s.csv", wanted.ids, **given)
        order = [found.classes.index(name) for name in classes] if kind != "class" else [0, 1]
        np.testing.assert_allclose(np.exp(found.log_probs)[:, order], expected, atol=1e-6)
    assert has_one_column(tmp_path / "s.csv")
    assert has_labels_only(tmp_path / "s.csv") == (kind != "probability")


def test_a_probability_of_an_unknown_class_is_read_by_the_setting_alone(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("id,label\na,0.25\nb,1\n")
    np.testing.assert_allclose(
        np.exp(read_submission(path, classes=PETS, positive="cat").log_probs), [[0.25, 0.75], [1, 0]], atol=1e-6
    )
    for given in ({"classes": PETS}, {}, {"classes": NUMBERS}):
        with pytest.raises(DataError, match="'label'"):
            read_submission(path, **given)


def test_the_positive_class_is_known_by_its_name():
    pairs = [("0", "1"), ("no", "yes"), ("Negative", "Positive"), ("without_mask", "mask"), ("-1", "1"), ("0.0", "1.0")]
    for negative, positive in pairs:
        assert guess_positive((negative, positive)) == guess_positive((positive, negative)) == positive
    for unknown in (("cat", "dog"), ("1", "2"), ("left", "right"), ("a", "b", "c")):
        assert guess_positive(unknown) == ""
