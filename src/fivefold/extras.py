"""Check that optional packages are installed."""

from collections.abc import Sequence
from importlib.util import find_spec

from fivefold.errors import SettingsError


def need(packages: Sequence[str], extra: str, wanted: str) -> None:
    """Raise a SettingsError unless all `packages` can be imported. The setting `wanted` needs them; the extra `extra` installs them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"{wanted} needs {' and '.join(missing)}, not installed here: pip install 'fivefold[{extra}]' "
            f"(from the repository: pip install '.[{extra}]')"
        )
