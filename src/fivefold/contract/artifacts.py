"""Find the results of earlier stages, and submissions, in folders and in SageMaker's tarballs."""

import hashlib
import shutil
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.contract.filenames import GROUND_TRUTH_NAMES, is_ground_truth, is_sample_submission
from fivefold.contract.files import (
    MAX_ARCHIVE_BYTES,
    check_space,
    join_below,
    read_json,
    sha256,
    sha256_cached,
    tree_files,
    tree_sha256,
)
from fivefold.contract.job import StageContext
from fivefold.contract.stage_specs import (
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
HASHED_FILES = {
    "folds": (FOLDS, CLASSES),
    "model": (WEIGHTS, MODEL, OOF, HOLDOUT, TRAIN_LOG),
    "ensemble": (ENSEMBLE,),
}
"""The only files of these channels that enter a key. Other files in the folder do not count."""
COMPARED_FILES = (".csv", ".parquet", ENSEMBLE, MODEL)
"""The only files of a run that `compare` reads."""
VERIFIED_FILES = (WEIGHTS, MODEL, OOF, HOLDOUT)
"""Files of a model that later stages read."""

REQUIRED_KEYS = {
    **dict.fromkeys(("role", "system", "split", "precision"), str),
    **dict.fromkeys(("seed", "folds"), int),
    "fold": int | None,
    **dict.fromkeys(("classes", "shares"), list),
    **dict.fromkeys(("best", "training", "settings"), dict),
}
"""The required keys of `model.json`, and their types."""


@dataclass(frozen=True)
class ModelDir:
    """A trained model's folder, and the contents of its `model.json`."""

    path: Path
    info: dict[str, Any]
    display_path: Path | None = None
    """The path for messages: its `model.json`, or the tarball that contains it."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Return (role, system, seed, fold), which is unique among the models of a channel."""
        fold = self.info["fold"]
        return self.info["role"], self.info["system"], self.info["seed"], -1 if fold is None else fold

    @property
    def system(self) -> str:
        """Return the system that the model belongs to in an ensemble. A student is a separate system."""
        return f"{self.info['system']} (student)" if self.info["role"] == "student" else self.info["system"]

    @property
    def name(self) -> str:
        kind = "student" if self.info["role"] == "student" else f"fold {self.info['fold']}"
        return f"{kind} of {self.info['system']}, seed {self.info['seed']}"


def search_roots(folder: Path, scratch: Path) -> dict[Path, Path]:
    """Return the folder, and a folder below `scratch` for each tarball in it. The values are their origins, for messages."""
    tarballs = [path for path in tree_files(folder) if path.name in TARBALLS]
    return {folder: folder} | {_unpack(path, scratch): path for path in tarballs}


def find_one(job: StageContext, channel: str, name: str) -> Path:
    """Return the only file `name` anywhere in `channel`. Raise a DataError if there are several with different bytes."""
    paths = _find_with_origin(job.channel(channel), job.scratch, name)
    if not paths:
        raise MissingInputError(f"no {name} below the channel {channel!r} ({job.channel(channel)})")
    return _only(paths, name, job.channel(channel))


def _only(paths: Mapping[Path, Path], name: str, folder: Path) -> Path:
    """Return the first of `paths`; raise a DataError unless all have the same bytes."""
    if len({sha256(path) for path in paths}) > 1:
        listed = ", ".join(str(shown) for shown in list(paths.values())[:4])
        raise DataError(f"several different {name} below {folder}: {listed}; give the folder of one run")
    return next(iter(paths))


def find_all(folder: Path, scratch: Path, name: str) -> list[Path]:
    """Return all files `name` below a folder, sorted by path."""
    return list(_find_with_origin(folder, scratch, name))


def find_models(folder: Path, scratch: Path) -> list[ModelDir]:
    """Return the fold models below a folder, or the students if there are no fold models. Unpack tarballs to `scratch`.

    Models are sorted by system, seed and fold. Identical copies (a folder and its tarball) count as
    one model. Raise a MissingInputError if there is no model, a DataError if a model is
    not finished or if two models of the same fold differ.
    """
    models = [_read_model(path, shown) for path, shown in _find_with_origin(folder, scratch, MODEL).items()]
    folds = [model for model in models if model.info["role"] == "fold"]
    unique: dict[tuple[Any, ...], ModelDir] = {}
    for model in folds or models:
        _check_finished(model)
        other = unique.setdefault(model.identity, model)
        if len({_digest([m.path / WEIGHTS, m.path / MODEL]) for m in (model, other)}) > 1:
            raise DataError(
                f"{other.display_path} and {model.display_path} are both {model.name}, but differ; remove one of them"
            )
    if not unique:
        raise MissingInputError(f"no model below {folder}: looked for **/{MODEL} and **/model.tar.gz")
    return sorted(unique.values(), key=lambda model: model.identity)


def open_model_dir(folder: Path) -> ModelDir:
    """Return the finished model in a folder that settings name. Errors as in `find_models`."""
    path = folder / MODEL
    if not path.is_file():
        raise MissingInputError(f"{folder} contains no {MODEL}: give the folder of a trained model")
    model = _read_model(path, path)
    _check_finished(model)
    return model


def check_split(models: Sequence[ModelDir], split: Path) -> None:
    """Raise a DataError unless the models were trained on the split at this path."""
    digest = sha256(split)
    for model in models:
        if model.info["split"] != digest:
            raise DataError(f"{model.name} was trained on a different split than {split}")


def find_predictions(folder: Path, scratch: Path) -> dict[str, Path]:
    """Return predictions.parquet, holdout.parquet and ensemble.json of one folder in a predictions channel, by name, at least one.

    A single submission CSV replaces predictions.parquet; `folder` may itself be such a file.
    Raise a MissingInputError if there is neither, a DataError if there are several.
    """
    if folder.suffix in (".parquet", ".csv"):
        return {PREDICTIONS: folder}
    for name in (PREDICTIONS, HOLDOUT, ENSEMBLE):
        if paths := _find_with_origin(folder, scratch, name):
            parent = _only(paths, name, folder).parent
            candidates = {other: parent / other for other in (PREDICTIONS, HOLDOUT, ENSEMBLE)}
            found = {other: path for other, path in candidates.items() if path.is_file()}
            if name == ENSEMBLE and "submission" in read_json(found[ENSEMBLE]):
                raise DataError(
                    f"{parent} has no {PREDICTIONS}, but its {ENSEMBLE} is of test images; run ensemble again"
                )
            return found
    submissions = _submissions_below(folder, scratch, ".csv")
    if not submissions:
        raise MissingInputError(f"no {PREDICTIONS}, {HOLDOUT} or submission CSV below {folder}")
    if len(submissions) > 1:
        listed = ", ".join(str(path) for path in submissions[:4])
        raise DataError(f"several CSVs below {folder}: {listed}; give the path of the submission")
    return {PREDICTIONS: submissions[0]}


def channel_digest(channel: str, folder: Path, scratch: Path, settings: Mapping[str, Any], stage: str = "") -> str:
    """Return the digest of the files that a `stage` with these (flat) settings reads from a channel.

    With split.verify_images=false the split reads tables (a .zip counts as one), and only the names of other files.
    """
    if channel == "model":
        return _digest([model.path / name for model in find_models(folder, scratch) for name in HASHED_FILES["model"]])
    if channel == "predictions":
        return _digest(list(find_predictions(folder, scratch).values()))
    if channel in HASHED_FILES:
        # only `evaluate` reads these two, so they change no other result
        more = (OVERLAP, SPLIT_SUMMARY) if (stage, channel) == ("evaluate", "folds") else ()
        names = HASHED_FILES[channel] + more
        return _digest([path for name in names for path in _find_with_origin(folder, scratch, name)])
    if channel == "runs":
        return tree_sha256(folder, without=(RECORD,), only=COMPARED_FILES)
    # stages that predict test images do not read the ground truth beside them
    ignored = (RECORD, *(f"/{name}" for name in GROUND_TRUTH_NAMES if channel == "eval"))
    tables = (".csv", ".zip", str(settings.get("data.table", "")).lower() or ".csv")
    return tree_sha256(folder, ignored, ("",) if settings.get("split.verify_images", True) else tables)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(f"{path.name}\0{sha256_cached(path)}\n".encode())
    return digest.hexdigest()


def _find_with_origin(folder: Path, scratch: Path, name: str) -> dict[Path, Path]:
    """Return all files `name` below `folder`, each with its path for messages: its own, or that of its tarball."""
    return {
        path: path if origin == root else origin
        for root, origin in search_roots(folder, scratch).items()
        for path in tree_files(root)
        if path.name == name
    }


def _read_model(path: Path, shown: Path) -> ModelDir:
    """Return the model of a `model.json`; raise a DataError unless it describes one. `shown` is its path for messages."""
    info = read_json(path)
    if not isinstance(info, dict) or not all(
        n in info and isinstance(info[n], kind) for n, kind in REQUIRED_KEYS.items()
    ):
        raise DataError(f"{path} does not describe a model: it needs {', '.join(REQUIRED_KEYS)}")
    if info["role"] not in ("fold", "student"):
        raise DataError(f"{path}: role must be fold or student, not {info['role']!r}")
    return ModelDir(path.parent, info, shown)


def _check_finished(model: ModelDir) -> None:
    if not (model.path / RECORD).is_file():
        raise DataError(
            f"{model.display_path}: the model has no {RECORD}, so its training did not finish or the copy is incomplete; "
            "run it again, copy the whole folder, or remove it"
        )
    record = read_json(model.path / RECORD)
    outputs = record.get("outputs") if isinstance(record, dict) else None
    digests = {name.partition("/")[2]: digest for name, digest in (outputs or {}).items()}
    for name in VERIFIED_FILES:
        path = model.path / name
        if name in digests and path.is_file() and sha256_cached(path) != digests[name]:
            raise DataError(
                f"{model.display_path.parent / name} differs from the file that its stage wrote (see {RECORD} beside it): copy the "
                "whole folder again, or run the stage again"
            )


def _unpack(tarball: Path, scratch: Path) -> Path:
    """Unpack `tarball` once per process and return its folder. Raise a DataError if an entry is unsafe or damaged."""
    target = scratch / hashlib.sha256(str(tarball.resolve()).encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    partial = target.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    try:
        with tarfile.open(tarball) as archive:
            _extract(archive, partial)
            # tarfile stops silently at a damaged header, and gzip stores its checksum at the end
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError, DataError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{tarball} cannot be unpacked: {error}") from error
    return partial.rename(target)


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Write the files of an archive to `folder`, without their modes and owners.

    Raise a TarError for links, devices, sparse files, and more bytes than the disk's size or the limit; a DataError for
    paths outside `folder`; a RetryableError if the disk has no space now. `extractall` checks less before Python 3.11.4.
    """
    limit, size = min(MAX_ARCHIVE_BYTES, shutil.disk_usage(folder).total), 0
    for member in archive:
        # a few bytes of a sparse file may represent any size
        if member.issparse() or not (member.isreg() or member.isdir()):
            raise tarfile.ExtractError(f"{member.name!r} is neither a plain file nor a folder")
        size += member.size
        if size > limit:
            raise tarfile.ExtractError(
                f"its files have more than {limit:,} bytes, the limit (or the size of the disk of {folder})"
            )
        check_space(folder, member.size)
        path = join_below(folder, member.name)
        (path if member.isdir() else path.parent).mkdir(parents=True, exist_ok=True)
        content = archive.extractfile(member)
        if content is not None:  # it is None for folders
            with open(path, "wb") as file:
                shutil.copyfileobj(content, file)


NOT_SUBMISSIONS = ("train.csv", "test.csv", FOLDS, OOF, HOLDOUT)
"""Tables in the same folder that are not submissions, besides sample submissions and ground truth."""


def find_submissions(job: StageContext, tables: bool = False) -> list[Path]:
    """Return the submission CSVs of the channel: the file itself, or all below it. Without the channel return none.

    Sample submissions and ground truth do not count. With `tables`, return the .parquet tables of predictions if there
    is no CSV: a run's folder has the same rows in both. Raise MissingInputError if the channel has no such file.
    """
    if job.optional_channel("submissions") is None:
        return []
    for suffix in (".csv", ".parquet")[: 1 + tables]:
        if submissions := _submissions_below(job.channel("submissions"), job.scratch, suffix):
            return submissions
    kind = "CSV or table of predictions" if tables else "CSV"
    raise MissingInputError(f"no {kind} below the channel 'submissions' ({job.channel('submissions')})")


def _submissions_below(folder: Path, scratch: Path, suffix: str) -> list[Path]:
    """Return the tables with this suffix that are neither sample submissions nor ground truth nor in NOT_SUBMISSIONS."""
    files = [path for root in search_roots(folder, scratch) for path in tree_files(root)]
    return [
        path
        for path in files
        if path.suffix.lower() == suffix
        and not (path.name in NOT_SUBMISSIONS or is_sample_submission(path.name) or is_ground_truth(path.name))
    ]
