"""What the parameters of our own transforms may be."""

from typing import Any

from fivefold.errors import SettingsError


def check(function: str, key: str, value: Any, default: Any) -> None:
    """Raises a SettingsError unless `value` is of the default's kind and within the parameter's bounds.

    Where the default is a range, two ascending numbers are needed; a colour is one number or three.
    """
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    lengths = (1, 3) if key in COLOURS else (len(default) if isinstance(default, tuple) else 1,)
    kind, least, most = BOUNDS.get(key, (type(default), None, None))
    good = isinstance(value, list | tuple) == (len(numbers) > 1) and len(numbers) in lengths
    good = good and all(isinstance(n, kind) and (kind is bool or not isinstance(n, bool)) for n in numbers)
    if good and least is not None:
        good = all(least <= n <= most for n in numbers) and (key in COLOURS or numbers == sorted(numbers))
    if good and key == "kernel":
        good = value % 2 == 1
    if not good:
        bounds = "" if least is None else f" from {least:g} to {most:g}"
        raise SettingsError(f"{function}: {key}={value!r} cannot be; it is like {default!r}{bounds}")


BOUNDS: dict[str, tuple[Any, float, float]] = {
    "p": (int | float, 0, 1),
    "share": (int | float, 0.01, 1),
    "padding": (int, 0, 4096),
    "scale": (int | float, 1e-4, 1),
    "ratio": (int | float, 0.01, 100),
    "height": (int, 1, 65535),
    "width": (int, 1, 65535),
    "amount": (int | float, -100, 100),
    "kernel": (int, 1, 99),
    "sigma": (int | float, 0.01, 100),
    "threshold": (int | float, 0, 255),
    "mean": (int | float, -1, 1),
    "std": (int | float, 0, 10),
    "holes": (int, 0, 1000),
    "fill": (int | float, 0, 255),
    "steps": (int, 1, 100),
    "limit": (int | float, -0.99, 10),
    "shift": (int | float, 0, 1),
    "zoom": (int | float, 0.1, 10),
    "degrees": (int | float, 0, 180),
    "stretch": (int | float, 1, 10),
    "brightness": (int | float, 0, 1),
    "contrast": (int | float, 0, 1),
    "saturation": (int | float, 0, 1),
    "cast": (int | float, 0, 1),
}
"""Kind, least and most of each parameter of our own transforms."""
COLOURS = ("mean", "std", "fill")
