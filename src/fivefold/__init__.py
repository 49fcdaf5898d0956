"""Fivefold: k-fold image classification as container jobs."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["ImageClassificationAPI", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads the API, and torch with it, when it is first asked for: jobs that need neither start at once."""
    if name == "ImageClassificationAPI":
        return import_module("fivefold.api").ImageClassificationAPI
    raise AttributeError(f"module 'fivefold' has no attribute {name!r}")
