import json
import re
from pathlib import Path
from typing import Any

import pytest

from fivefold.config.loading import (
    Layer,
    arguments_layer,
    describe_keys,
    environment_layer,
    flatten,
    hashed_settings,
    job_index_layer,
    load,
    normalize_key,
    parse_value,
    read_recipe,
    unused_keys,
)
from fivefold.config.schema import Settings
from fivefold.errors import FivefoldError, MissingInputError, SettingsError


def load_args(*arguments: str) -> Settings:
    return load([arguments_layer(arguments)])


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nepochs = 11\nlr = 1\n[predict]\ntta = ["plain", "flip"]\n')
    return path


def test_settings_come_from_the_source_with_the_highest_precedence(recipe_file: Path):
    arguments = arguments_layer([f"recipe={recipe_file}", "train.epochs=44"])
    environment = environment_layer({"TRAIN__EPOCHS": "33", "TRAIN__LR": "0.3"})
    platform = Layer("hyperparameters", {"train.epochs": "22", "train.lr": "0.2", "train.max_grad_norm": "0.2"})
    train = load([arguments, environment, platform]).train
    assert (train.epochs, train.lr, train.max_grad_norm, train.momentum) == (44, 0.3, 0.2, 0.9)
    assert load([arguments_layer([f"recipe={recipe_file}"]), platform]).train.epochs == 22
    assert load_args(f"recipe={recipe_file}").train.epochs == 11
    assert load_args().train.epochs == 30


def test_recipe_names_the_system_unless_the_system_is_set(recipe_file: Path):
    settings = load([Layer("hyperparameters", {"recipe": str(recipe_file)})])
    assert (settings.train.lr, settings.system) == (1.0, "mine")
    assert load_args(f"--CONFIG={recipe_file}", "system=big").system == "big"
    assert load_args().system == "default"


@pytest.mark.parametrize("name", ["train.epochs", "TRAIN__EPOCHS", " train.epochs ", "--train.epochs"])
def test_keys_are_normalized_and_the_last_argument_wins(name: str):
    assert load_args("Train.Epochs=1", f"{name}=3").train.epochs == 3
    assert normalize_key("--CONFIG") == "recipe"


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("model.weights=a=b", "model.weights", "a=b"),
        ("data.table=", "data.table", ""),
        ("model.backbone_kwargs.act.name=gelu", "model.backbone_kwargs", {"act": {"name": "gelu"}}),
        ("distill.train.epochs=3", "distill.train", {"epochs": 3}),
        ("DISTILL__MODEL__BACKBONE=5", "distill.model", {"backbone": "5"}),
        ("distill.model.backbone_kwargs.depth=3", "distill.model", {"backbone_kwargs": {"depth": 3}}),
    ],
)
def test_argument_text_is_parsed_by_the_type_of_its_key(argument: str, key: str, value: Any):
    assert flatten(load_args(argument))[key] == value


def test_tables_and_keys_inside_them_merge_by_precedence():
    weak, strong = {"distill.train.epochs": "3", "distill.train.lr": "0.3"}, {"distill.train": '{"epochs": 5}'}
    assert load([Layer("a", strong), Layer("b", weak)]).distill.train == {"epochs": 5}
    assert load([Layer("a", weak), Layer("b", strong)]).distill.train == {"epochs": 3, "lr": 0.3}
    both = Layer("b", {"distill.train": '{"epochs": 7}', "distill.train.epochs": "3"})
    assert load([Layer("a", strong), both]).distill.train == {"epochs": 5}


@pytest.mark.parametrize("section", ["model", "distill.model"])
@pytest.mark.parametrize("option", ["checkpoint_path", "cache_dir", "pretrained_cfg_overlay", "weights"])
def test_backbone_options_that_name_weights_are_refused(section: str, option: str):
    with pytest.raises(SettingsError, match=option):
        load_args(f"{section}.backbone_kwargs.{option}=/tmp/w.pth").student()
    allowed = load_args(f"{section}.backbone_kwargs.weight_init=jax").student()
    assert allowed.model.backbone_kwargs == {"weight_init": "jax"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch' in argument; did you mean 'train.epochs'?; --help lists the keys"),
        ("epochs=3", "unknown key 'epochs' in argument; did you mean 'train.epochs'?; --help lists the keys"),
        ("train=1", "unknown key 'train' in argument; it is a section: write train.NAME=VALUE"),
        ("fold", "argument 'fold' is not KEY=VALUE"),
        ("train.options.x=3", "unknown key 'train.options.x'"),
        ("train.epochs=many", "train.epochs='many' (argument): a whole number is needed"),
        ("train.epochs=0", "train.epochs=0 (argument): at least 1 is needed"),
        (f"split.seed={2**32}", "(argument): at most 4294967295 is needed"),
        ("train.lr=0", "train.lr=0.0 (argument): more than 0 is needed"),
        ('distill.train={"epochs": "x"}', "distill.train.epochs='x': a whole number is needed"),
    ],
)
def test_invalid_arguments_raise_plain_messages(argument: str, message: str):
    with pytest.raises(SettingsError) as caught:
        load_args(argument)
    assert message in str(caught.value)
    assert caught.value.exit_code == 64
    assert not [word for word in ("pydantic", "http", "Input should", "\n") if word in str(caught.value)]


def test_environment_layer_ignores_other_and_empty_variables():
    environ = dict.fromkeys(("MODEL_DIR", "DATA", "TRAIN", "MODEL__", "TRIAN__EPOCHS", "__X", "PATH"), "1")
    environ |= {"FOLD": "2", "train__epochs": "3", "DISTILL__TRAIN__EPOCHS": "4", "RUN": "", "TRAIN__LR": ""}
    assert environment_layer(environ).values == {"fold": "2", "train.epochs": "3", "distill.train.epochs": "4"}


@pytest.mark.parametrize(("index", "variables", "fold"), [("3", {}, 3), ("3", {"FOLD": "03"}, 3), ("", {}, None)])
def test_job_completion_index_sets_the_fold(index: str, variables: dict[str, str], fold: int | None):
    layers = [environment_layer(variables), job_index_layer({"JOB_COMPLETION_INDEX": index})]
    assert load(layers).fold == fold


def test_unused_keys_returns_the_keys_that_a_stage_does_not_read():
    layer = arguments_layer(["recipe=demo", "run=a", "seed=3", "train.epochs=3", "split.folds=3"])
    assert unused_keys(layer, ("data", "split")) == ["seed", "train.epochs"]


def test_recipe_as_json_with_a_byte_order_mark_equals_its_toml(tmp_path: Path):
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(read_recipe("demo")), encoding="utf-8-sig")
    as_toml, as_json = flatten(load_args("recipe=demo")), flatten(load_args(f"recipe={path}"))
    assert as_json | {"recipe": "demo"} == as_toml


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("absent.toml", None, MissingInputError, "does not exist; give a file or one of: car_"),
        ("r.yaml", "a: 1", SettingsError, "unknown recipe"),
        ("r.toml", "[train\n", SettingsError, "cannot be read: "),
        ("r.toml", 'system = "größer"', SettingsError, "cannot be read: "),
        ("r.json", '{"train": {"lr": NaN}}', SettingsError, "train.lr=nan: "),
        ("r.json", '{"config": "demo"}', SettingsError, "unknown key 'config'"),
        ("r.json", "[1]", SettingsError, "is not a table of sections"),
        ("r.toml", "train = 3", SettingsError, "r.toml: train=3: a table of keys is needed"),
        ("r.toml", "[train]\nepoch = 3", SettingsError, "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("r.toml", "[augment]\ntrain = [3]", SettingsError, "augment.train=3: a list of tables or texts is needed"),
        ("r.toml", 'recipe = "demo"', SettingsError, "names another recipe"),
    ],
)
def test_invalid_recipes_raise_plain_messages(name: str, text: str | None, error: type, message: str, tmp_path: Path):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(FivefoldError) as caught:
        read_recipe(str(tmp_path / name))
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_describe_lists_every_key_with_type_default_and_meaning():
    lines = describe_keys(list(Settings.model_fields)).splitlines()
    assert [line.split()[0] for line in lines] == list(flatten(Settings()))
    epochs = next(line for line in lines if "train.epochs" in line)
    assert re.fullmatch(r"  train.epochs +a whole number +passes over the training rows \(default: 30\)", epochs)


def test_hashed_settings_contain_views_only_if_they_are_set() -> None:
    unset, explicit = (load([Layer("argument", values)]) for values in ({}, {"predict.tta": "plain"}))
    assert unset.predict == explicit.predict
    assert "predict.tta" not in hashed_settings(unset, ("predict",))
    assert hashed_settings(explicit, ("predict",))["predict.tta"] == ["plain"]


@pytest.fixture
def variant_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "varied.toml"
    path.write_text(
        '[model]\nimage_stats = ["color_mean"]\nbackbone_kwargs = { depth = 3 }\n[train]\nepochs = 30\nlr = 1\n'
        "[distill.train]\nepochs = 50\nmax_grad_norm = 5\n[variants.plain.model]\nimage_stats = []\n"
        "[variants.smoke.model]\nbackbone_kwargs = { width = 8 }\n[variants.smoke.train]\nepochs = 1\n"
        "[variants.smoke.distill.train]\nepochs = 2\n"
    )
    return path


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        ("", ("varied", 30, ["color_mean"], {"depth": 3}, {"epochs": 50, "max_grad_norm": 5})),
        (":smoke", ("varied", 1, ["color_mean"], {"width": 8}, {"epochs": 2, "max_grad_norm": 5})),
        (":plain,smoke", ("varied_plain", 1, [], {"width": 8}, {"epochs": 2, "max_grad_norm": 5})),
    ],
)
def test_variants_override_the_recipe_and_all_but_smoke_extend_the_system_name(variant_recipe, variants, expected):
    settings = load_args(f"recipe={variant_recipe}{variants}", "train.lr=2")
    model, train = settings.model, settings.train
    actual = (settings.system, train.epochs, model.image_stats, model.backbone_kwargs, settings.distill.train)
    assert (actual, train.lr) == (expected, 2)


@pytest.mark.parametrize(
    ("extra_toml", "variant", "message"),
    [
        ("", ":smok", "did you mean 'smoke'"),
        ("", ":plain,x", "variant of varied 'x'"),
        ("[variants.wrong.train]\nepoch = 1\n", ":wrong", ":wrong: unknown key 'train.epoch'"),
    ],
)
def test_invalid_variants_are_named_in_the_error(variant_recipe: Path, extra_toml: str, variant: str, message: str):
    variant_recipe.write_text(variant_recipe.read_text() + extra_toml)
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_args(f"recipe={variant_recipe}{variant}")


SPEC = str | dict[str, Any]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, " 3 ", 3),
        (int, "3.0", 3),
        (float, "5e-5", 5e-5),
        (bool, "No", False),
        (str, '"demo"', "demo"),
        (str, '"a" and "b"', '"a" and "b"'),
        (str, 5, "5"),
        (Any, '"3"', "3"),
        (int | None, "none", None),
        (list[str], "plain, flip", ["plain", "flip"]),
        (list[str], "['plain', 'flip']", ["plain", "flip"]),
        (list[str], "[plain,flip]", ["plain", "flip"]),
        (list[str], '"plain","flip"', ["plain", "flip"]),
        (list[str], "", []),
        (list[float], "[.8,.1,.1]", [0.8, 0.1, 0.1]),
        (int | list[int], "224,192", [224, 192]),
        (list[SPEC], '["flip", {"name": "rotation", "degrees": 15}]', ["flip", {"name": "rotation", "degrees": 15}]),
        (list[SPEC], '{ name = "rotation", degrees = 15 }', [{"name": "rotation", "degrees": 15}]),
        (dict[str, Any], "{ depth = 3 }", {"depth": 3}),
        (Any, "True", True),
    ],
)
def test_parse_value_converts_text_to_the_type(kind: Any, value: Any, expected: Any):
    actual = parse_value(kind, value)
    assert actual == expected
    assert type(actual) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value", "type_name"),
    [
        (int, "3.5", "a whole number"),
        (float, "0,001", "a number"),
        (float, "nan", "a number"),
        (bool, "2", "true or false"),
        (list[str], "plain,,flip", "a list of texts"),
        (list[float], "a,b", "a list of numbers"),
        (list[SPEC], "flip,{name=rotation}", "a list of tables or texts"),
        (int | list[int], "224x192", "a whole number or a list of whole numbers"),
        (dict[str, Any], "depth=3", "a table"),
        (dict[str, Any], "[" * 100_000, "a table"),
    ],
)
def test_parse_value_refuses_invalid_text_and_names_the_type(kind: Any, value: Any, type_name: str):
    with pytest.raises(ValueError, match=f"^{type_name} is needed$"):
        parse_value(kind, value)
