"""The one look-up by name: names become things through a dict literal, and a miss is explained."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from fivefold.errors import SettingsError

T = TypeVar("T")


def choose(table: Mapping[str, T], kind: str, name: str) -> T:
    """The entry of `table` called `name`; otherwise a SettingsError that lists what there is."""
    if name in table:
        return table[name]
    known = ", ".join(sorted(table))
    raise SettingsError(f"unknown {kind} {name!r}{did_you_mean(name, table)}; known: {known}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or nothing when none is near."""
    spelled = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.6)
    return f"; did you mean {spelled[near[0]]!r}?" if near else ""
