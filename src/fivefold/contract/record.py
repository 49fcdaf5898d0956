"""`stage.json`: success marker, provenance and cache key of a stage. The stage writes it last.

If the record matches inputs, settings and outputs, the stage skips. A stage that runs removes
the old record first, so that a killed stage never looks finished.
"""

import hashlib
import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import fivefold
from fivefold.contract.artifacts import COMPARED_FILES, channel_digest
from fivefold.contract.files import read_json, sha256, sha256_cached, tree_sha256, write_json
from fivefold.contract.job import StageContext
from fivefold.contract.stage_specs import RECORD
from fivefold.errors import DataError
from fivefold.log import log

IMAGE_VARIABLE = "FIVEFOLD_IMAGE"
"""Variable with the digest of the container's image, if the user sets it."""
PACKAGES = (
    "torch", "torchvision", "timm", "efficientnet-pytorch", "numpy", "pillow", "pyarrow", "scikit-learn", "safetensors"
)  # fmt: skip
PATH_SETTINGS = (
    "data.labels",
    "data.groups",
    "model.weights",
    "distill.teacher",
    "ensemble.submissions",
    "compare.submissions",
    "compare.runs",
)


@dataclass(frozen=True)
class CacheKey:
    """The cache key of a stage: the digests of its inputs, and its settings."""

    stage: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]

    def digest(self) -> str:
        text = json.dumps([self.stage, dict(self.inputs), dict(self.settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def compute_key(job: StageContext, settings: Mapping[str, Any]) -> CacheKey:
    """Return the key of this job: digests of its hashed channels, and the settings that can change its result."""
    channels = [name for name in job.stage.hashed if job.optional_channel(name) is not None]
    digests = {
        name: channel_digest(name, job.channel(name), job.scratch, settings, job.stage.name) for name in channels
    }
    digests |= {
        key: tree_sha256(path, without=(RECORD,), only=COMPARED_FILES if key.startswith("compare.") else ("",))
        for key, path in _path_settings(settings)
    }
    digests |= {name: "given" for name in job.stage.recorded_channels if job.optional_channel(name) is not None}
    return CacheKey(stage=job.stage.name, inputs=digests, settings=dict(settings))


def _path_settings(settings: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Return the existing paths in settings, by key: initial weights, a teacher's folder, each entry of a list."""
    values = {key: settings.get(key) or "" for key in PATH_SETTINGS}
    paths = {key: Path(str(value)) for key, value in values.items() if not isinstance(value, list)}
    paths |= {
        f"{key}.{index}": Path(p) for key, v in values.items() if isinstance(v, list) for index, p in enumerate(v)
    }
    return [(key, path) for key, path in paths.items() if path.name and path.exists()]


def rerun_reason(folder: Path, key: CacheKey, roots: Mapping[str, Path], on_version_change: str = "warn") -> str | None:
    """Return why the stage must run, or None if the record in `folder` matches `key` and its outputs are unchanged.

    If code or package versions changed, log a warning (`on_version_change` warn), return a reason (rerun), or ignore it (ignore).
    """
    path = record_path(folder, key.stage)
    if not path.is_file():
        return "no record of an earlier run"
    try:
        record = _Record.model_validate(read_json(path))
    except (DataError, ValidationError):
        return f"the record {path} cannot be read"
    old = CacheKey(record.stage, record.inputs, record.settings)
    if old.digest() != key.digest():
        return _describe_difference(old, key)
    for name, digest in record.outputs.items():
        root, _, relative = name.partition("/")
        output = roots.get(root, Path()) / relative
        if root not in roots or not output.is_file() or sha256_cached(output) != digest:
            return f"output missing or changed: {name}"
    changes = _version_changes(record) if on_version_change != "ignore" else ""
    if changes and on_version_change == "rerun":
        return f"code or package versions changed: {changes}"
    if changes:
        log.warning(
            "reusing %s although code or package versions changed (%s); set on_version_change=rerun to rerun the stage",
            path,
            changes,
        )
    return None


def input_locations(job: StageContext, folder: Path) -> dict[str, list[str]]:
    """Return the location of each channel: relative to the record's folder, since both may move together, and absolute.

    Both are the URL for a channel at a URL.
    """
    here, places = folder.resolve(), {}
    for name in (*job.stage.channels, *job.stage.optional):
        if name in job.channels:
            path, url = job.channels[name].resolve(), job.remote.channels.get(job.channels[name])
            places[name] = [str(url)] * 2 if url else [os.path.relpath(path, here), str(path)]
    return places


def write_record(
    folder: Path,
    job: StageContext,
    key: CacheKey,
    outputs: Sequence[Path],
    metrics: Mapping[str, Any],
    started: float,
) -> None:
    """Write `stage.json` into `folder`. `outputs` must stay unchanged for the record to count; `started` is of time.monotonic."""
    roots = output_roots(job)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, outputs))
    write_json(
        record_path(folder, key.stage),
        {
            "stage": key.stage,
            "key": key.digest(),
            "inputs": dict(key.inputs),
            "settings": dict(key.settings),
            "sources": input_locations(job, folder),
            "roots": {name: os.path.relpath(path.resolve(), folder.resolve()) for name, path in roots.items()},
            "outputs": {_name(path, roots): digest for path, digest in zip(outputs, digests, strict=True)},
            "metrics": dict(metrics),
            "code": code_version(),
            "packages": package_versions(),
            "image": os.environ.get(IMAGE_VARIABLE, ""),
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "processes": job.rank.world_size,
            "wall_seconds": round(time.monotonic() - started, 3),
            "cpu_seconds": round(time.process_time(), 3),
            "peak_memory_mib": peak_memory_mib(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def record_path(folder: Path, stage: str) -> Path:
    """Return the path of `stage.json`, or of `<stage>.stage.json` if the folder has another stage's `stage.json`.

    An existing `<stage>.stage.json` stays in use, even if the other record is absent while that stage runs.
    """
    path, own_record = folder / RECORD, folder / f"{stage}.{RECORD}"
    return own_record if own_record.is_file() or _stage_of(path) not in (None, stage) else path


class _Record(BaseModel):
    """The fields of a record that decide whether its stage runs again."""

    model_config = ConfigDict(strict=True)
    stage: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    settings: dict[str, Any]
    code: str
    packages: dict[str, str]


def _stage_of(path: Path) -> str | None:
    """Return the stage of the record at `path`, or None if there is no readable record."""
    try:
        record = read_json(path)
    except (OSError, DataError):
        return None
    return record.get("stage") if isinstance(record, dict) else None


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the version, and the first 12 digits of the SHA-256 over all Python files of Fivefold: `0.1.0+1f2e3d4c5b6a`."""
    package, jobs = Path(fivefold.__file__).parent, find_spec("fivefold.jobs")
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    if jobs and jobs.origin:  # in a checkout, jobs/ is outside the package
        files |= {f"jobs/{path.name}": path for path in Path(jobs.origin).parent.glob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return f"{fivefold.__version__}+{digest.hexdigest()[:12]}"


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results may depend on; `absent` if not installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _version_changes(record: _Record) -> str:
    """Describe the code and package versions that differ from a record's: `torch 2.13.0 -> 2.14.1`; empty if none."""
    now = {"code": code_version(), **package_versions()}
    then = {"code": record.code, **record.packages}
    return ", ".join(
        f"{name} {then.get(name) or 'unknown'} -> {now[name]}" for name in now if then.get(name) != now[name]
    )


def output_roots(job: StageContext) -> dict[str, Path]:
    """Return the root folders of the output names in a record: `model/…` and `output/…`."""
    roots = {"output": job.output_data_dir, "model": job.model_dir if job.stage.writes_model else None}
    return {name: path for name, path in roots.items() if path is not None}


def peak_memory_mib() -> int:
    """Return the peak memory of this process in MiB. On Linux read VmHWM, because getrusage starts at the parent's peak."""
    status = Path("/proc/self/status")
    if status.is_file() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak[1]) // 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def _name(path: Path, roots: Mapping[str, Path]) -> str:
    root = max((name for name in roots if path.is_relative_to(roots[name])), key=lambda name: len(str(roots[name])))
    return f"{root}/{path.relative_to(roots[root]).as_posix()}"


def _describe_difference(old: CacheKey, new: CacheKey) -> str:
    inputs = sorted(n for n in {*old.inputs, *new.inputs} if old.inputs.get(n) != new.inputs.get(n))
    settings = sorted(n for n in {*old.settings, *new.settings} if old.settings.get(n) != new.settings.get(n))
    parts = [f"inputs differ: {', '.join(inputs)}"] if inputs else []
    changes = [f"{n} {_format_value(old.settings, n)} -> {_format_value(new.settings, n)}" for n in settings]
    parts += [f"settings differ: {', '.join(changes)}"] if settings else []
    return "; ".join(parts) or "another stage's record"


def _format_value(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name], ensure_ascii=False) if name in settings else "absent"
    return text if len(text) <= 40 else f"{text[:37]}..."
