"""Where settings come from: layers of keys and values over a recipe, and kind errors for a miss.

Strongest first: KEY=VALUE arguments, environment, hyperparameters, recipe, default. Keys are
case-insensitive, and sections join with a dot or with `__`.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fivefold.choose import choose, did_you_mean
from fivefold.errors import MissingInputError, SettingsError
from fivefold.recipe import EXECUTION_KEYS, SECTIONS, Settings

RECIPES = Path(__file__).parent / "recipes"
ENVIRONMENT_KEYS = {"fold", "stage", "recipe", "run", "seed"}


@dataclass(frozen=True)
class Layer:
    """One source of settings: where it is, and its keys with values as text or as decoded."""

    source: str
    values: Mapping[str, Any]


def shipped_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def arguments_layer(arguments: Sequence[str]) -> Layer:
    """The layer of `KEY=VALUE` arguments; anything else is an error."""
    for argument in arguments:
        if "=" not in argument:
            raise SettingsError(f"argument {argument!r} is not KEY=VALUE; see --help for the keys")
    return Layer("argument", dict(argument.split("=", 1) for argument in arguments))


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """FOLD, STAGE, RECIPE, RUN, SEED and SECTION__KEY; JOB_COMPLETION_INDEX stands in for FOLD."""
    values = {}
    for name, value in environ.items():
        section, _, key = name.lower().partition("__")
        if (key and section in SECTIONS) or name.lower() in ENVIRONMENT_KEYS:
            values[name] = value
    index = environ.get("JOB_COMPLETION_INDEX")
    if index is not None:
        fold = next((v for n, v in values.items() if n.lower() == "fold"), index)
        if fold != index:
            raise SettingsError(f"FOLD={fold} and JOB_COMPLETION_INDEX={index} differ; set only one of them")
        values = {n: v for n, v in values.items() if n.lower() != "fold"} | {"FOLD": index}
    return Layer("environment", values)


def load(layers: Sequence[Layer]) -> Settings:
    """The settings that `layers` (strongest first) and the recipe that they name give.

    Raises SettingsError for an unknown key (with the nearest known one), a wrong type or an
    impossible value, naming the source.
    """
    flat: dict[str, Any] = {}
    for layer in reversed(layers):
        for name, value in layer.values.items():
            key = normal_key(name)
            _check_known(key, layer.source, name)
            flat[key] = _decode(key, value)
    tree = read_recipe(flat["recipe"]) if flat.get("recipe") else {}
    for key, value in flat.items():
        _put(tree, key, value)
    if not tree.get("system") and tree.get("recipe"):
        tree["system"] = Path(tree["recipe"]).stem
    return _validated(tree)


def normal_key(name: str) -> str:
    """`TRAIN__EPOCHS` or `Train.epochs` as `train.epochs`."""
    return name.lower().replace("__", ".")


def read_recipe(name: str) -> dict[str, Any]:
    """The tree of a shipped recipe, or of the TOML or JSON file at a path."""
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        path = choose(shipped_recipes(), "recipe", name)
    if not path.is_file():
        raise MissingInputError(
            f"recipe {name!r} does not exist; give a file or one of: {', '.join(shipped_recipes())}"
        )
    text = path.read_text(encoding="utf-8")
    try:
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise SettingsError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"recipe {path} holds {type(tree).__name__}, not a table of sections")
    _validated(tree, source=f"recipe {path}")
    return tree


def flatten(settings: BaseModel, prefix: str = "") -> dict[str, Any]:
    """`{"train.epochs": 3, …}` of all settings."""
    flat: dict[str, Any] = {}
    for name, value in settings:
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def key_settings(settings: Settings, sections: Sequence[str]) -> dict[str, Any]:
    """The settings of `sections` that can change a result, flat: what a stage's key is made of."""
    return {
        key: value
        for key, value in flatten(settings).items()
        if key.split(".")[0] in sections and key not in EXECUTION_KEYS
    }


def describe(sections: Sequence[str]) -> str:
    """Every key of `sections` with type, default and meaning, a line each, for `--help`."""
    lines = []
    for name in sections:
        field = Settings.model_fields[name]
        if name not in SECTIONS:
            lines.append(_line(name, field))
            continue
        lines += [_line(f"{name}.{key}", sub) for key, sub in type(field.default).model_fields.items()]
    return "\n".join(lines)


def _line(key: str, field: Any) -> str:
    kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    kind = kind.replace("typing.", "")
    return f"  {key:24} {kind:22} {json.dumps(field.default):24} {field.description}"


def _known_keys() -> set[str]:
    return set(flatten(Settings()))


def _check_known(key: str, source: str, name: str) -> None:
    known = _known_keys()
    parts = key.split(".")
    in_table = len(parts) > 2 and ".".join(parts[:2]) in ("distill.model", "distill.train", "model.options")
    if key not in known and not in_table:
        raise SettingsError(f"unknown key {name!r} in {source}{did_you_mean(key, known)}; --help lists the keys")


def _decode(key: str, value: Any) -> Any:
    """Text as JSON where the key wants more than text and it parses; `True`, `False` and `None` as Python's."""
    if not isinstance(value, str) or isinstance(_get(Settings(), key), str):
        return value
    text = {"True": "true", "False": "false", "None": "null"}.get(value.strip(), value)
    try:
        return json.loads(text)
    except ValueError:
        return value


def _get(settings: BaseModel, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def _validated(tree: Mapping[str, Any], source: str = "settings") -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_problem(problem) for problem in error.errors())
        raise SettingsError(f"{source}: {problems}") from error


def _problem(problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{did_you_mean(key, _known_keys())}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key} = {problem['input']!r}: {message}" if key else message
