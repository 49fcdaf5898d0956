"""Options of the benchmarks: KEY=VALUE, each with its default and meaning."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fivefold.errors import SettingsError
from fivefold.lookup import choose

ROOT = Path(__file__).parents[1]
"""The repository."""


class Options(BaseModel):
    """0 and "" mean the default of the benchmark. A benchmark ignores options that it does not use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: int = Field(7, ge=1, description="pairs of fresh processes, or runs if there is no second side")
    cases: str = Field("", description="measure only these rows, separated by commas; empty: all")
    images: str = Field("", description="a folder of class folders of photographs; empty: crops of scikit-learn's two")
    photo: str = Field("500x375", pattern=r"^\d+x\d+$", description="size of the crops, such as 1600x1200")
    count: int = Field(0, ge=0, description="number of images at most; 0: the default")
    epochs: int = Field(0, ge=0, description="epochs of a training; the first is not counted")
    size: int = Field(0, ge=0, description="image size of the networks in pixels")
    batch: int = Field(0, ge=0, description="images per step")
    threads: int = Field(0, ge=0, description="threads of each process; 0: the number of cores")
    device: Literal["cpu", "cuda"] = Field("cpu", description="device of the networks")
    eval: str = Field("", description="accuracy: test images with a ground truth, as submit takes them")
    minutes: float = Field(10, gt=0, description="accuracy: time of each side in minutes")
    settings: str = Field("", description="accuracy: further settings of submit, such as data.group_column=sender_id")
    search: str = Field("", description="timm's settings as bf16,NHWC,0; empty: search for the best ones")
    work: str = Field("build/benchmarks", description="folder of images, splits and runs; you may delete it")
    results: str = Field("benchmarks/results", description="folder of the JSON files")

    @property
    def cores(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    def folder(self, *names: str) -> Path:
        """Return a folder below `work`. Create it if it does not exist."""
        path = Path(self.work).resolve().joinpath(*names)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def empty_folder(self, *names: str) -> Path:
        """Return a folder below `work`, emptied."""
        shutil.rmtree(Path(self.work).resolve().joinpath(*names), ignore_errors=True)
        return self.folder(*names)

    def select(self, known: Sequence[str]) -> list[str]:
        """Return the rows among `known` that `cases` names, or all. Raises SettingsError for an unknown one."""
        table = {name: name for name in known}
        return [choose(table, "case", name.strip()) for name in self.cases.split(",")] if self.cases else list(known)


def parse(arguments: Sequence[str]) -> Options:
    """Build the options from KEY=VALUE arguments. Raises SettingsError for an unknown key or an invalid value."""
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SettingsError(f"argument {argument!r} is not KEY=VALUE; python -m benchmarks --help lists the keys")
        choose(Options.model_fields, "key", name)
        values[name] = text
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{first['loc'][0]}={first['input']}: {first['msg']}") from error


def describe_keys() -> str:
    """Return the keys with their defaults, for the help."""
    return "\n".join(
        f"  {f'{name}={field.default}':28} {field.description}" for name, field in Options.model_fields.items()
    )
