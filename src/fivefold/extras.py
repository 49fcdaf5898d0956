"""Packages that only some runs need: asked for by name, and missed with a word on how to get them."""

from collections.abc import Sequence
from importlib.util import find_spec

from fivefold.errors import SettingsError


def need(packages: Sequence[str], extra: str, wanted: str) -> None:
    """Raises a SettingsError unless all `packages` can be imported; `wanted` is the setting that asked, `extra` has them."""
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        raise SettingsError(
            f"{wanted} needs {' and '.join(absent)}, which this environment lacks: pip install 'fivefold[{extra}]' "
            f"(from the repository: pip install '.[{extra}]')"
        )
