"""Where settings come from, which source wins, and what a miss is told."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fivefold.errors import FivefoldError, MissingInputError, SettingsError
from fivefold.recipe import Settings
from fivefold.recipes import shipped_recipes
from fivefold.settings import (
    Layer,
    arguments_layer,
    describe,
    environment_layer,
    flatten,
    index_layer,
    key_settings,
    load,
    normal_key,
    read_recipe,
    unused_keys,
)


def given(*arguments: str) -> Settings:
    return load([arguments_layer(arguments)])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nepochs = 11\nlr = 1\n[predict]\nviews = ["plain", "flip"]\n')
    return path


def test_the_strongest_source_wins(recipe: Path):
    arguments = arguments_layer([f"recipe={recipe}", "train.epochs=44"])
    environment = environment_layer({"TRAIN__EPOCHS": "33", "TRAIN__LR": "0.3"})
    platform = Layer("hyperparameters", {"train.epochs": "22", "train.lr": "0.2", "train.clip": "0.2"})
    train = load([arguments, environment, platform]).train
    assert (train.epochs, train.lr, train.clip, train.momentum) == (44, 0.3, 0.2, 0.9)
    assert load([arguments_layer([f"recipe={recipe}"]), platform]).train.epochs == 22
    assert given(f"recipe={recipe}").train.epochs == 11
    assert given().train.epochs == 30


@pytest.mark.parametrize("source", ["argument", "environment", "hyperparameters"])
def test_any_source_may_name_the_recipe(source: str, recipe: Path):
    settings = load([Layer(source, {"recipe": str(recipe)})])
    assert (settings.train.epochs, settings.train.lr, settings.system) == (11, 1.0, "mine")


def test_a_system_is_named_by_its_recipe_unless_it_has_a_name(recipe: Path):
    assert given(f"recipe={recipe}", "system=big").system == "big"
    assert given().system == "default"


@pytest.mark.parametrize(
    "name",
    [
        "train.epochs",
        "TRAIN__EPOCHS",
        " train.epochs ",
        "--train.epochs",
    ],
)
def test_keys_may_be_spelled_in_many_ways(name: str):
    assert normal_key(name) == "train.epochs"
    assert given(f"{name}=3").train.epochs == 3


def test_of_a_key_given_twice_the_last_counts_however_it_is_spelled():
    assert given("train.epochs=1", "TRAIN__EPOCHS=2", "train.epochs=3", "Train.Epochs=4").train.epochs == 4


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("run=5", "run", "5"),
        ("run=true", "run", "true"),
        ('run="5"', "run", "5"),
        ("model.weights=a=b", "model.weights", "a=b"),
        ("data.table=", "data.table", ""),
        ("predict.views=plain,flip", "predict.views", ["plain", "flip"]),
        ("train.epochs=3.0", "train.epochs", 3),
        ("split.stratify=False", "split.stratify", False),
        ("split.stratify=0", "split.stratify", False),
        ("split.parts=[.8,.1,.1]", "split.parts", [0.8, 0.1, 0.1]),
        ("fold=none", "fold", None),
        ("model.drop_path=none", "model.drop_path", None),
        ("model.drop_path=.1", "model.drop_path", 0.1),
        ("model.head=mlp", "model.head", "mlp"),
        ('model.head={"name": "mlp", "hidden": 8}', "model.head", {"name": "mlp", "hidden": 8}),
        ('model.head={ name = "mlp", dropout = 0.3 }', "model.head", {"name": "mlp", "dropout": 0.3}),
        ("model.meta=color_mean,aspect", "model.meta", ["color_mean", "aspect"]),
        ("model.meta=", "model.meta", []),
        ("model.options.depth=3", "model.options", {"depth": 3}),
        ("model.options.act.name=gelu", "model.options", {"act": {"name": "gelu"}}),
        ('model.options={"depth": 3}', "model.options", {"depth": 3}),
        ("distill.train.epochs=3", "distill.train", {"epochs": 3}),
        ("DISTILL__MODEL__BACKBONE=5", "distill.model", {"backbone": "5"}),
        ("distill.model.options.depth=3", "distill.model", {"options": {"depth": 3}}),
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


def test_layers_can_be_used_again():
    layer = Layer("hyperparameters", {"model.options": {"depth": 3}})
    load([arguments_layer(["model.options.width=2"]), layer])
    assert layer.values == {"model.options": {"depth": 3}}
    assert load([layer]).model.options == {"depth": 3}


def test_what_a_platform_decoded_is_as_good_as_text():
    decoded = {
        "train.epochs": 3.0,
        "split.stratify": 0,
        "run": 20,
        "train.lr": 1,
        "predict.views": ["flip"],
        "fold": None,
    }
    settings = load([Layer("hyperparameters", decoded)])
    assert (settings.train.epochs, settings.split.stratify, settings.run) == (3, False, "20")
    assert (settings.train.lr, settings.predict.views, settings.fold) == (1.0, ["flip"], None)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.epoch=3", "unknown key 'train.epoch' in argument; did you mean 'train.epochs'?; --help lists the keys"),
        ("epochs=3", "unknown key 'epochs' in argument; did you mean 'train.epochs'?; --help lists the keys"),
        ("batch_size=1", "did you mean 'train.batch_size' or 'predict.batch_size' or 'serve.batch_size'?"),
        ("trian.epochs=1", "did you mean 'train.epochs'?"),
        ("train=1", "unknown key 'train' in argument; it is a section: write train.NAME=VALUE"),
        ("distill.train.epoch=3", "did you mean 'distill.train.epochs'?"),
        ("=3", "unknown key '' in argument; --help lists the keys"),
        ("train.options.x=3", "unknown key 'train.options.x'"),
        ("train.epochs=many", "train.epochs='many' (argument): a whole number is needed"),
        ("train.epochs=", "train.epochs='' (argument): a whole number is needed"),
        ("train.epochs=0", "train.epochs=0 (argument): at least 1 is needed"),
        ("train.lr=0", "train.lr=0.0 (argument): more than 0 is needed"),
        ("train.lr=inf", "train.lr='inf' (argument): a number is needed"),
        ("train.momentum=1", "train.momentum=1.0 (argument): less than 1 is needed"),
        ("distill.alpha=2", "distill.alpha=2.0 (argument): at most 1 is needed"),
        ("distill.train.epochs=0", "distill.train.epochs=0 (argument): at least 1 is needed"),
        ("split.stratify=2", "split.stratify='2' (argument): true or false is needed"),
        (
            "ensemble.blend=max",
            "ensemble.blend='max' (argument): one of mean, weighted, fitted, geometric, rank, vote, product, greedy, ",
        ),
        ("split.parts=.8,.2", "split: parts are three shares (train, valid, test) that sum to 1"),
        (
            "model.image_size=big",
            "model.image_size='big' (argument): a whole number or a list of whole numbers is needed",
        ),
        ('distill.train={"epoch": 3}', "unknown key 'distill.train.epoch'; did you mean 'distill.train.epochs'?"),
        ('distill.train={"epochs": "x"}', "distill.train.epochs='x': a whole number is needed"),
        ("recipe=dmo", "unknown recipe 'dmo'; did you mean 'demo'?"),
    ],
)
def test_a_miss_is_told_in_plain_words(argument: str, message: str):
    with pytest.raises(SettingsError) as caught:
        given(argument)
    assert message in str(caught.value)
    assert caught.value.exit_code == 64
    assert not [word for word in ("pydantic", "http", "Input should", "\n") if word in str(caught.value)]


def test_what_is_no_assignment_is_refused():
    with pytest.raises(SettingsError, match="argument 'fold' is not KEY=VALUE"):
        arguments_layer(["fold", "=", "3"])


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


def test_two_spellings_in_the_environment_must_agree():
    assert environment_layer({"FOLD": "2", "fold": "2"}).values == {"fold": "2"}
    with pytest.raises(SettingsError, match="FOLD=2 and fold=3 in the environment differ"):
        environment_layer({"FOLD": "2", "fold": "3"})


def folded(arguments: list[str], environ: dict[str, str], platform: dict[str, Any] | None = None) -> int | None:
    hyperparameters = Layer("hyperparameters", platform or {})
    return load([arguments_layer(arguments), environment_layer(environ), hyperparameters, index_layer(environ)]).fold


def test_the_index_of_an_indexed_job_stands_in_for_the_fold():
    assert folded([], {"JOB_COMPLETION_INDEX": "3"}) == 3
    assert folded([], {"JOB_COMPLETION_INDEX": "3", "FOLD": "03"}) == 3
    assert folded(["FOLD=3"], {"JOB_COMPLETION_INDEX": "3"}) == 3
    assert folded([], {"JOB_COMPLETION_INDEX": ""}) is None
    assert folded([], {"JOB_COMPLETION_INDEX": "3", "FOLD": ""}) == 3


def test_keys_that_a_stage_does_not_read_are_found():
    layer = arguments_layer(["recipe=demo", "run=a", "seed=3", "train.epochs=3", "split.folds=3"])
    assert unused_keys(layer, ("data", "split")) == ["seed", "train.epochs"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_says_the_same_in_json(name: str, tmp_path: Path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(read_recipe(name)), encoding="utf-8")
    as_toml, as_json = flatten(given(f"recipe={name}")), flatten(given(f"recipe={path}"))
    assert as_json | {"recipe": name} == as_toml


@pytest.mark.parametrize("argument", ["config=", "--config=", "CONFIG="])
def test_config_is_another_name_of_recipe(argument: str, recipe: Path):
    assert given(argument + str(recipe)) == given(f"recipe={recipe}")
    assert given("recipe=demo", argument + str(recipe)).train.epochs == 11


def test_a_recipe_may_be_json_or_begin_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "r.json").write_text(json.dumps({"train": {"epochs": 9}}))
    assert given(f"recipe={tmp_path / 'r.json'}").train.epochs == 9
    (tmp_path / "r.TOML").write_bytes(b"\xef\xbb\xbf[train]\nepochs = 8\n")
    assert given(f"recipe={tmp_path / 'r.TOML'}").train.epochs == 8


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("absent.toml", None, MissingInputError, "does not exist; give a file or one of: car_"),
        ("r.yaml", "a: 1", SettingsError, "recipes are TOML or JSON, since YAML reads 5e-5 as a text"),
        ("r.toml", "[train\n", SettingsError, "cannot be read: "),
        ("r.json", "{", SettingsError, "cannot be read: "),
        ("r.json", "", SettingsError, "cannot be read: Expecting value: line 1 column 1"),
        ("r.json", '{"train": {"lr": NaN}}', SettingsError, "train.lr=nan: "),
        ("r.json", '{"train": {"epoch": 3}}', SettingsError, "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("r.json", '{"train": {"epochs": null}}', SettingsError, "train.epochs=None: a whole number is needed"),
        ("r.json", '{"config": "demo"}', SettingsError, "unknown key 'config'"),
        ("r.json", "[1]", SettingsError, "holds list, not a table of sections"),
        ("r.toml", "train = 3", SettingsError, "r.toml: train=3: a table of keys is needed"),
        ("r.toml", "[train]\nepoch = 3", SettingsError, "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("r.toml", "[trian]\nepochs = 3", SettingsError, "unknown key 'trian'; did you mean 'train'?"),
        ("r.toml", "epochs = 3", SettingsError, "unknown key 'epochs'; did you mean 'train.epochs'?"),
        ("r.toml", '[train]\nepochs = "3"', SettingsError, "train.epochs='3': a whole number is needed"),
        ("r.toml", "[train]\nepochs = 3.5", SettingsError, "train.epochs=3.5: a whole number is needed"),
        ("r.toml", "[train]\nlr = nan", SettingsError, "train.lr=nan: "),
        ("r.toml", "[model]\nimage_size = 2.5", SettingsError, "a whole number or a list of whole numbers is needed"),
        ("r.toml", "[split]\nparts = [1, 'x', 0]", SettingsError, "split.parts='x': a list of numbers is needed"),
        ("r.toml", "[augment]\ntrain = [3]", SettingsError, "augment.train=3: a list of tables or texts is needed"),
        ("r.toml", "[distill.train]\nepoch = 3", SettingsError, "unknown key 'distill.train.epoch'; did you mean"),
        ("r.toml", 'recipe = "demo"', SettingsError, "a recipe states everything itself"),
    ],
)
def test_a_recipe_that_cannot_be_is_told(name: str, text: str | None, error: type, message: str, tmp_path: Path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(FivefoldError) as caught:
        read_recipe(str(tmp_path / name))
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert not [word for word in ("pydantic", "http", "Input should") if word in str(caught.value)]


def test_a_recipe_in_another_encoding_is_told(tmp_path: Path):
    (tmp_path / "r.toml").write_bytes('system = "größer"'.encode("latin-1"))
    with pytest.raises(SettingsError, match="cannot be read"):
        read_recipe(str(tmp_path / "r.toml"))


def test_a_complaint_is_made_once_for_a_key_of_two_types(tmp_path: Path):
    (tmp_path / "r.toml").write_text('[model]\nimage_size = "big"\n')
    with pytest.raises(SettingsError) as caught:
        read_recipe(str(tmp_path / "r.toml"))
    assert str(caught.value).count("image_size") == 1


def test_help_names_every_key_with_type_default_and_meaning():
    lines = describe(list(Settings.model_fields)).splitlines()
    assert [line.split()[0] for line in lines] == list(flatten(Settings()))
    epochs = next(line for line in lines if "train.epochs" in line)
    assert re.fullmatch(r"  train.epochs +a whole number +passes over the training rows \(default: 30\)", epochs)


def test_views_that_are_asked_for_are_not_those_that_a_model_chooses() -> None:
    silent, asked = (load([Layer("argument", given)]) for given in ({}, {"predict.views": "plain"}))
    assert silent.predict == asked.predict
    assert "predict.views" not in key_settings(silent, ("predict",))
    assert key_settings(asked, ("predict",))["predict.views"] == ["plain"]


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    path = tmp_path / "varied.toml"
    path.write_text(
        '[model]\nimage_size = 384\nmeta = ["color_mean"]\noptions = { depth = 3 }\n[train]\nepochs = 30\nlr = 1\n'
        "[distill.train]\nepochs = 50\nclip = 5\n"
        "[variants.plain.model]\nmeta = []\n"
        "[variants.smoke.model]\nimage_size = 32\noptions = { width = 8 }\n[variants.smoke.train]\nepochs = 1\n"
        "[variants.smoke.distill.train]\nepochs = 2\n"
    )
    return path


def test_a_recipe_without_a_variant_is_as_it_stands(varied: Path):
    settings = given(f"recipe={varied}")
    assert (settings.train.epochs, settings.model.image_size, settings.system) == (30, 384, "varied")


def test_variants_lay_their_keys_over_the_recipes(varied: Path):
    settings = given(f"recipe={varied}:plain,smoke", "train.lr=2")
    assert (settings.model.meta, settings.model.image_size, settings.model.options) == ([], 32, {"width": 8})
    assert (settings.train.epochs, settings.train.lr) == (1, 2)
    assert settings.distill.train == {"epochs": 2, "clip": 5}


def test_models_are_named_after_the_variant_but_not_after_smoke(varied: Path):
    assert given(f"recipe={varied}:plain,smoke").system == "varied_plain"
    assert given(f"recipe={varied}:smoke").system == "varied"


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        (":smok", "unknown variant of varied 'smok'; did you mean 'smoke'"),
        (":plain,x", "unknown variant of varied 'x'"),
    ],
)
def test_a_variant_that_is_not_there_is_named(varied: Path, suffix: str, said: str):
    with pytest.raises(SettingsError, match=re.escape(said)):
        given(f"recipe={varied}{suffix}")


def test_a_wrong_key_in_a_variant_names_the_variant(varied: Path):
    varied.write_text(varied.read_text() + "[variants.wrong.train]\nepoch = 1\n")
    with pytest.raises(SettingsError, match=r"variant wrong: unknown key 'train\.epoch'"):
        given(f"recipe={varied}:wrong")
    varied.write_text("variants = 3\n")
    with pytest.raises(SettingsError, match="variants are tables"):
        given(f"recipe={varied}")


def test_every_variant_of_a_shipped_recipe_is_sound():
    for name, path in shipped_recipes().items():
        for variant in tomllib.loads(path.read_text(encoding="utf-8")).get("variants", {}):
            read_recipe(f"{name}:{variant}")
