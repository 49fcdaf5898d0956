from itertools import product as cartesian_product
from pathlib import Path

import numpy as np
import pytest

from fivefold.contract.artifacts import ModelDir
from fivefold.data.readers.profiles import profile_factors
from fivefold.errors import DataError
from fivefold.inference.factor_product import FactorProduct, build_product, needs_product
from fivefold.inference.systems import System
from fivefold.label_factors import LabelFactors
from fivefold.predictions import Predictions

FACTORS = profile_factors([30, 60])
MASKS, GENDERS, AGES = ("mask", "incorrect", "normal"), ("male", "female"), ("<30", "<60", ">=60")
RANDOM = np.random.default_rng(0)


def log_probs(rows: int, classes: int) -> np.ndarray:
    logits = RANDOM.normal(size=(rows, classes))
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


def make_model_dir(system: str, fold: int, *knows: str, factors: LabelFactors = FACTORS) -> ModelDir:
    info = {"role": "fold", "system": system, "seed": 1, "fold": fold}
    return ModelDir(Path(), info | {"knows": list(knows), "factors": factors.to_json()})


def make_groups(**factors: tuple[str, ...]) -> dict[str, list[ModelDir]]:
    return {name: [make_model_dir(name, fold, *parts) for fold in range(2)] for name, parts in factors.items()}


def mask_and_age_product() -> FactorProduct:
    return build_product(make_groups(masks=("mask", "gender"), ages=("age",)))


def test_combined_log_probabilities_are_sums():
    parts = {"masks": log_probs(50, 6), "ages": log_probs(50, 3)}
    combined = mask_and_age_product().combine(parts)
    np.testing.assert_allclose(np.exp(combined).sum(axis=1), 1, atol=1e-6)
    mask_and_gender, ages = FACTORS.projected_classes(("mask", "gender")), FACTORS.projected_classes(("age",))
    for (m, mask), (g, gender), (a, years) in cartesian_product(enumerate(MASKS), enumerate(GENDERS), enumerate(AGES)):
        column = combined[:, FACTORS.classes.index(str(m * 6 + g * 3 + a))]
        of_mask, of_age = mask_and_gender.index(f"{mask}+{gender}"), ages.index(years)
        np.testing.assert_allclose(column, parts["masks"][:, of_mask] + parts["ages"][:, of_age], atol=1e-5)


def test_systems_with_the_same_factors_are_averaged_first():
    factor_product = build_product(make_groups(masks=("mask", "gender"), ages=("age",), other=("age",)))
    mask_gender_log_probs, first_age, second_age = log_probs(7, 6), log_probs(7, 3), log_probs(7, 3)
    average = np.log((np.exp(first_age) + np.exp(second_age)) / 2)
    np.testing.assert_allclose(
        factor_product.combine({"masks": mask_gender_log_probs, "ages": first_age, "other": second_age}),
        mask_and_age_product().combine({"masks": mask_gender_log_probs, "ages": average}),
        atol=1e-5,
    )
    assert factor_product.weights.tolist() == [1, 0.5, 0.5]


def test_probability_of_combinations_without_a_class_is_redistributed():
    restricted = FACTORS.restrict(["0", "1", "3"])  # man under 30, man under 60, woman under 30, all with masks
    factor_product = FactorProduct(restricted, {"masks": ("mask", "gender"), "ages": ("age",)})
    mask_gender_log_probs, age = np.log([[0.4, 0.6]]), np.log([[0.25, 0.75]])  # female, male; <30, <60
    combined = np.exp(factor_product.combine({"masks": mask_gender_log_probs, "ages": age}))
    weights = np.array([0.6 * 0.25, 0.6 * 0.75, 0.4 * 0.25])
    np.testing.assert_allclose(combined[0], weights / weights.sum(), rtol=1e-5)


def make_predictions(system: str, ids: list[str], factors: tuple[str, ...], classes: list[str]) -> Predictions:
    """Return rows with the true `classes`, reduced to the `factors`, with the columns in reversed order."""
    projected_classes = FACTORS.projected_classes(factors)
    labels = np.array([FACTORS.project(name, factors) for name in classes], dtype=object)
    folds, values = np.zeros(len(ids), np.int16), log_probs(len(ids), len(projected_classes))
    predictions = Predictions(np.array(ids, object), folds, system, projected_classes, values, labels)
    return predictions.with_classes(projected_classes[::-1])


def test_predictions_are_combined_by_id_and_class_name_and_labels_are_joined():
    classes = ["17", "0", "10", "5"]
    masks = make_predictions("masks", list("abcd"), ("mask", "gender"), classes)
    ages = make_predictions("ages", list("abcd"), ("age",), classes)
    combined = mask_and_age_product().combine_tables({"masks": masks, "ages": ages.take(np.array([2, 0, 3, 1]))})
    assert list(combined.labels) == classes
    assert (combined.classes, combined.system) == (FACTORS.classes, "masks × ages")
    expected = masks.log_probs[0, masks.classes.index("normal+female")] + ages.log_probs[0, ages.classes.index("<60")]
    assert combined.log_probs[0, FACTORS.classes.index("16")] == pytest.approx(expected, abs=1e-5)
    systems = [System("masks", 5, 1, masks, masks), System("ages", 5, 1, ages, None)]
    both = mask_and_age_product().combine_systems(systems)
    assert (both.name, both.models, both.holdout) == ("masks × ages", 10, None), "no holdout if one system has none"
    assert list(both.oof.labels) == classes
    with pytest.raises(DataError, match=r"rows: .*'d'"):
        mask_and_age_product().combine_tables({"masks": masks, "ages": ages.take(np.arange(3))})


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"masks": ("mask", "gender")}, r"factor age.*model\.label_factors=age"),
        ({"m": ("mask", "gender"), "a": ("gender", "age")}, r"m \(mask, gender\).* a \(gender, age\).*gender"),
        ({"m": ("mask",), "a": ("mask", "gender", "age")}, r"m \(mask\).* a \(.*mask"),
        ({"whole": ()}, "fold 0 of whole, seed 1"),
    ],
)
def test_systems_that_form_no_product_raise_an_error_that_names_them(factors, message):
    with pytest.raises(DataError, match=message):
        build_product(make_groups(**factors))


def test_models_with_other_classes_or_mixed_systems_raise_errors():
    mask = make_model_dir("m", 0, "mask")
    other = make_model_dir("a", 0, "age", factors=profile_factors([30, 58]))
    with pytest.raises(DataError, match="fold 0 of m, seed 1 and fold 0 of a, seed 1"):
        build_product({"m": [mask], "a": [other]})
    with pytest.raises(DataError, match=r"fold 1 of m, seed 1 .* \(mask; age\)"):
        build_product({"m": [mask, make_model_dir("m", 1, "age")]})
    with pytest.raises(DataError, match="fold 1 of x, seed 1"):
        build_product({"m": [mask], "x": [make_model_dir("x", 1)]})


def test_product_is_needed_only_if_models_predict_different_factors():
    assert needs_product([{"knows": ["mask", "gender"]}, {"knows": ["age"]}])
    assert not needs_product([{"knows": ["age"]}, {"knows": ["age"]}])
    assert not needs_product([{}, {}])
