"""Fivefold: k-fold image classification as container jobs."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["ImageClassificationAPI", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the API, and torch with it, on first access, so that jobs that need neither start fast."""
    if name == "ImageClassificationAPI":
        return import_module("fivefold.api").ImageClassificationAPI
    raise AttributeError(f"module 'fivefold' has no attribute {name!r}")
