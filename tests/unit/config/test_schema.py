import math
from typing import Any

import pytest
from pydantic import ValidationError

from fivefold.config.loading import FIELDS, flatten, hashed_settings
from fivefold.config.schema import EXECUTION_KEYS, SECTIONS, Data, Ensemble, Model, SageMaker, Settings, Split
from fivefold.contract.stage_specs import STAGES


def test_every_key_has_a_description():
    assert [key for key, field in FIELDS.items() if key not in SECTIONS and not field.description] == []


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Split, {"ratios": [0.8, 0.1, 0.2]}, "sum to 1"),
        (Data, {"class_aliases": [["a", "b"], ["b", "c"]]}, "class_aliases"),
        (Data, {"class_aliases": [["a"]]}, "class_aliases"),
        (Data, {"age_bins": [60, 30]}, "ascending"),
        (Ensemble, {"blend": "weighted", "weights": {"a": -1.0}}, "greater than or equal to 0"),
        (Ensemble, {"weights": {"a": 1.0}}, "other blends"),
        (Ensemble, {"submission": "../x.csv"}, "plain name"),
        (SageMaker, {"tags": {"a": [1]}}, "tags"),
        (Split, {"ratios": [0.9, 0.0, 0.1]}, "valid above 0"),
        (Split, {"ratios": [0.8, 0.1, 0.1], "holdout": 0.1}, "exclude each other"),
        (Data, {"max_unpacked_gib": math.inf}, "finite"),
        (Model, {"image_size": [224]}, "one positive number"),
        (Model, {"mean": [0.5]}, "three numbers"),
        (Model, {"std": [0.2, 0.0, 0.2]}, "std is positive"),
        (Model, {"image_stats": ["aspect", "aspect"]}, "names a feature twice"),
        (Ensemble, {"row_number_column": "ID", "label_column": "ID"}, "label_column"),
    ],
)
def test_sections_refuse_values_that_cannot_work(section: type, values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)


def test_student_settings_differ_only_in_the_keys_of_distill():
    tree = {"train": {"lr": 0.01}, "distill": {"train": {"epochs": 3}, "model": {"dropout": 0.5}}}
    settings = Settings.model_validate(tree)
    assert flatten(settings.student()) == flatten(settings) | {"train.epochs": 3, "model.dropout": 0.5}


def test_stages_name_existing_sections_keys_and_channels():
    for stage in STAGES.values():
        single_keys = {key for key in stage.sections if "." in key}
        assert set(stage.sections) - single_keys <= set(Settings.model_fields)
        assert single_keys <= set(flatten(Settings()))
        assert set(stage.hashed) <= {*stage.channels, *stage.optional}


def test_hashed_settings_leave_out_keys_that_cannot_change_the_result():
    assert set(flatten(Settings())) >= EXECUTION_KEYS
    keys = hashed_settings(Settings(), STAGES["train-fold"].sections)
    assert not EXECUTION_KEYS & set(keys)
    assert {"fold", "seed", "train.epochs", "model.backbone"} <= set(keys)
    data = {"data.resize_shorter_side", "data.jpeg_draft", "data.max_megapixels"}
    assert {key for key in keys if key.startswith(("split.", "distill.", "data."))} == data


@pytest.mark.parametrize(
    ("values", "seconds", "words"),
    [
        ({}, math.inf, ""),
        ({"time": "90s"}, 90, "time=90s"),
        ({"budget": 3.0, "hourly_price": 1.2}, 9000, "budget=3"),
        ({"time": "1h", "budget": 3.0, "hourly_price": 1.2}, 3600, "time=1h budget=3"),
        ({"time": "3h", "budget": 3.0, "hourly_price": 1.2}, 9000, "time=3h budget=3"),
    ],
)
def test_time_and_budget_limit_a_run(values, seconds, words):
    settings = Settings.model_validate(values)
    assert settings.time_limit == pytest.approx(seconds)
    assert settings.limit_words == words


def test_a_budget_needs_a_price():
    with pytest.raises(ValidationError, match="hourly_price"):
        Settings.model_validate({"budget": 3.0})
