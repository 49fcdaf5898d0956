"""Text as the value that a key wants: `3` as a number, `no` as false, `plain,flip` as a list.

Arguments, environment variables and hyperparameters are text, or JSON that a platform made of
text; recipes are typed already. What a user can only mean one way is accepted, the rest refused.
"""

import json
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

NOTHINGS = ("", "none", "null")
PYTHON = {"True": True, "False": False, "None": None}
WORDS: dict[Any, tuple[str, str]] = {
    str: ("text", "texts"),
    bool: ("true or false", "truths"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    dict: ("a table", "tables"),
    Any: ("a value", "values"),
}


def value_of(kind: Any, given: Any) -> Any:
    """`given` as a value of the type `kind`; a ValueError says in plain words what is needed."""
    if kind is Any:  # a parameter of a backbone
        return _parse(given, otherwise=given) if isinstance(given, str) else given
    for reading in _readings(given):
        with suppress(ValidationError):
            return _adapter(kind).validate_python(reading)
    raise ValueError(f"{words(kind)} is needed")


def words(kind: Any, many: bool = False) -> str:
    """The type `kind` in plain words: `a whole number`, `a list of numbers`."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    named = [_words(member, many) for member in sorted(members, key=lambda member: member is str)]
    return " or ".join(name for name in named if name)


def _readings(given: Any) -> Iterator[Any]:
    """What `given` may mean, the likeliest first: a list or a table, nothing, text, a number, values between commas."""
    text = json.dumps(given) if isinstance(given, bool | int | float) else given
    if not isinstance(text, str):
        yield given
        return
    parsed = _parse(text)
    if isinstance(parsed, str) and text.startswith('"'):
        # Some launchers encode every hyperparameter as JSON, texts too.
        text = parsed
    if isinstance(parsed, list | dict):
        yield parsed
        yield [parsed]
    if text.strip().lower() in NOTHINGS:
        yield None
    yield text
    yield text.strip()
    if isinstance(parsed, float) and parsed.is_integer():
        yield int(parsed)
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    pieces = [piece.strip() for piece in inner.split(",")] if inner else []
    if not any(not piece or set(piece) & set("{}[]") for piece in pieces):
        yield [_parse(piece, piece) if piece.startswith('"') else piece for piece in pieces]


def _parse(text: str, otherwise: Any = None) -> Any:
    """`text` as JSON, as the right-hand side of a TOML line, or as a constant of Python's."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    with suppress(ValueError, RecursionError):
        return tomllib.loads(f"value = {text}")["value"]
    return PYTHON.get(text.strip(), otherwise)


@lru_cache(maxsize=256)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True))


def _words(kind: Any, many: bool) -> str:
    if kind is NoneType:
        return ""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return "one of " + ", ".join(get_args(kind))
    if origin is list:
        return ("lists" if many else "a list") + f" of {words(get_args(kind)[0], many=True)}"
    return WORDS[origin][many]
