"""Text as the value that a key wants: `3` as a number, `no` as false, `plain,flip` as a list.

Arguments, environment variables and hyperparameters are text, or JSON that a platform made of
text; recipes are typed already. What a user can only mean one way is accepted, the rest refused.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHINGS = ("", "none", "null")


def value_of(kind: Any, given: Any) -> Any:
    """`given` as a value of the type `kind`; a ValueError says in plain words what is needed."""
    if isinstance(given, str) and given.startswith('"') and kind is not Any:
        # Some launchers encode every hyperparameter as JSON, texts too.
        inner = _json(given)
        given = inner if isinstance(inner, str) else given
    for option in _options(kind):
        try:
            return READERS[get_origin(option) or option](option, given)
        except ValueError:
            continue
    raise ValueError(f"{words(kind)} is needed")


def words(kind: Any, many: bool = False) -> str:
    """The type `kind` in plain words: `a whole number`, `a list of numbers`."""
    named = [_words(option, many) for option in _options(kind) if option is not NoneType]
    return " or ".join(named)


def json_document(text: str) -> Any:
    """The value of a JSON document, which names no key twice; a ValueError says in plain words in which line it breaks.

    Stricter than `json.loads`: NaN and Infinity are no JSON, and of a key given twice one would be read by nobody.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_why_no_json(error)}: line {error.lineno} column {error.colno}") from None


def _why_no_json(error: json.JSONDecodeError) -> str:
    before, here = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if here.startswith(("//", "/*", "#")):
        return "JSON has no comments; a TOML recipe may have them"
    if before.endswith(",") and here.startswith(("}", "]")):
        return "a comma before a closing bracket; JSON allows none there"
    if here.startswith("'"):
        return "JSON's quotes are double"
    return error.msg


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} stands twice in one table")
        seen.add(key)
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; a finite number is needed")


def _words(kind: Any, many: bool) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return "one of " + ", ".join(get_args(kind))
    if origin is list:
        return ("lists" if many else "a list") + f" of {words(get_args(kind)[0], many=True)}"
    return WORDS[origin][many]


def _options(kind: Any) -> list[Any]:
    """The members of a union, text last, since text takes everything; or `kind` alone."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return sorted(members, key=lambda member: member is str)


def _text(_: Any, given: Any) -> str:
    """Text as it stands; a number that a platform decoded, as text again."""
    if isinstance(given, str):
        return given
    if isinstance(given, bool | int | float):
        return json.dumps(given)
    raise ValueError


def _truth(_: Any, given: Any) -> bool:
    if isinstance(given, bool):
        return given
    name = given.strip().lower() if isinstance(given, str) else json.dumps(given)
    if name not in TRUTHS:
        raise ValueError
    return TRUTHS[name]


def _whole(_: Any, given: Any) -> int:
    """`3`, `03`, `3.0` and `3e0` are three."""
    if isinstance(given, str) and WHOLE.fullmatch(given.strip()):
        return int(given)
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    number = _number(float, given)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _number(_: Any, given: Any) -> float:
    readable = NUMBER.fullmatch(given.strip()) if isinstance(given, str) else isinstance(given, int | float)
    if not readable or isinstance(given, bool) or not math.isfinite(float(given)):
        raise ValueError
    return float(given)


def _nothing(_: Any, given: Any) -> None:
    if given is not None and str(given).strip().lower() not in NOTHINGS:
        raise ValueError


def _list(kind: Any, given: Any) -> list[Any]:
    """A list, as JSON or TOML, or its values between commas (a shell takes the quotes off `["plain","flip"]`)."""
    if isinstance(given, str):
        parsed = _parsed(given)
        given = parsed if isinstance(parsed, list) else [parsed] if isinstance(parsed, dict) else _pieces(given)
    if not isinstance(given, list):
        raise ValueError
    (item,) = get_args(kind)
    return [value_of(item, value) for value in given]


def _table(_: Any, given: Any) -> dict[str, Any]:
    value = _parsed(given) if isinstance(given, str) else given
    if not isinstance(value, dict):
        raise ValueError
    return value


def _anything(_: Any, given: Any) -> Any:
    """A parameter of a backbone: JSON or TOML where it parses, Python's True, False and None, else text."""
    if not isinstance(given, str):
        return given
    python = {"True": True, "False": False, "None": None}
    return python[given.strip()] if given.strip() in python else _parsed(given, otherwise=given)


def _pieces(text: str) -> list[str]:
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    pieces = [piece.strip() for piece in inner.split(",")] if inner else []
    if any(not piece or set(piece) & set("{}[]") for piece in pieces):
        raise ValueError
    return pieces


def _parsed(text: str, otherwise: Any = None) -> Any:
    """`text` as JSON, or as the right-hand side of a TOML line."""
    value = _json(text, _MISSING)
    if value is not _MISSING:
        return value
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return otherwise


def _json(text: str, otherwise: Any = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


_MISSING = object()
WORDS: dict[Any, tuple[str, str]] = {
    str: ("text", "texts"),
    bool: ("true or false", "truths"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    dict: ("a table", "tables"),
    Any: ("a value", "values"),
}

READERS: dict[Any, Callable[[Any, Any], Any]] = {
    str: _text,
    Literal: _text,
    bool: _truth,
    int: _whole,
    float: _number,
    NoneType: _nothing,
    list: _list,
    dict: _table,
    Any: _anything,
}
