"""Look up a registry entry by name, and suggest the nearest name if there is none."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from fivefold.errors import SettingsError

T = TypeVar("T")


def choose(table: Mapping[str, T], kind: str, name: str) -> T:
    """Return the entry of `table` called `name`; raise a SettingsError that lists the known names if there is none."""
    if name in table:
        return table[name]
    known = ", ".join(sorted(table))
    raise SettingsError(f"unknown {kind} {name!r}{did_you_mean(name, table)}; known: {known}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or an empty text if none is near."""
    spelled = {other.lower(): other for other in known}
    matches = get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.6)
    return f"; did you mean {spelled[matches[0]]!r}?" if matches else ""
