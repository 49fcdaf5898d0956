"""Shipped recipes, one TOML file a system; and how the file of any recipe is read, with its variants.

A variant is a table `[variants.NAME]` of the recipe: the keys that it has otherwise, section by section.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fivefold.choose import choose
from fivefold.errors import MissingInputError, SettingsError
from fivefold.recipe import SECTIONS

SMOKE = "smoke"
"""The variant that changes sizes and counts only, so that a whole system runs in a minute."""


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def read(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tree of a shipped recipe, or of the TOML or JSON file at a path; `name:a,b` with its variants `a` and `b`.

    One tree, given again after each variant is laid over it, with words for where it stands.
    """
    file, variants = _parts(name)
    path = _recipe_path(file)
    tree = _tree(path)
    there = tree.pop("variants", {})
    if not isinstance(there, dict) or not all(isinstance(variant, dict) for variant in there.values()):
        raise SettingsError(f"recipe {path}: variants are tables, each of sections: [variants.small.train]")
    yield f"recipe {path}: ", tree
    for variant in variants:
        _lay_over(tree, choose(there, f"variant of {path.stem}", variant))
        yield f"recipe {path}, variant {variant}: ", tree


def system_of(recipe: str) -> str:
    """The name that models get by default: the recipe's, with its variants but for `smoke`, which is the same made small."""
    file, variants = _parts(recipe)
    return "_".join([Path(file).stem, *(variant for variant in variants if variant != SMOKE)])


def _parts(name: str) -> tuple[str, list[str]]:
    """The recipe's own name, and the names of the variants behind its last colon."""
    file, colon, variants = name.rpartition(":")
    if not colon or Path(name).is_file():
        return name, []
    return file, [variant.strip() for variant in variants.split(",") if variant.strip()]


def _recipe_path(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise SettingsError(f"recipe {name}: recipes are TOML or JSON, since YAML reads 5e-5 as a text")
    if path.suffix.lower() not in (".toml", ".json"):
        path = choose(shipped_recipes(), "recipe", name)
    if not path.is_file():
        raise MissingInputError(
            f"recipe {name!r} does not exist; give a file or one of: {', '.join(shipped_recipes())}"
        )
    return path


def _tree(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"recipe {path} holds {type(tree).__name__}, not a table of sections")
    if "recipe" in tree:
        raise SettingsError(f"recipe {path} names another recipe, but a recipe states everything itself")
    return tree


def _lay_over(tree: dict[str, Any], variant: Mapping[str, Any]) -> None:
    """Puts the variant's values into the tree: the keys of its sections, and of [distill.model] and [distill.train]."""
    for name, value in variant.items():
        below = tree.get(name)
        if isinstance(value, dict) and isinstance(below, dict) and name in SECTIONS:
            _lay_over(below, value)
        else:
            tree[name] = value
