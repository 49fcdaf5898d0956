"""Look up registry entries and optional packages by name; an unknown name gets the nearest one suggested."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, TypeVar

from fivefold.errors import SettingsError

T = TypeVar("T")


def choose(table: Mapping[str, T], kind: str, name: str) -> T:
    """Return the entry of `table` called `name`; raise a SettingsError that lists the known names if there is none."""
    if name in table:
        return table[name]
    known = ", ".join(sorted(table))
    raise SettingsError(f"unknown {kind} {name!r}{did_you_mean(name, table)}; known: {known}")


def parse_spec(spec: str | Mapping[str, Any], table: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Return name and parameters of a spec: a name in `table`, or a table with `name` and parameters. Raise as `choose` does."""
    parameters = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(parameters.pop("name", ""))
    choose(table, kind, name)
    return name, parameters


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or an empty text if none is near."""
    spelled = {other.lower(): other for other in known}
    matches = get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.6)
    return f"; did you mean {spelled[matches[0]]!r}?" if matches else ""


def require_packages(packages: Sequence[str], extra: str, setting: str) -> None:
    """Raise a SettingsError unless all `packages` can be imported. The setting `setting` needs them; the extra `extra` installs them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"{setting} needs {' and '.join(missing)}, not installed here: pip install 'fivefold[{extra}]' "
            f"(from the repository: pip install '.[{extra}]')"
        )
