"""Systems of different factors as one: the code of every joined row by hand, and what cannot be joined."""

from itertools import product as every
from pathlib import Path

import numpy as np
import pytest

from fivefold.contract.artifacts import ModelDir
from fivefold.data.readers.profiles import encode_label, profile_factors
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


def sure_of(classes: tuple[str, ...], names: list[str]) -> np.ndarray:
    """Log-probabilities that are all but sure of the named class of each row."""
    probs = np.full((len(names), len(classes)), 0.01 / (len(classes) - 1))
    probs[np.arange(len(names)), [classes.index(name) for name in names]] = 0.99
    return np.log(probs).astype(np.float32)


def info(*knows: str, factors: LabelFactors | None = FACTORS) -> dict[str, object]:
    return {"knows": list(knows), "factors": None if factors is None else factors.to_json()}


def model(system: str, fold: int, facts: dict[str, object]) -> ModelDir:
    return ModelDir(Path(), {"role": "fold", "system": system, "seed": 1, "fold": fold, **facts})


def groups(**knows: tuple[str, ...]) -> dict[str, list[ModelDir]]:
    return {name: [model(name, fold, info(*factors)) for fold in range(2)] for name, factors in knows.items()}


def two() -> FactorProduct:
    return build_product(groups(masks=("mask", "gender"), ages=("age",)))


def test_the_joined_code_is_mask_times_6_plus_gender_times_3_plus_age() -> None:
    rows = list(every(range(3), range(2), range(3)))
    both = sure_of(FACTORS.projected_classes(("mask", "gender")), [f"{MASKS[m]}+{GENDERS[g]}" for m, g, _ in rows])
    age = sure_of(FACTORS.projected_classes(("age",)), [AGES[a] for _, _, a in rows])
    found = two().combine({"masks": both, "ages": age}).argmax(axis=1)
    assert (
        [int(FACTORS.classes[code]) for code in found] == [encode_label(m, g, a) for m, g, a in rows] == list(range(18))
    )


def test_log_probabilities_add() -> None:
    both, age = log_probs(50, 6), log_probs(50, 3)
    found = two().combine({"masks": both, "ages": age})
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-6)
    mask_and_gender, ages = FACTORS.projected_classes(("mask", "gender")), FACTORS.projected_classes(("age",))
    for (m, mask), (g, gender), (a, years) in every(enumerate(MASKS), enumerate(GENDERS), enumerate(AGES)):
        column = found[:, FACTORS.classes.index(str(m * 6 + g * 3 + a))]
        parts = both[:, mask_and_gender.index(f"{mask}+{gender}")] + age[:, ages.index(years)]
        np.testing.assert_allclose(column, parts, atol=1e-5)


def test_three_systems_of_one_factor_each_join_too() -> None:
    joint = build_product(groups(a=("age",), g=("gender",), m=("mask",)))
    each = {"a": log_probs(9, 3), "g": log_probs(9, 2), "m": log_probs(9, 3)}
    found = joint.combine(each)
    expected = each["m"][:, 1] + each["g"][:, 0] + each["a"][:, 2]  # parts are sorted by name: mask, female, >=60
    np.testing.assert_allclose(found[:, FACTORS.classes.index("5")], expected, atol=1e-5)
    assert joint.name == "a × g × m"


def test_systems_of_the_same_factors_are_averaged_first() -> None:
    joint = build_product(groups(masks=("mask", "gender"), ages=("age",), other=("age",)))
    both, one, other = log_probs(7, 6), log_probs(7, 3), log_probs(7, 3)
    average = np.log((np.exp(one) + np.exp(other)) / 2)
    np.testing.assert_allclose(
        joint.combine({"masks": both, "ages": one, "other": other}),
        two().combine({"masks": both, "ages": average}),
        atol=1e-5,
    )
    assert joint.weights.tolist() == [1, 0.5, 0.5]


def test_combinations_that_are_no_class_lend_their_probability_to_the_others() -> None:
    some = FACTORS.restrict(["0", "1", "3"])  # masked young man, masked man under 60, masked young woman
    joint = FactorProduct(some, {"masks": ("mask", "gender"), "ages": ("age",)})
    both, age = np.log([[0.4, 0.6]]), np.log([[0.25, 0.75]])  # female, male; <30, <60
    found = np.exp(joint.combine({"masks": both, "ages": age}))
    weights = np.array([0.6 * 0.25, 0.6 * 0.75, 0.4 * 0.25])
    np.testing.assert_allclose(found[0], weights / weights.sum(), rtol=1e-5)


def table(system: str, ids: list[str], knows: tuple[str, ...], classes: list[str]) -> Predictions:
    """Rows of the given true classes as a system of some factors has them, columns in reversed order."""
    parts = FACTORS.projected_classes(knows)
    labels = np.array([FACTORS.project(name, knows) for name in classes], dtype=object)
    found = Predictions(
        np.array(ids, object), np.zeros(len(ids), np.int16), system, parts, log_probs(len(ids), len(parts)), labels
    )
    return found.with_classes(parts[::-1])


def test_tables_are_joined_by_id_and_name_with_the_label_that_their_parts_make() -> None:
    classes = ["17", "0", "10", "5"]
    masks = table("masks", list("abcd"), ("mask", "gender"), classes)
    ages = table("ages", list("abcd"), ("age",), classes)
    found = two().combine_tables({"masks": masks, "ages": ages.take(np.array([2, 0, 3, 1]))})
    assert list(found.labels) == classes
    assert (found.classes, found.system) == (FACTORS.classes, "masks × ages")
    expected = masks.log_probs[0, masks.classes.index("normal+female")] + ages.log_probs[0, ages.classes.index("<60")]
    assert found.log_probs[0, FACTORS.classes.index("16")] == pytest.approx(expected, abs=1e-5)
    joined = two().combine_systems([System("masks", 5, 1, masks, masks), System("ages", 5, 1, ages, None)])
    assert (joined.name, joined.models, joined.holdout) == ("masks × ages", 10, None), "no holdout where one has none"
    assert list(joined.oof.labels) == classes
    with pytest.raises(DataError, match=r"rows: .*'d'"):
        two().combine_tables({"masks": masks, "ages": ages.take(np.arange(3))})


@pytest.mark.parametrize(
    ("knows", "message"),
    [
        ({"masks": ("mask", "gender")}, r"factor age.*model\.label_factors=age"),
        ({"m": ("mask", "gender"), "a": ("gender", "age")}, r"m \(mask, gender\).* a \(gender, age\).*gender"),
        ({"m": ("mask",), "a": ("mask", "gender", "age")}, r"m \(mask\).* a \(.*mask"),
        ({"whole": ()}, "fold 0 of whole, seed 1"),
    ],
)
def test_what_is_no_product_is_refused_by_name(knows: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_product(groups(**knows))


def test_models_of_other_classes_or_mixed_systems_are_refused() -> None:
    other = info("age", factors=profile_factors([30, 58]))
    with pytest.raises(DataError, match="fold 0 of m, seed 1 and fold 0 of a, seed 1"):
        build_product({"m": [model("m", 0, info("mask", "gender"))], "a": [model("a", 0, other)]})
    with pytest.raises(DataError, match=r"fold 1 of m, seed 1 .* \(mask; age\)"):
        build_product({"m": [model("m", 0, info("mask")), model("m", 1, info("age"))]})
    with pytest.raises(DataError, match="fold 1 of x, seed 1"):
        build_product({"m": [model("m", 0, info("mask"))], "x": [model("x", 1, {})]})


def test_a_product_is_needed_where_models_know_different_factors() -> None:
    assert needs_product([info("mask", "gender"), info("age")])
    assert not needs_product([info("age"), info("age")])
    assert not needs_product([{}, {}])
