"""`stage.json`: the success marker, the lineage and the cache key of a stage, written last.

A stage whose record matches its inputs, settings and outputs has nothing to do. One that must
run removes the old record first, so that a killed stage never looks finished.
"""

import hashlib
import json
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fivefold
from fivefold.contract.artifacts import COMPARED, channel_digest
from fivefold.contract.files import read_json, sha256, tree_sha256, write_json
from fivefold.contract.job import Job
from fivefold.contract.stages import RECORD
from fivefold.errors import DataError

log = logging.getLogger("fivefold")

IMAGE_VARIABLE = "FIVEFOLD_IMAGE"
"""Names the digest of the container's image, where somebody sets it."""
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
NAMED_BY_PATH = ("model.weights", "distill.teacher", "ensemble.submissions", "compare.files", "compare.runs")


@dataclass(frozen=True)
class Key:
    """All that decides a stage's result: the digests of its inputs, and its settings."""

    stage: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]

    def digest(self) -> str:
        text = json.dumps([self.stage, dict(self.inputs), dict(self.settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Stopwatch:
    """Wall and CPU seconds since it was made."""

    wall: float = field(default_factory=time.monotonic)
    cpu: float = field(default_factory=time.process_time)

    def read(self) -> dict[str, float]:
        return {
            "wall_seconds": round(time.monotonic() - self.wall, 3),
            "cpu_seconds": round(time.process_time() - self.cpu, 3),
        }


def key_of(job: Job, settings: Mapping[str, Any]) -> Key:
    """The key of this job: digests of its hashed channels, and the settings that can change its result."""
    given = [name for name in job.stage.hashed if job.optional_channel(name) is not None]
    digests = {name: channel_digest(name, job.channel(name), job.scratch, settings, job.stage.name) for name in given}
    digests |= {
        key: tree_sha256(path, without=(RECORD,), only=COMPARED if key.startswith("compare.") else ("",))
        for key, path in _named_files(settings)
    }
    digests |= {name: "given" for name in job.stage.noted if job.optional_channel(name) is not None}
    return Key(stage=job.stage.name, inputs=digests, settings=dict(settings))


def _named_files(settings: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """What settings name by its path: weights to start from, a teacher's folder, each of several files."""
    named = {key: settings.get(key) or "" for key in NAMED_BY_PATH}
    paths = {key: Path(str(value)) for key, value in named.items() if not isinstance(value, list)}
    paths |= {f"{key}.{at}": Path(p) for key, v in named.items() if isinstance(v, list) for at, p in enumerate(v)}
    return [(key, path) for key, path in paths.items() if path.name and path.exists()]


def why_run(folder: Path, key: Key, roots: Mapping[str, Path], reuse: str = "warn") -> str | None:
    """Why the stage must run, or None when the record in `folder` matches `key` and its outputs are whole.

    Other code or packages than the record's are told (`reuse` warn), a reason (strict), or neither (force).
    """
    path = record_path(folder, key.stage)
    if not path.is_file():
        return "no record of an earlier run"
    try:
        record = read_json(path)
        old = Key(record["stage"], dict(record["inputs"]), dict(record["settings"]))
        outputs = dict(record["outputs"])
    except (DataError, KeyError, TypeError, ValueError):
        return f"the record {path} cannot be read"
    if old.digest() != key.digest():
        return _difference(old, key)
    for name, digest in outputs.items():
        root, _, relative = name.partition("/")
        file = roots[root] / relative if root in roots else None
        if file is None or not file.is_file() or sha256(file) != digest:
            return f"output missing or changed: {name}"
    others = changed_since(record) if reuse != "force" else ""
    if others and reuse == "strict":
        return f"made by other code or packages: {others}"
    if others:
        log.warning(
            "%s was made by other code or packages (%s), and is taken all the same: reuse=strict makes it anew",
            path,
            others,
        )
    return None


def sources(job: Job, folder: Path) -> dict[str, list[str]]:
    """Where each channel of the stage lay: as seen from the record's folder, which may move with them, and absolute.

    A URL is the same from everywhere.
    """
    here, places = folder.resolve(), {}
    for name in (*job.stage.channels, *job.stage.optional):
        if name in job.channels:
            path = job.channels[name].resolve()
            url = job.remote.source(job.channels[name])
            places[name] = [url, url] if url else [os.path.relpath(path, here), str(path)]
    return places


def write_record(
    folder: Path,
    job: Job,
    key: Key,
    outputs: Sequence[Path],
    metrics: Mapping[str, Any],
    clock: Stopwatch,
) -> None:
    """Writes `stage.json` into `folder`; `outputs` are the files that must be whole for it to count."""
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
            "sources": sources(job, folder),
            "roots": {name: os.path.relpath(path.resolve(), folder.resolve()) for name, path in roots.items()},
            "outputs": {_name(path, roots): digest for path, digest in zip(outputs, digests, strict=True)},
            "metrics": dict(metrics),
            "code": code_version(),
            "packages": package_versions(),
            "image": os.environ.get(IMAGE_VARIABLE, ""),
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "processes": job.place.world,
            **clock.read(),
            "peak_memory_mib": peak_memory_mib(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def record_path(folder: Path, stage: str) -> Path:
    """`stage.json`, or `<stage>.stage.json` where another stage's record stands in the same folder.

    A record that had to step aside stays there, even if the other's is gone while that stage runs.
    """
    path, aside = folder / RECORD, folder / f"{stage}.{RECORD}"
    return aside if aside.is_file() or _stage_of(path) not in (None, stage) else path


def _stage_of(path: Path) -> str | None:
    """The stage whose record stands at `path`; None where there is no record, or no readable one."""
    try:
        record = read_json(path)
    except (OSError, DataError):
        return None
    return record.get("stage") if isinstance(record, dict) else None


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version, and the first digits of the SHA-256 of all our Python files: `0.1.0+1f2e3d4c5b6a`."""
    package, jobs = Path(fivefold.__file__).parent, find_spec("fivefold.jobs")
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    if jobs and jobs.origin:  # in a checkout it lies outside the package
        files |= {f"jobs/{path.name}": path for path in Path(jobs.origin).parent.glob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return f"{fivefold.__version__}+{digest.hexdigest()[:12]}"


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


def output_roots(job: Job) -> dict[str, Path]:
    """The folders that a record names its outputs by: `model/…` and `output/…`."""
    roots = {"output": job.output_data_dir, "model": job.model_dir if job.stage.writes_model else None}
    return {name: path for name, path in roots.items() if path is not None}


def peak_memory_mib() -> int:
    """The most memory that this process has held; on Linux its own, since getrusage starts at its parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def _name(path: Path, roots: Mapping[str, Path]) -> str:
    for root in sorted(roots, key=lambda root: -len(str(roots[root]))):
        if path.is_relative_to(roots[root]):
            return f"{root}/{path.relative_to(roots[root]).as_posix()}"
    raise ValueError(f"{path} lies below none of {dict(roots)}")


def _difference(old: Key, new: Key) -> str:
    inputs = sorted(n for n in {*old.inputs, *new.inputs} if old.inputs.get(n) != new.inputs.get(n))
    settings = sorted(n for n in {*old.settings, *new.settings} if old.settings.get(n) != new.settings.get(n))
    parts = [f"inputs differ: {', '.join(inputs)}"] if inputs else []
    changes = [f"{n} {_shown(old.settings, n)} -> {_shown(new.settings, n)}" for n in settings]
    parts += [f"settings differ: {', '.join(changes)}"] if settings else []
    return "; ".join(parts) or "another stage's record"


def _shown(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name], ensure_ascii=False) if name in settings else "absent"
    return text if len(text) <= 40 else f"{text[:37]}..."
