"""Where settings come from, which source wins, and what a miss is told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fivefold.config.loading import (
    Layer,
    arguments_layer,
    describe,
    environment_layer,
    flatten,
    hashed_settings,
    job_index_layer,
    load,
    normalize_key,
    read_recipe,
    unused_keys,
)
from fivefold.config.recipes import shipped_recipes
from fivefold.config.schema import Settings
from fivefold.errors import FivefoldError, MissingInputError, SettingsError


def given(*arguments: str) -> Settings:
    return load([arguments_layer(arguments)])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nepochs = 11\nlr = 1\n[predict]\ntta = ["plain", "flip"]\n')
    return path


def test_the_strongest_source_wins(recipe: Path):
    arguments = arguments_layer([f"recipe={recipe}", "train.epochs=44"])
    environment = environment_layer({"TRAIN__EPOCHS": "33", "TRAIN__LR": "0.3"})
    platform = Layer("hyperparameters", {"train.epochs": "22", "train.lr": "0.2", "train.max_grad_norm": "0.2"})
    train = load([arguments, environment, platform]).train
    assert (train.epochs, train.lr, train.max_grad_norm, train.momentum) == (44, 0.3, 0.2, 0.9)
    assert load([arguments_layer([f"recipe={recipe}"]), platform]).train.epochs == 22
    assert given(f"recipe={recipe}").train.epochs == 11
    assert given().train.epochs == 30


@pytest.mark.parametrize("source", ["argument", "environment", "hyperparameters"])
def test_any_source_may_name_the_recipe_which_names_the_system(source: str, recipe: Path):
    settings = load([Layer(source, {"recipe": str(recipe)})])
    assert (settings.train.epochs, settings.train.lr, settings.system) == (11, 1.0, "mine")
    assert given(f"recipe={recipe}", "system=big").system == "big"
    assert given().system == "default"


@pytest.mark.parametrize("name", ["train.epochs", "TRAIN__EPOCHS", " train.epochs ", "--train.epochs"])
def test_keys_may_be_spelled_in_many_ways_and_the_last_counts(name: str):
    assert normalize_key(name) == "train.epochs"
    assert given("Train.Epochs=1", f"{name}=3").train.epochs == 3


@pytest.mark.parametrize("argument", ["config=", "--config=", "CONFIG="])
def test_config_is_another_name_of_recipe(argument: str, recipe: Path):
    assert given(argument + str(recipe)) == given(f"recipe={recipe}")
    assert given("recipe=demo", argument + str(recipe)).train.epochs == 11


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("run=5", "run", "5"),
        ("model.weights=a=b", "model.weights", "a=b"),
        ("data.table=", "data.table", ""),
        ("predict.tta=plain,flip", "predict.tta", ["plain", "flip"]),
        ("split.stratify=False", "split.stratify", False),
        ("fold=none", "fold", None),
        ("model.drop_path=.1", "model.drop_path", 0.1),
        ('model.head={ name = "mlp", dropout = 0.3 }', "model.head", {"name": "mlp", "dropout": 0.3}),
        ("model.image_stats=color_mean,aspect", "model.image_stats", ["color_mean", "aspect"]),
        ("model.backbone_kwargs.depth=3", "model.backbone_kwargs", {"depth": 3}),
        ("model.backbone_kwargs.act.name=gelu", "model.backbone_kwargs", {"act": {"name": "gelu"}}),
        ('model.backbone_kwargs={"depth": 3}', "model.backbone_kwargs", {"depth": 3}),
        ("distill.train.epochs=3", "distill.train", {"epochs": 3}),
        ("DISTILL__MODEL__BACKBONE=5", "distill.model", {"backbone": "5"}),
        ("distill.model.backbone_kwargs.depth=3", "distill.model", {"backbone_kwargs": {"depth": 3}}),
    ],
)
def test_text_is_read_by_what_the_key_wants(argument: str, key: str, value: Any):
    assert flatten(given(argument))[key] == value


def test_a_table_and_a_key_of_it_meet_in_the_order_of_their_strength():
    weak, strong = {"distill.train.epochs": "3", "distill.train.lr": "0.3"}, {"distill.train": '{"epochs": 5}'}
    assert load([Layer("a", strong), Layer("b", weak)]).distill.train == {"epochs": 5}
    assert load([Layer("a", weak), Layer("b", strong)]).distill.train == {"epochs": 3, "lr": 0.3}
    both = Layer("b", {"distill.train": '{"epochs": 7}', "distill.train.epochs": "3"})
    assert load([Layer("a", strong), both]).distill.train == {"epochs": 5}


@pytest.mark.parametrize("section", ["model", "distill.model"])
@pytest.mark.parametrize(
    "option",
    [
        "checkpoint_path",
        "cache_dir",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "weights",
        "weights_path",
    ],
)
def test_no_option_of_a_backbone_names_weights(section: str, option: str):
    with pytest.raises(SettingsError, match=option) as caught:
        given(f"{section}.backbone_kwargs.{option}=/tmp/w.pth").student()
    assert caught.value.exit_code == 64
    assert given(f"{section}.backbone_kwargs.weight_init=jax").student().model.backbone_kwargs == {"weight_init": "jax"}


def test_layers_can_be_used_again():
    layer = Layer("hyperparameters", {"model.backbone_kwargs": {"depth": 3}})
    load([arguments_layer(["model.backbone_kwargs.width=2"]), layer])
    assert layer.values == {"model.backbone_kwargs": {"depth": 3}}
    assert load([layer]).model.backbone_kwargs == {"depth": 3}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch' in argument; did you mean 'train.epochs'?; --help lists the keys"),
        ("epochs=3", "unknown key 'epochs' in argument; did you mean 'train.epochs'?; --help lists the keys"),
        ("train=1", "unknown key 'train' in argument; it is a section: write train.NAME=VALUE"),
        ("fold", "argument 'fold' is not KEY=VALUE"),
        ("=3", "unknown key '' in argument; --help lists the keys"),
        ("train.options.x=3", "unknown key 'train.options.x'"),
        ("train.epochs=many", "train.epochs='many' (argument): a whole number is needed"),
        ("train.epochs=0", "train.epochs=0 (argument): at least 1 is needed"),
        ("seed=-1", "seed=-1 (argument): at least 0 is needed"),
        (f"seed={2**63}", "(argument): at most 4294967295 is needed"),
        ("split.seed=-1", "split.seed=-1 (argument): at least 0 is needed"),
        (f"split.seed={2**32}", "(argument): at most 4294967295 is needed"),
        ("train.lr=0", "train.lr=0.0 (argument): more than 0 is needed"),
        ('distill.train={"epochs": "x"}', "distill.train.epochs='x': a whole number is needed"),
    ],
)
def test_a_miss_is_told_in_plain_words(argument: str, message: str):
    with pytest.raises(SettingsError) as caught:
        given(argument)
    assert message in str(caught.value)
    assert caught.value.exit_code == 64
    assert not [word for word in ("pydantic", "http", "Input should", "\n") if word in str(caught.value)]


def test_the_environment_is_read_with_care():
    environ = {
        "MODEL_DIR": "/x",
        "DATA": "/y",
        "TRAIN": "1",
        "MODEL__": "z",
        "TRIAN__EPOCHS": "1",
        "__X": "1",
        "PATH": "/bin",
    }
    assert environment_layer(environ).values == {}
    environ = {"FOLD": "2", "train__epochs": "3", "DISTILL__TRAIN__EPOCHS": "4", "RUN": "", "TRAIN__LR": ""}
    assert environment_layer(environ).values == {"fold": "2", "train.epochs": "3", "distill.train.epochs": "4"}
    assert environment_layer({"FOLD": "2", "fold": "2"}).values == {"fold": "2"}
    with pytest.raises(SettingsError, match="FOLD=2 and fold=3"):
        environment_layer({"FOLD": "2", "fold": "3"})


@pytest.mark.parametrize(
    ("index", "named", "argument", "fold"),
    [("3", {}, [], 3), ("3", {"FOLD": "03"}, [], 3), ("3", {}, ["FOLD=3"], 3), ("", {}, [], None)],
)
def test_the_index_of_an_indexed_job_stands_in_for_the_fold(
    index: str, named: dict[str, str], argument: list[str], fold: int | None
):
    environ = {"JOB_COMPLETION_INDEX": index, **named}
    assert load([arguments_layer(argument), environment_layer(environ), job_index_layer(environ)]).fold == fold


def test_keys_that_a_stage_does_not_read_are_found():
    layer = arguments_layer(["recipe=demo", "run=a", "seed=3", "train.epochs=3", "split.folds=3"])
    assert unused_keys(layer, ("data", "split")) == ["seed", "train.epochs"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_says_the_same_in_json_behind_a_byte_order_mark(name: str, tmp_path: Path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(read_recipe(name)), encoding="utf-8-sig")
    as_toml, as_json = flatten(given(f"recipe={name}")), flatten(given(f"recipe={path}"))
    assert as_json | {"recipe": name} == as_toml


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("absent.toml", None, MissingInputError, "does not exist; give a file or one of: car_"),
        ("r.yaml", "a: 1", SettingsError, "recipes are TOML or JSON"),
        ("r.toml", "[train\n", SettingsError, "cannot be read: "),
        ("r.toml", 'system = "größer"', SettingsError, "cannot be read: "),
        ("r.json", '{"train": {"lr": NaN}}', SettingsError, "train.lr=nan: "),
        ("r.json", '{"train": {"epochs": null}}', SettingsError, "train.epochs=None: a whole number is needed"),
        ("r.json", '{"config": "demo"}', SettingsError, "unknown key 'config'"),
        ("r.json", "[1]", SettingsError, "list, not a table of sections"),
        ("r.toml", "train = 3", SettingsError, "r.toml: train=3: a table of keys is needed"),
        ("r.toml", "[train]\nepoch = 3", SettingsError, "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("r.toml", "[trian]\nepochs = 3", SettingsError, "unknown key 'trian'; did you mean 'train'?"),
        ("r.toml", '[train]\nepochs = "3"', SettingsError, "train.epochs='3': a whole number is needed"),
        ("r.toml", "[split]\nratios = [1, 'x', 0]", SettingsError, "split.ratios='x': a list of numbers is needed"),
        ("r.toml", "[augment]\ntrain = [3]", SettingsError, "augment.train=3: a list of tables or texts is needed"),
        ("r.toml", 'recipe = "demo"', SettingsError, "names another recipe"),
    ],
)
def test_a_recipe_that_cannot_be_is_told(name: str, text: str | None, error: type, message: str, tmp_path: Path):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(FivefoldError) as caught:
        read_recipe(str(tmp_path / name))
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert not [word for word in ("pydantic", "http", "Input should") if word in str(caught.value)]


def test_help_names_every_key_with_type_default_and_meaning():
    lines = describe(list(Settings.model_fields)).splitlines()
    assert [line.split()[0] for line in lines] == list(flatten(Settings()))
    epochs = next(line for line in lines if "train.epochs" in line)
    assert re.fullmatch(r"  train.epochs +a whole number +passes over the training rows \(default: 30\)", epochs)


def test_views_that_are_asked_for_are_not_those_that_a_model_chooses() -> None:
    silent, asked = (load([Layer("argument", given)]) for given in ({}, {"predict.tta": "plain"}))
    assert silent.predict == asked.predict
    assert "predict.tta" not in hashed_settings(silent, ("predict",))
    assert hashed_settings(asked, ("predict",))["predict.tta"] == ["plain"]


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    path = tmp_path / "varied.toml"
    path.write_text(
        '[model]\nimage_size = 384\nimage_stats = ["color_mean"]\nbackbone_kwargs = { depth = 3 }\n[train]\nepochs = 30\nlr = 1\n'
        "[distill.train]\nepochs = 50\nmax_grad_norm = 5\n"
        "[variants.plain.model]\nimage_stats = []\n"
        "[variants.smoke.model]\nimage_size = 32\nbackbone_kwargs = { width = 8 }\n[variants.smoke.train]\nepochs = 1\n"
        "[variants.smoke.distill.train]\nepochs = 2\n"
    )
    return path


@pytest.mark.parametrize(
    ("variants", "system", "epochs", "size", "options", "student"),
    [
        ("", "varied", 30, 384, {"depth": 3}, {"epochs": 50, "max_grad_norm": 5}),
        (":smoke", "varied", 1, 32, {"width": 8}, {"epochs": 2, "max_grad_norm": 5}),
        (":plain,smoke", "varied_plain", 1, 32, {"width": 8}, {"epochs": 2, "max_grad_norm": 5}),
    ],
)
def test_variants_lay_their_keys_over_the_recipes_and_smoke_gives_no_name(
    varied: Path, variants: str, system: str, epochs: int, size: int, options: Any, student: Any
):
    settings = given(f"recipe={varied}{variants}", "train.lr=2")
    assert (settings.system, settings.train.epochs, settings.train.lr) == (system, epochs, 2)
    assert (settings.model.image_size, settings.model.backbone_kwargs, settings.distill.train) == (
        size,
        options,
        student,
    )
    assert settings.model.image_stats == ([] if "plain" in variants else ["color_mean"])


@pytest.mark.parametrize(
    ("more", "variant", "named"),
    [
        ("", ":smok", "did you mean 'smoke'"),
        ("", ":plain,x", "variant of varied 'x'"),
        ("[variants.wrong.train]\nepoch = 1\n", ":wrong", "variant wrong: unknown key 'train.epoch'"),
    ],
)
def test_a_variant_that_cannot_be_is_named(varied: Path, more: str, variant: str, named: str):
    varied.write_text(varied.read_text() + more)
    with pytest.raises(SettingsError, match=re.escape(named)):
        given(f"recipe={varied}{variant}")
