"""What a benchmark can be told: KEY=VALUE, each with its default and meaning."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fivefold.choose import choose
from fivefold.errors import SettingsError
from fivefold.machine import count_cores
from fivefold.values import value_of

ROOT = Path(__file__).parents[1]
"""The repository."""


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Options:
    """0 and "" mean the benchmark's own. What a benchmark has no use for, it does not read."""

    pairs: int = _key(7, "pairs of fresh processes, or runs where there is nothing to pair")
    cases: str = _key("", "only these of its rows, between commas; empty: all")
    images: str = _key("", "a folder of photographs of yours; empty: crops of scikit-learn's two")
    photo: str = _key("500x375", "size of the crops: 500x375, or 1600x1200 as a camera's")
    count: int = _key(0, "images at most; 0: the benchmark's own number")
    epochs: int = _key(0, "epochs of a training, of which the first is not counted; 0: its own")
    size: int = _key(0, "pixels that the networks take; 0: the case's")
    batch: int = _key(0, "images a step; 0: the case's")
    stored: int = _key(-1, "shorter side of the images in the cache (data.store_size); 0: as they are; -1: the case's")
    rows: int = _key(1_000_000, "rows of a table")
    threads: int = _key(0, "threads of each process; 0: the cores of this machine")
    device: str = _key("cpu", "cpu or cuda")
    search: str = _key(
        "short",
        "for timm's best: short (precision × memory format, then workers), full (every combination), or what was found: bf16,NHWC,0",
    )
    work: str = _key("build/benchmarks", "folder of images, splits and runs; it may be deleted")
    results: str = _key("benchmarks/results", "folder of the JSON")

    @property
    def cores(self) -> int:
        return self.threads or count_cores()

    def folder(self, *names: str) -> Path:
        """A folder below `work`, made if it is not there."""
        found = Path(self.work).resolve().joinpath(*names)
        found.mkdir(parents=True, exist_ok=True)
        return found

    def fresh(self, *names: str) -> Path:
        """The same, and empty."""
        shutil.rmtree(Path(self.work).resolve().joinpath(*names), ignore_errors=True)
        return self.folder(*names)

    def chosen(self, known: Sequence[str]) -> list[str]:
        """The rows among `known` that are wanted; a SettingsError for one that is not there."""
        table = {name: name for name in known}
        return [choose(table, "case", name.strip()) for name in self.cases.split(",")] if self.cases else list(known)


def parse(arguments: Sequence[str], default: Options = Options()) -> Options:  # noqa: B008
    """`default` with the KEY=VALUE of `arguments`; a SettingsError for an unknown key or a value that cannot be."""
    known = {each.name: each for each in fields(Options)}
    given: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SettingsError(f"argument {argument!r} is not KEY=VALUE; python -m benchmarks --help lists the keys")
        kind = choose(known, "key", name).type
        try:
            given[name] = value_of(kind, text)
        except ValueError as error:
            raise SettingsError(f"{name}={text}: {error}") from error
    options = replace(default, **given)
    for name in ("pairs", "rows"):
        if getattr(options, name) < 1:
            raise SettingsError(f"{name}={getattr(options, name)}: at least 1 is needed")
    choose({"cpu": 1, "cuda": 1}, "device", options.device)
    return options


def keys() -> str:
    """The keys with their defaults, for the help."""
    return "\n".join(f"  {f'{each.name}={each.default}':28} {each.metadata['meaning']}" for each in fields(Options))
