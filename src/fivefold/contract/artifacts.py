"""Finding what an earlier stage made, as folders or inside the tarballs that SageMaker makes."""

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.contract.files import read_json, sha256, tree_files, tree_sha256
from fivefold.contract.job import Job
from fivefold.contract.stages import (
    CLASSES,
    ENSEMBLE,
    FOLDS,
    HOLDOUT,
    MODEL,
    OOF,
    PREDICTIONS,
    RECORD,
    TRAIN_LOG,
    WEIGHTS,
)
from fivefold.errors import DataError, MissingInputError

TARBALLS = ("model.tar.gz", "output.tar.gz")
KEYED_FILES = {
    "folds": (FOLDS, CLASSES),
    "model": (WEIGHTS, MODEL, OOF, HOLDOUT, TRAIN_LOG),
}
"""Of these channels only these files make a key: the folder around them may hold more."""


@dataclass(frozen=True)
class ModelDir:
    """A trained model's folder, and what its `model.json` says of it."""

    path: Path
    info: dict[str, Any]

    @property
    def name(self) -> str:
        if self.info["role"] == "student":
            return f"student of {self.info['system']}, seed {self.info['seed']}"
        return f"fold {self.info['fold']} of {self.info['system']}, seed {self.info['seed']}"


def roots(job: Job, channel: str) -> list[Path]:
    """The channel's folder, and a folder for each tarball below it, unpacked with the `data` filter."""
    root = job.channel(channel)
    found = [root]
    for path in tree_files(root):
        if path.name in TARBALLS:
            found.append(_unpacked(path, job.scratch))
    return found


def locate(job: Job, channel: str, name: str) -> Path:
    """The one file `name` anywhere in `channel`; several with different bytes are an error."""
    paths = locate_all(job, channel, name)
    if not paths:
        raise MissingInputError(f"no {name} below the channel {channel!r} ({job.channel(channel)})")
    if len({sha256(path) for path in paths}) > 1:
        listed = ", ".join(str(path) for path in paths[:4])
        raise DataError(f"several different {name} below the channel {channel!r}: {listed}; give the folder of one run")
    return paths[0]


def locate_all(job: Job, channel: str, name: str) -> list[Path]:
    """Every file `name` in `channel`, in the order of their paths."""
    return [path for root in roots(job, channel) for path in tree_files(root) if path.name == name]


def find_models(job: Job, channel: str = "model") -> list[ModelDir]:
    """The fold models of a channel; or its students, when it holds nothing else.

    Sorted by system, seed and fold. Raises MissingInputError when there is no model at all.
    """
    found = []
    for path in locate_all(job, channel, MODEL):
        info = read_json(path)
        if not isinstance(info, dict) or not {"role", "system", "seed", "fold", "classes"} <= info.keys():
            raise DataError(f"{path} does not describe a model: role, system, seed, fold and classes are needed")
        found.append(ModelDir(path.parent, info))
    if not found:
        raise MissingInputError(
            f"no model below the channel {channel!r} ({job.channel(channel)}): looked for **/{MODEL} and **/model.tar.gz"
        )
    folds = [model for model in found if model.info["role"] == "fold"]
    return sorted(folds or found, key=lambda m: (m.info["system"], m.info["seed"], m.info["fold"] or 0))


def find_predictions(job: Job) -> dict[str, Path]:
    """The files of the predictions channel that go together, of predictions.parquet, holdout.parquet, ensemble.json.

    A lone submission CSV takes the place of predictions.parquet; the channel may be such a file itself.
    Raises MissingInputError when there is neither, DataError when there are several.
    """
    root = job.channel("predictions")
    if root.suffix in (".parquet", ".csv"):
        return {PREDICTIONS: root}
    for name in (PREDICTIONS, HOLDOUT):
        if locate_all(job, "predictions", name):
            folder = locate(job, "predictions", name).parent
            beside = {other: folder / other for other in (PREDICTIONS, HOLDOUT, ENSEMBLE)}
            return {other: path for other, path in beside.items() if path.is_file()}
    return {PREDICTIONS: _submission(job)}


def channel_digest(job: Job, channel: str) -> str:
    """The digest of what a stage reads of a channel: of certain files, or of the whole folder."""
    if channel == "model":
        return _digest([model.path / name for model in find_models(job) for name in KEYED_FILES["model"]])
    if channel == "predictions":
        return _digest(list(find_predictions(job).values()))
    if channel in KEYED_FILES:
        return _digest([path for name in KEYED_FILES[channel] for path in locate_all(job, channel, name)])
    return tree_sha256(job.channel(channel), without=(RECORD,))


def _submission(job: Job) -> Path:
    """The only CSV of the predictions channel, sample submissions aside."""
    files = [path for root in roots(job, "predictions") for path in tree_files(root) if path.suffix.lower() == ".csv"]
    found = [path for path in files if path.name != "sample_submission.csv"]
    if not found:
        raise MissingInputError(
            f"no {PREDICTIONS}, {HOLDOUT} or submission CSV below the channel 'predictions' ({job.channel('predictions')})"
        )
    if len(found) > 1:
        listed = ", ".join(str(path) for path in found[:4])
        raise DataError(f"several CSVs below the channel 'predictions': {listed}; give the submission itself")
    return found[0]


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(f"{path.name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _unpacked(tarball: Path, scratch: Path) -> Path:
    """The folder that `tarball` was unpacked to, once a process."""
    target = scratch / hashlib.sha256(str(tarball.resolve()).encode()).hexdigest()[:16]
    if not target.is_dir():
        try:
            with tarfile.open(tarball) as archive:
                archive.extractall(target, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{tarball} cannot be unpacked: {error}") from error
    return target
