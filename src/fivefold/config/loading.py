"""Load settings from a recipe and layers over it, and explain unknown keys and invalid values.

Precedence, highest first: KEY=VALUE arguments, environment, hyperparameters, recipe, default. All but recipes are text, or
JSON that a platform made of text. Unambiguous text is accepted (`no` as false, `plain,flip` as a list).
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from fivefold.config.recipes import default_system, parse_recipe
from fivefold.config.schema import EXECUTION_KEYS, PER_STAGE_KEYS, RUN_STAGES, SECTIONS, Settings
from fivefold.contract.job import hyperparameters_from_env
from fivefold.distributed.ranks import index_means_host
from fivefold.errors import SettingsError
from fivefold.lookup import did_you_mean

ENVIRONMENT_KEYS = {"fold", "stage", "recipe", "run", "runs", "seed"}
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
SECRET = re.compile(r"sagemaker\.(stages(\.[^.]+)?|(stages\.[^.]+\.)?environment(\..*)?)")
"""Keys with environment variables; messages and logs never contain their values."""

NONE_TEXTS = ("", "none", "null")
PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}
TYPE_NAMES: dict[Any, tuple[str, str]] = {
    str: ("text", "texts"),
    bool: ("true or false", "truths"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    dict: ("a table", "tables"),
    Any: ("a value", "values"),
}


@dataclass(frozen=True)
class Layer:
    """One source of settings: its name for messages, and its values by normal key."""

    source: str
    values: Mapping[str, Any]


def arguments_layer(arguments: Sequence[str]) -> Layer:
    """Return the layer of `KEY=VALUE` arguments; the last value of a key counts. Raise a SettingsError for anything else."""
    values = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise SettingsError(f"argument {argument!r} is not KEY=VALUE; see --help for the keys")
        values[normalize_key(name)] = value
    return Layer("argument", values)


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """Return the layer of FOLD, STAGE, RECIPE, RUN, RUNS, SEED and SECTION__KEY; an empty variable counts as not set."""
    values = {}
    for name, value in environ.items():
        section, _, key = name.lower().partition("__")
        if value and ((key and section in SECTIONS) or name.lower() in ENVIRONMENT_KEYS):
            values[normalize_key(name)] = value
    return Layer("environment", values)


def job_index_layer(environ: Mapping[str, str]) -> Layer:
    """Return the layer of JOB_COMPLETION_INDEX of a Kubernetes Indexed Job: the fold, if no other layer sets it."""
    index = environ.get(INDEX_VARIABLE)
    return Layer(INDEX_VARIABLE, {"fold": index} if index else {})


def collect_layers(arguments: Sequence[str], environ: Mapping[str, str]) -> list[Layer]:
    """Return the layers of this process, highest precedence first; the recipe and the defaults come after them."""
    platform = {normalize_key(name): value for name, value in hyperparameters_from_env(environ).items()}
    return [
        arguments_layer(arguments),
        environment_layer(environ),
        Layer("hyperparameters", platform),
        job_index_layer({} if index_means_host(environ) else environ),
    ]


def load(layers: Sequence[Layer]) -> Settings:
    """Return the settings of `layers` (highest precedence first) over the recipe that they name.

    Raise a SettingsError that names the source for an unknown key, a wrong type or an invalid value.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in reversed(layers):
        for key, value in layer.values.items():
            values.pop(key, None)  # so that it goes last: a table must not overwrite a stronger key inside it
            values[key] = _convert(key, value, layer.source)
            sources[key] = layer.source
    index = next((layer.values["fold"] for layer in layers if layer.source == INDEX_VARIABLE and layer.values), "none")
    if parse_value(int | None, index) not in (None, values.get("fold")):
        raise SettingsError(f"FOLD={values['fold']} and {INDEX_VARIABLE}={index} differ; set only one of them")
    tree = read_recipe(values["recipe"]) if values.get("recipe") else {}
    for key, value in values.items():
        _set_key(tree, key, value)
    if not tree.get("system"):
        tree["system"] = default_system(tree.get("recipe") or "default")
    return validate(tree, sources)


def normalize_key(name: str) -> str:
    """Return `train.epochs` for `TRAIN__EPOCHS`, `--train.epochs` or `Train.epochs`; `-` becomes `_`, `config` `recipe`."""
    key = name.strip().lower().lstrip("-").replace("-", "_").replace("__", ".")
    return "recipe" if key == "config" else key


def unused_keys(layer: Layer, sections: Sequence[str]) -> list[str]:
    """Return the keys of `layer` that a stage with these `sections` does not read."""
    read = ("recipe", "run", "runs", "stage", "on_version_change", *sections)
    return [key for key in layer.values if not in_sections(key, read)]


def in_sections(key: str, sections: Sequence[str]) -> bool:
    """Return whether `key` is in `sections`, an item of which can be a single key such as `data.resize_shorter_side`."""
    return key in sections or key.split(".")[0] in sections


def read_recipe(name: str) -> dict[str, Any]:
    """Return the tree of a shipped recipe or a recipe file, with its variants: `name:a,b`; see `recipes.parse_recipe`."""
    tree = parse_recipe(name)
    validate(tree, {}, f"recipe {name}: ")
    return tree


def validate(tree: Mapping[str, Any], sources: Mapping[str, str], where: str = "") -> Settings:
    """Return the settings of a typed tree; raise a SettingsError for invalid values, with the `sources` of their keys."""
    try:
        settings = Settings.model_validate(tree)
        settings.student()
        return settings
    except ValidationError as error:
        # The student's sections are validated as separate models; their keys are in [distill].
        prefix = () if error.title == "Settings" else ("distill", error.title.lower())
        problems = {_describe_error(problem, prefix, sources): None for problem in error.errors()}
        raise SettingsError(where + "; ".join(problems)) from None


def flatten(settings: Settings) -> dict[str, Any]:
    """Return all settings as a flat dict: `{"train.epochs": 3, …}`."""
    flat: dict[str, Any] = {}
    for name, value in settings:
        flat |= {f"{name}.{key}": item for key, item in value} if isinstance(value, BaseModel) else {name: value}
    return flat


def hashed_settings(settings: Settings, sections: Sequence[str]) -> dict[str, Any]:
    """Return the settings of `sections` that can change a result, flat. A stage's key is a digest of them.

    Of `[predict]` only keys that were set count: for the others, each model uses the values of its own recipe.
    """
    fields = type(settings.predict).model_fields.keys()
    left_out = EXECUTION_KEYS | {f"predict.{name}" for name in fields - settings.predict.model_fields_set}
    return {
        key: value for key, value in flatten(settings).items() if in_sections(key, sections) and key not in left_out
    }


def describe_keys(sections: Sequence[str]) -> str:
    """Return the `--help` text: one line per key of `sections`, with type, description and default."""
    return "\n".join(
        f"  {key:24} {type_name(field.annotation):26} {field.description} (default: {json.dumps(field.default, ensure_ascii=False)})"
        for key, field in FIELDS.items()
        if in_sections(key, sections)
    )


def reference() -> str:
    """Return docs/settings.md: every key with type, default and meaning, a table per section."""
    text = (
        "# Settings\n\nEvery key with its type, default and meaning. `make docs` generates this page from "
        "`src/fivefold/config/schema.py`. Keys are written as\n`section.key` on the command line, as `SECTION__KEY` "
        "in the environment, and below `[section]` in a recipe: [docs/training.md](training.md).\n"
    )
    for section in ("", *(name for name in Settings.model_fields if name in SECTIONS)):
        text += f"\n## {f'[{section}]' if section else 'Top level'}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        for key, field in FIELDS.items():
            name, _, short = key.rpartition(".")
            if name == section:
                default = json.dumps(field.default, ensure_ascii=False)
                cells = [f"`{short}`", type_name(field.annotation), f"`{default}`", field.description or ""]
                text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def parse_value(kind: Any, value: Any) -> Any:
    """Return `value` as a value of the type `kind`. Raise a ValueError that names the needed type."""
    if kind is Any:  # a parameter of a backbone
        return _parse(value, default=value) if isinstance(value, str) else value
    for reading in _readings(value):
        with suppress(ValidationError):
            return _adapter(kind).validate_python(reading)
    raise ValueError(f"{type_name(kind)} is needed")


def type_name(kind: Any, many: bool = False) -> str:
    """Return a description of the type `kind`: `a whole number`, `a list of numbers`."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    ordered = sorted(members, key=lambda member: member is str)
    return " or ".join(_describe_member(member, many) for member in ordered if member is not NoneType)


def _readings(value: Any) -> Iterator[Any]:
    """Yield the possible readings of `value`, likeliest first: list or table, None, text, number, values between commas."""
    text = json.dumps(value) if isinstance(value, bool | int | float) else value
    if not isinstance(text, str):
        yield value
        return
    parsed = _parse(text)
    if isinstance(parsed, str) and text.startswith('"'):  # some launchers encode every hyperparameter as JSON
        text = parsed
    if isinstance(parsed, list | dict):
        yield parsed
        yield [parsed]
    if text.strip().lower() in NONE_TEXTS:
        yield None
    yield text
    yield text.strip()
    if isinstance(parsed, float) and parsed.is_integer():
        yield int(parsed)
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    pieces = [piece.strip() for piece in inner.split(",")] if inner else []
    if not any(not piece or set(piece) & set("{}[]") for piece in pieces):
        yield [_parse(piece, piece) if piece.startswith('"') else piece for piece in pieces]


def _parse(text: str, default: Any = None) -> Any:
    """Parse `text` as JSON, as the right-hand side of a TOML line, or as a Python constant; else return `default`."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    with suppress(ValueError, RecursionError):
        return tomllib.loads(f"value = {text}")["value"]
    return PYTHON_CONSTANTS.get(text.strip(), default)


@lru_cache(maxsize=256)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True))


def _describe_member(kind: Any, many: bool) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return "one of " + ", ".join(get_args(kind))
    if origin is list:
        return ("lists" if many else "a list") + f" of {type_name(get_args(kind)[0], many=True)}"
    return TYPE_NAMES[origin][many]


def _convert(key: str, value: Any, source: str) -> Any:
    """Convert `value` to the type of `key`. Raise a SettingsError for an unknown key or a wrong type."""
    parent, _, option = key.partition(".backbone_kwargs.")
    kind = Any if option and f"{parent}.backbone_kwargs" in KEY_TYPES else KEY_TYPES.get(key)
    if kind is None:
        raise SettingsError(f"unknown key {key!r} in {source}{_hint(key)}; --help lists the keys")
    try:
        return parse_value(kind, value)
    except ValueError as error:
        raise SettingsError(f"{key}={_redact(key, value)} ({source}): {error}") from None


def _redact(key: str, value: Any) -> str:
    """Return the text of a setting's value for a message, or `***` if the value may be secret."""
    return "***" if SECRET.fullmatch(key) else repr(value)


def _hint(key: str) -> str:
    """Return a hint for an unknown `key`: the same name in a section, or the key with the nearest spelling."""
    if key in SECTIONS:
        return f"; it is a section: write {key}.NAME=VALUE or {key}__NAME=VALUE"
    same = [known for known in KEY_TYPES if known.endswith(f".{key}") and known.count(".") == 1]
    return f"; did you mean {' or '.join(map(repr, same))}?" if same else did_you_mean(key, [*KEY_TYPES, *SECTIONS])


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = tree.get(section)
        tree[section] = dict(table) if isinstance(table, dict) else {}  # a copy: layers are used again
        tree = tree[section]
    tree[last] = value


def _describe_error(problem: Mapping[str, Any], prefix: Sequence[str], sources: Mapping[str, str]) -> str:
    """Return a pydantic error in plain words: `train.epochs=0 (argument): at least 1 is needed`."""
    parts = [*prefix, *problem["loc"]]
    path = ".".join(map(str, parts))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path!r}{_hint(path)}"
    key = next((name for n in (3, 2, 1) if (name := ".".join(map(str, parts[:n]))) in KEY_TYPES), "")
    if problem["type"] == "value_error":
        return f"{path}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    text = BOUND_MESSAGES.get(problem["type"], "{type} is needed")
    requirement = text.format(type=type_name(KEY_TYPES[key]) if key else "a table of keys", **problem.get("ctx", {}))
    source = f" ({sources[key]})" if key in sources else ""
    return f"{key or path}={_redact(key or path, problem['input'])}{source}: {requirement}"


BOUND_MESSAGES = {
    "greater_than_equal": "at least {ge:.10g} is needed",
    "greater_than": "more than {gt:.10g} is needed",
    "less_than_equal": "at most {le:.10g} is needed",
    "less_than": "less than {lt:.10g} is needed",
    "literal_error": "{expected} is needed",
    "finite_number": "a finite number is needed",
}
FIELDS: dict[str, FieldInfo] = {}
"""The field of every key (`train.epochs`), in the order of the schema."""
for _name, _field in Settings.model_fields.items():
    _fields = type(_field.default).model_fields if _name in SECTIONS else {}
    FIELDS |= {f"{_name}.{key}": field for key, field in _fields.items()} or {_name: _field}
KEY_TYPES = {key: field.annotation for key, field in FIELDS.items()}
"""The type of every key, including the student's overrides and the overrides per stage."""
KEY_TYPES |= {f"distill.{key}": kind for key, kind in KEY_TYPES.items() if key.startswith(("model.", "train."))}
KEY_TYPES |= {
    f"sagemaker.stages.{stage}.{key}": KEY_TYPES[f"sagemaker.{key}"] for stage in RUN_STAGES for key in PER_STAGE_KEYS
}


if __name__ == "__main__":
    print(reference(), end="")
