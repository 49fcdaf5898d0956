"""What made a result besides its inputs and settings: our own code, and the packages below it."""

import hashlib
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fivefold

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "efficientnet-pytorch",
    "numpy",
    "pillow",
    "pyarrow",
    "scikit-learn",
    "safetensors",
)
DIGITS = 12


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version, and the first digits of the SHA-256 of all our Python files: `0.1.0+1f2e3d4c5b6a`."""
    jobs = find_spec("jobs")
    folders = [Path(fivefold.__file__).parent, *([Path(jobs.origin).parent] if jobs and jobs.origin else [])]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return f"{fivefold.__version__}+{digest.hexdigest()[:DIGITS]}"


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that results may depend on; `absent` where one is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def changed_since(record: Mapping[str, Any]) -> str:
    """Which code and packages are others than those of a record, in words: `torch 2.13.0 -> 2.14.1`; empty if none."""
    now = {"code": code_version(), **package_versions()}
    packages = record.get("packages")
    then = {"code": record.get("code"), **(packages if isinstance(packages, Mapping) else {})}
    return ", ".join(
        f"{name} {then.get(name) or 'unknown'} -> {now[name]}" for name in now if then.get(name) != now[name]
    )
