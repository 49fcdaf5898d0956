"""Finding what an earlier stage made, as folders or inside the tarballs that SageMaker makes."""

import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.contract.files import (
    MOST_OF_AN_ARCHIVE,
    check_space,
    read_json,
    sha256,
    sha256_once,
    tree_files,
    tree_sha256,
)
from fivefold.contract.job import Job
from fivefold.contract.spelling import TRUTHS, is_sample
from fivefold.contract.stages import (
    CLASSES,
    ENSEMBLE,
    FOLDS,
    HOLDOUT,
    MODEL,
    OOF,
    OVERLAP,
    PREDICTIONS,
    RECORD,
    SPLIT_SUMMARY,
    TRAIN_LOG,
    WEIGHTS,
)
from fivefold.errors import DataError, MissingInputError

TARBALLS = ("model.tar.gz", "output.tar.gz")
KEYED_FILES = {
    "folds": (FOLDS, CLASSES),
    "model": (WEIGHTS, MODEL, OOF, HOLDOUT, TRAIN_LOG),
    "ensemble": (ENSEMBLE,),
}
"""Of these channels only these files make a key: the folder around them may hold more."""

KEYED_FOR = {("evaluate", "folds"): (OVERLAP, SPLIT_SUMMARY)}
"""Files that make the key of one stage too: the split writes them for it alone, and they change no other result."""
COMPARED = (".csv", ".parquet", ENSEMBLE, MODEL)
"""Of a run only these files are compared."""
TRUTH = tuple(f"/{name}" for name in TRUTHS)
"""Files that lie beside test images, and that no stage reads which predicts them."""
CHECKED = (WEIGHTS, MODEL, OOF, HOLDOUT)
"""Files of a model that later stages read."""

DESCRIBED = {
    "role": str,
    "system": str,
    "seed": int,
    "fold": int | None,
    "folds": int,
    "classes": list,
    "split": str,
    "shares": list,
    "best": dict,
    "training": dict,
    "settings": dict,
    "precision": str,
}
"""What `model.json` says at least, and in which type."""


@dataclass(frozen=True)
class ModelDir:
    """A trained model's folder, and what its `model.json` says of it."""

    path: Path
    info: dict[str, Any]
    shown: Path | None = None
    """What messages call it: its `model.json`, or the tarball that it comes from."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """(role, system, seed, fold): no two models of a channel share it."""
        fold = self.info["fold"]
        return self.info["role"], self.info["system"], self.info["seed"], -1 if fold is None else fold

    @property
    def system(self) -> str:
        """The system that it belongs to in an ensemble; a student is one of its own."""
        return f"{self.info['system']} (student)" if self.info["role"] == "student" else self.info["system"]

    @property
    def name(self) -> str:
        if self.info["role"] == "student":
            return f"student of {self.info['system']}, seed {self.info['seed']}"
        return f"fold {self.info['fold']} of {self.info['system']}, seed {self.info['seed']}"


def roots(folder: Path, scratch: Path) -> dict[Path, Path]:
    """The folder, and one below `scratch` for each tarball in it; each with where it is from, to name in messages."""
    tarballs = [path for path in tree_files(folder) if path.name in TARBALLS]
    return {folder: folder} | {_unpacked(path, scratch): path for path in tarballs}


def locate(job: Job, channel: str, name: str) -> Path:
    """The one file `name` anywhere in `channel`; several with different bytes are an error."""
    found = _named(job.channel(channel), job.scratch, name)
    if not found:
        raise MissingInputError(f"no {name} below the channel {channel!r} ({job.channel(channel)})")
    return _only(found, name, job.channel(channel))


def _only(found: Mapping[Path, Path], name: str, folder: Path) -> Path:
    """The first of files that must all have the same bytes."""
    if len({sha256(path) for path in found}) > 1:
        listed = ", ".join(str(shown) for shown in list(found.values())[:4])
        raise DataError(f"several different {name} below {folder}: {listed}; give the folder of one run")
    return next(iter(found))


def locate_all(folder: Path, scratch: Path, name: str) -> list[Path]:
    """Every file `name` below a folder, in the order of their paths."""
    return list(_named(folder, scratch, name))


def find_models(folder: Path, scratch: Path) -> list[ModelDir]:
    """The fold models below a folder; or its students, when it holds nothing else. Tarballs are unpacked to `scratch`.

    Sorted by system, seed and fold; one that lies there twice (as a folder and in its tarball) is
    one model. Raises MissingInputError when there is no model at all, DataError for one that is
    not finished, and for two different models of the same fold.
    """
    every = [ModelDir(p.parent, _model_info(p, shown), shown) for p, shown in _named(folder, scratch, MODEL).items()]
    folds = [model for model in every if model.info["role"] == "fold"]
    found: dict[tuple[Any, ...], ModelDir] = {}
    for model in folds or every:
        _check_finished(model)
        other = found.setdefault(model.identity, model)
        if not _same_bytes(model, other):
            raise DataError(f"{other.shown} and {model.shown} are both {model.name}, and differ; leave one of them out")
    if not found:
        raise MissingInputError(f"no model below {folder}: looked for **/{MODEL} and **/model.tar.gz")
    return sorted(found.values(), key=lambda model: model.identity)


def model_at(folder: Path) -> ModelDir:
    """The finished model in a folder that settings name; errors as for a channel's."""
    path = folder / MODEL
    if not path.is_file():
        raise MissingInputError(f"{folder} holds no {MODEL}: give the folder of a trained model")
    model = ModelDir(folder, _model_info(path, path), path)
    _check_finished(model)
    return model


def check_split(models: Sequence[ModelDir], split: Path) -> None:
    """Raises a DataError unless the models were trained on the split at this path."""
    digest = sha256(split)
    for model in models:
        if model.info["split"] != digest:
            raise DataError(f"{model.name} was trained on another split than {split}")


def find_predictions(folder: Path, scratch: Path) -> dict[str, Path]:
    """The files of a predictions channel that go together, of predictions.parquet, holdout.parquet, ensemble.json.

    A lone submission CSV takes the place of predictions.parquet; `folder` may be such a file itself.
    Raises MissingInputError when there is neither, DataError when there are several.
    """
    if folder.suffix in (".parquet", ".csv"):
        return {PREDICTIONS: folder}
    for name in (PREDICTIONS, HOLDOUT):
        if found := _named(folder, scratch, name):
            parent = _only(found, name, folder).parent
            beside = {other: parent / other for other in (PREDICTIONS, HOLDOUT, ENSEMBLE)}
            return {other: path for other, path in beside.items() if path.is_file()}
    return {PREDICTIONS: _submission(folder, scratch)}


def channel_digest(channel: str, folder: Path, scratch: Path, settings: Mapping[str, Any], stage: str = "") -> str:
    """The digest of what a `stage` with these (flat) settings reads of a channel: of certain files, or of the whole folder.

    A split that opens no image reads tables (a .zip counts as one) and, of all other files, only their names.
    """
    if channel == "model":
        return _digest([model.path / name for model in find_models(folder, scratch) for name in KEYED_FILES["model"]])
    if channel == "predictions":
        return _digest(list(find_predictions(folder, scratch).values()))
    if channel in KEYED_FILES:
        names = (*KEYED_FILES[channel], *KEYED_FOR.get((stage, channel), ()))
        return _digest([path for name in names for path in _named(folder, scratch, name)])
    if channel == "runs":
        return tree_sha256(folder, without=(RECORD,), only=COMPARED)
    without = (RECORD, *TRUTH) if channel == "eval" else (RECORD,)
    tables = (".csv", ".zip", str(settings.get("data.table", "")).lower() or ".csv")
    return tree_sha256(folder, without=without, only=("",) if settings.get("split.open_images", True) else tables)


def _submission(folder: Path, scratch: Path) -> Path:
    """The only CSV of a predictions channel, sample submissions aside."""
    files = [path for root in roots(folder, scratch) for path in tree_files(root) if path.suffix.lower() == ".csv"]
    found = [path for path in files if not is_sample(path.name)]
    if not found:
        raise MissingInputError(f"no {PREDICTIONS}, {HOLDOUT} or submission CSV below {folder}")
    if len(found) > 1:
        listed = ", ".join(str(path) for path in found[:4])
        raise DataError(f"several CSVs below {folder}: {listed}; give the submission itself")
    return found[0]


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(f"{path.name}\0{sha256_once(path)}\n".encode())
    return digest.hexdigest()


def _named(folder: Path, scratch: Path, name: str) -> dict[Path, Path]:
    """Every file `name` below `folder`, each with what messages call it: itself, or the tarball that it comes from."""
    return {
        path: path if origin == root else origin
        for root, origin in roots(folder, scratch).items()
        for path in tree_files(root)
        if path.name == name
    }


def _model_info(path: Path, shown: Path) -> dict[str, Any]:
    """What `model.json` says; a DataError unless it describes a model."""
    info = read_json(path)
    if not isinstance(info, dict) or not all(n in info and isinstance(info[n], kind) for n, kind in DESCRIBED.items()):
        raise DataError(f"{path} does not describe a model: {', '.join(DESCRIBED)} are needed")
    if info["role"] not in ("fold", "student"):
        raise DataError(f"{path}: role is {info['role']!r}, neither fold nor student")
    return info


def _check_finished(model: ModelDir) -> None:
    if not (model.path / RECORD).is_file():
        raise DataError(
            f"{model.shown}: a model without {RECORD}, so its training did not finish or it was copied in part; "
            "run it again, copy the whole folder, or leave it out"
        )
    record = read_json(model.path / RECORD)
    outputs = record.get("outputs") if isinstance(record, dict) else None
    made = {name.partition("/")[2]: digest for name, digest in (outputs or {}).items()}
    for name in CHECKED:
        path = model.path / name
        if name in made and path.is_file() and sha256_once(path) != made[name]:
            raise DataError(
                f"{model.shown.parent / name} is not the file that its stage made (see {RECORD} beside it): copy the "
                "whole folder again, or run the stage again"
            )


def _same_bytes(model: ModelDir, other: ModelDir) -> bool:
    files = [[folder / name for name in (WEIGHTS, MODEL)] for folder in (model.path, other.path)]
    return model is other or _digest(files[0]) == _digest(files[1])


def _unpacked(tarball: Path, scratch: Path) -> Path:
    """The folder that `tarball` was unpacked to, once a process; what would lie outside of it is refused."""
    target = scratch / hashlib.sha256(str(tarball.resolve()).encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    partial = target.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    try:
        with tarfile.open(tarball) as archive:
            checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(partial, _plain_members(archive, partial), **checked)
            # tarfile stops in silence at a damaged header, and gzip keeps its checksum at the very end.
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{tarball} cannot be unpacked: {error}") from error
    return partial.rename(target)


def _plain_members(archive: tarfile.TarFile, folder: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files and folders of an archive of a model or an output, whose owner becomes this process.

    Python before 3.11.4 (Debian 12 has 3.11.2) has no filters. Raises a TarError for links, devices, files with holes, paths
    outside `folder`, and more bytes than the disk could ever take; a RetryableError where it has no room for them now.
    """
    most, size = min(MOST_OF_AN_ARCHIVE, shutil.disk_usage(folder).total), 0
    for member in archive:
        # of one with holes a few bytes stand for any size
        if member.issparse() or not (member.isreg() or member.isdir()):
            raise tarfile.ExtractError(f"{member.name!r} is neither a plain file nor a folder")
        size += member.size
        if size > most:
            raise tarfile.ExtractError(f"its files take more than {most:,} bytes, which are allowed and fit {folder}")
        check_space(folder, member.size)
        if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
            raise tarfile.ExtractError(f"{member.name!r} is outside the archive's folder")
        member.mode = 0o755 if member.isdir() else 0o644
        member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
        yield member
