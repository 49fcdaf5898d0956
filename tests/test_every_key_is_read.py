"""A key that nothing reads would be a promise that nobody keeps: every key of recipe.py is read somewhere."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from fivefold.recipe import SECTIONS, Settings

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "src" / "fivefold" / "recipe.py"
SOURCES = {path: ast.parse(path.read_text("utf-8")) for root in ("src", "jobs") for path in (REPOSITORY / root).rglob("*.py")}  # fmt: skip
CLASSES = {type(Settings.model_fields[name].default).__name__: name for name in SECTIONS}
WHOLE = ("settings", "student")
"""What the settings are called where a key outside the sections is read."""
BEFORE = {"recipe", "stage"}
"""What is read before there are settings."""


def keys_read(trees: Iterable[ast.AST]) -> set[str]:
    """`train.epochs` for each read of `<anything>.train.epochs`, or of `.epochs` of a name that stands for the section."""
    return {key for tree in trees for scope in scopes(tree) for key in reads(scope, stand_ins(scope))}


def scopes(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def stand_ins(function: ast.FunctionDef) -> dict[str, str]:
    """The names that stand for a section in `function`: `split = settings.split`, or a parameter `model: Model`."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    found = {a.arg: CLASSES[a.annotation.id] for a in arguments if getattr(a.annotation, "id", "") in CLASSES}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs = zip(parts(node.targets[0]), parts(node.value), strict=False)
            found |= {to.id: section for to, one in pairs if isinstance(to, ast.Name) and (section := section_of(one))}
    return found


def parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def section_of(node: ast.AST) -> str | None:
    """The section that `settings.train` (or a copy of it, `settings.train.model_copy(…)`) is."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "model_copy":
        return section_of(node.func.value)
    return node.attr if isinstance(node, ast.Attribute) and node.attr in SECTIONS else None


def reads(function: ast.FunctionDef, named: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "explicit.get":
            yield f"predict.{ast.literal_eval(node.args[0])}"  # the keys of [predict] that were given, as a table
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        owner = node.value
        section = named.get(owner.id) if isinstance(owner, ast.Name) else section_of(owner)
        if section:
            yield f"{section}.{node.attr}"
        elif getattr(owner, "id", getattr(owner, "attr", "")) in WHOLE:
            yield node.attr


def properties() -> dict[str, set[str]]:
    """`{"model.size": {"model.image_size"}}`: the keys that a property of a section is made of."""
    owners = [node for node in SOURCES[RECIPE].body if isinstance(node, ast.ClassDef) and node.name in CLASSES]
    return {
        f"{CLASSES[owner.name]}.{method.name}": set(reads(method, {"self": CLASSES[owner.name]}))
        for owner in owners
        for method in scopes(owner)
        if "property" in [getattr(name, "id", "") for name in method.decorator_list]
    }


def every_key() -> set[str]:
    keys = {f"{name}.{key}" for name in SECTIONS for key in type(Settings.model_fields[name].default).model_fields}
    return keys | (set(Settings.model_fields) - SECTIONS)


def all_read(without: str = "") -> set[str]:
    found = keys_read(tree for path, tree in SOURCES.items() if path != RECIPE and path.name != (without or None))
    students = keys_read([next(node for node in ast.walk(SOURCES[RECIPE]) if getattr(node, "name", "") == "student")])
    return found | students | {key for name, keys in properties().items() if name in found for key in keys}


def test_defect_product_every_key_is_read_by_some_code():
    assert every_key() - all_read() - BEFORE == set()


@pytest.mark.parametrize(
    ("source", "key"),
    [("assemble.py", "train.clip"), ("splitting.py", "split.stratify"), ("ensemble.py", "ensemble.submissions")],
)
def test_a_key_whose_reader_is_gone_is_missed(source: str, key: str):
    assert key in all_read()
    assert key in every_key() - all_read(without=source)
