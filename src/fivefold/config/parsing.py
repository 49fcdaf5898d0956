"""Parse text as the type of a setting: `3` as a number, `no` as false, `plain,flip` as a list.

Arguments, environment variables and hyperparameters are text, or JSON that a platform made of text; recipes are
typed already. Unambiguous text is accepted; anything else is an error.
"""

import json
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

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
    named = [_describe_member(member, many) for member in sorted(members, key=lambda member: member is str)]
    return " or ".join(name for name in named if name)


def _readings(value: Any) -> Iterator[Any]:
    """Yield the possible readings of `value`, likeliest first: list or table, None, text, number, values between commas."""
    text = json.dumps(value) if isinstance(value, bool | int | float) else value
    if not isinstance(text, str):
        yield value
        return
    parsed = _parse(text)
    if isinstance(parsed, str) and text.startswith('"'):
        # Some launchers encode every hyperparameter as JSON, including text.
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
    if kind is NoneType:
        return ""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return "one of " + ", ".join(get_args(kind))
    if origin is list:
        return ("lists" if many else "a list") + f" of {type_name(get_args(kind)[0], many=True)}"
    return TYPE_NAMES[origin][many]
