"""Shipped recipes, one TOML file each, and the reader of recipe files with variants.

A variant is a table `[variants.NAME]` of the recipe that overrides keys, section by section.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold.config.schema import SECTIONS
from fivefold.errors import MissingInputError, SettingsError
from fivefold.lookup import choose

SMOKE = "smoke"
"""The variant that changes only sizes and counts, so that all stages run in a minute."""


def shipped_recipes() -> dict[str, Path]:
    """Return the paths of the shipped recipes by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def parse_recipe(name: str) -> dict[str, Any]:
    """Return the tree of a shipped recipe, or of the TOML or JSON file at a path; `name:a,b` adds its variants `a` and `b`."""
    file, variants = _split_name(name)
    path = Path(file)
    if path.suffix.lower() not in (".toml", ".json"):
        path = choose(shipped_recipes(), "recipe", file)
    tree = _load_tree(path)
    tables = tree.pop("variants", {})
    for variant in variants:
        _apply_variant(tree, choose(tables, f"variant of {path.stem}", variant))
    return tree


def default_system(recipe: str) -> str:
    """Return the default system name: the recipe's name and its variants, without `smoke`, which changes only sizes."""
    file, variants = _split_name(recipe)
    return "_".join([Path(file).stem, *(variant for variant in variants if variant != SMOKE)])


def _split_name(name: str) -> tuple[str, list[str]]:
    """Return the recipe's name or path, and the names of the variants after the last colon."""
    file, colon, variants = name.rpartition(":")
    if not colon or Path(name).is_file():
        return name, []
    return file, [variant.strip() for variant in variants.split(",") if variant.strip()]


def _load_tree(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError:
        known = ", ".join(shipped_recipes())
        raise MissingInputError(f"recipe {str(path)!r} does not exist; give a file or one of: {known}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"recipe {path} cannot be read: {error}") from error
    variants = tree.get("variants", {}) if isinstance(tree, dict) else None
    if not isinstance(variants, dict) or not all(isinstance(variant, dict) for variant in variants.values()):
        raise SettingsError(f"recipe {path} is not a table of sections, and of variants such as [variants.small.train]")
    if "recipe" in tree:
        raise SettingsError(f"recipe {path} names another recipe, but recipes cannot build on others")
    return tree


def _apply_variant(tree: dict[str, Any], variant: Mapping[str, Any]) -> None:
    """Apply the variant's values to the tree: keys of its sections, and of [distill.model] and [distill.train]."""
    for name, value in variant.items():
        section = tree.get(name)
        if isinstance(value, dict) and isinstance(section, dict) and name in SECTIONS:
            _apply_variant(section, value)
        else:
            tree[name] = value
