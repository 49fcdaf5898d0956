"""Parsing of setting values from text, and the messages for invalid ones."""

from typing import Any

import pytest

from fivefold.config.parsing import parse_value

SPEC = str | dict[str, Any]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, " 3 ", 3),
        (int, "3.0", 3),
        (int, "007", 7),
        (int, "1_000", 1000),
        (float, "5e-5", 5e-5),
        (bool, "True", True),
        (bool, "No", False),
        (str, "5", "5"),
        (str, '"demo"', "demo"),
        (str, '"a" and "b"', '"a" and "b"'),
        (str, 5, "5"),
        (Any, '"3"', "3"),
        (int | None, "none", None),
        (list[str], "plain, flip", ["plain", "flip"]),
        (list[str], '["plain", "flip"]', ["plain", "flip"]),
        (list[str], "['plain', 'flip']", ["plain", "flip"]),
        (list[str], "[plain,flip]", ["plain", "flip"]),
        (list[str], '"plain","flip"', ["plain", "flip"]),
        (list[str], "", []),
        (list[float], "[.8,.1,.1]", [0.8, 0.1, 0.1]),
        (int | list[int], "224,192", [224, 192]),
        (list[SPEC], '["flip", {"name": "rotation", "degrees": 15}]', ["flip", {"name": "rotation", "degrees": 15}]),
        (list[SPEC], '["flip", { name = "rotation", degrees = 15 }]', ["flip", {"name": "rotation", "degrees": 15}]),
        (list[SPEC], '{ name = "rotation", degrees = 15 }', [{"name": "rotation", "degrees": 15}]),
        (dict[str, Any], "{ depth = 3 }", {"depth": 3}),
        (Any, "3", 3),
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
        (int, True, "a whole number"),
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
