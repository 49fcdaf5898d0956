"""The container contract: read SM_* variables, or the folders below /opt/ml, into one frozen job; and what a stage returns.

SageMaker sets no SM_* variables for custom images. Unset variables are therefore filled from
`/opt/ml` (or SAGEMAKER_BASE_DIR); set variables are never overwritten.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivefold.contract.files import check_writable, remove_stale_temp_files
from fivefold.contract.s3.sync import S3Sync
from fivefold.contract.s3.urls import is_url, parse
from fivefold.contract.stage_specs import HOLDOUT, PREDICTIONS, Stage
from fivefold.distributed.ranks import SHARED_SCRATCH, SINGLE_RANK, Rank, rank_from_env
from fivefold.errors import MissingInputError, SettingsError

PREDICTION_FILES = (PREDICTIONS, HOLDOUT)
DIRECTORIES = ("SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR", "SM_CHECKPOINT_DIR", "SM_GROUND_TRUTH_DIR")


@dataclass(frozen=True)
class StageContext:
    """The input and output folders of a stage on this platform."""

    stage: Stage
    channels: Mapping[str, Path]
    model_dir: Path | None
    output_dir: Path | None
    output_data_dir: Path | None
    checkpoint_dir: Path | None
    scratch: Path
    remote: S3Sync = field(default_factory=lambda: S3Sync(Path()))
    """The URLs that some of these paths represent."""
    rank: Rank = SINGLE_RANK
    """The rank of this process. Only rank 0 has outputs and checkpoints."""

    def channel(self, name: str) -> Path:
        """Return the folder (or file) of a required channel; raise a MissingInputError if it is not set or missing."""
        path = self.optional_channel(name)
        if path is None:
            names = ", ".join(sorted(self.channels)) or "none"
            raise MissingInputError(
                f"{self.stage.name} needs the channel {name!r}: set SM_CHANNEL_{name.upper()} to its folder (set: {names})"
            )
        return path

    def optional_channel(self, name: str) -> Path | None:
        """Return the folder of a channel, or None if it is not set. Raise a MissingInputError if it is set but missing.

        The first call fetches a channel at a URL.
        """
        path = self.channels.get(name)
        if path is not None:
            self.remote.fetch(path)
        if path is not None and not path.exists():
            raise MissingInputError(f"channel {name!r}: {path} does not exist; check SM_CHANNEL_{name.upper()}")
        return path

    def output(self) -> Path:
        """Return the folder for data, plots and reports."""
        return self._require(self.output_data_dir, "writes to SM_OUTPUT_DATA_DIR")

    def model(self) -> Path:
        """Return the folder for a trained model and the files of it that later stages need."""
        return self._require(self.model_dir, "writes its model to SM_MODEL_DIR")

    def checkpoints(self) -> Path:
        """Return the folder for the checkpoints that a killed training resumes from."""
        return self._require(self.checkpoint_dir, "keeps checkpoints in SM_CHECKPOINT_DIR, or beside SM_MODEL_DIR")

    def _require(self, folder: Path | None, use: str) -> Path:
        if folder is None:
            raise SettingsError(f"{self.stage.name} {use}, which is not set; set it to a folder")
        return folder

    def record_dir(self) -> Path:
        """Return the folder of stage.json: the model folder if the stage writes a model, else the output folder."""
        return self.model() if self.stage.writes_model else self.output()

    def check_channels(self) -> None:
        """Check that required channels exist and that outputs are writable, before any work."""
        for name in (*self.stage.channels, *self.stage.optional):
            if self.channels.get(name) not in self.remote.channels:
                (self.channel if name in self.stage.channels else self.optional_channel)(name)
        if not self.rank.is_main:
            return
        for folder in {self.record_dir(), self.output()}:
            check_writable(folder)
        if self.stage.writes_model:
            check_writable(self.checkpoints(), "set SM_CHECKPOINT_DIR to another folder")

    def remove_stale_files(self) -> None:
        """Remove temporary files of a killed process from the folders that this stage writes."""
        for folder in {self.record_dir(), self.output(), self.checkpoint_dir}:
            if folder is not None:
                remove_stale_temp_files(folder)


def context_from_env(stage: Stage, environ: Mapping[str, str], scratch: Path) -> StageContext:
    """Return the context of `stage` in this environment: SM_* variables first, then `/opt/ml`.

    `scratch` is a folder for files that this process unpacks and fetches; the caller removes it.
    """
    remote = S3Sync(Path(environ.get(SHARED_SCRATCH) or scratch))
    rank = rank_from_env(environ) if stage.writes_model else SINGLE_RANK
    environ = _resolve_urls(stage, environ, remote, rank.is_main)
    model_dir = _folder(environ, "SM_MODEL_DIR", "model")
    output_data_dir = output_data(environ)
    checkpoints = _folder(environ, "SM_CHECKPOINT_DIR", "checkpoints")
    if checkpoints is None and model_dir is not None:
        checkpoints = model_dir.parent / "checkpoints"
    if stage.output_in_model and output_data_dir is None and model_dir is not None:
        output_data_dir = model_dir / "output"
    channels = channels_from_env(environ)
    if (
        stage.output_channel
        and output_data_dir is not None
        and any((output_data_dir / n).is_file() for n in PREDICTION_FILES)
    ):
        channels.setdefault(stage.output_channel, output_data_dir)
    return StageContext(
        stage=stage,
        channels=channels,
        model_dir=model_dir if rank.is_main else None,
        output_dir=output_dir(environ),
        output_data_dir=output_data_dir if rank.is_main else None,
        checkpoint_dir=checkpoints if rank.is_main else None,
        scratch=scratch,
        remote=remote,
        rank=rank,
    )


def _resolve_urls(stage: Stage, environ: Mapping[str, str], remote: S3Sync, leads: bool) -> dict[str, str]:
    """Return the environment with local paths for the URLs that the stage reads and, if this process `leads`, writes.

    Other URLs become empty. If the model goes to a URL and no variable sets checkpoints, they go beside the model, as in folders.
    """
    urls = {name: value for name, value in environ.items() if is_url(value)}
    if "SM_OUTPUT_DIR" in urls:
        raise SettingsError(
            "SM_OUTPUT_DIR: the platform reads the failure file there, so it must be a folder, not a URL"
        )
    if stage.writes_model and "SM_MODEL_DIR" in urls:
        url = parse(urls["SM_MODEL_DIR"], "SM_MODEL_DIR")
        urls.setdefault("SM_CHECKPOINT_DIR", str(url.parent / "checkpoints"))
    read = {f"SM_CHANNEL_{name.upper()}" for name in (*stage.channels, *stage.optional)}
    written = {"SM_OUTPUT_DATA_DIR", *(("SM_MODEL_DIR", "SM_CHECKPOINT_DIR") if stage.writes_model else ())}
    resolved = dict(environ)
    for name, value in urls.items():
        variable = "SM_CHANNEL_GROUND_TRUTH" if name == "SM_GROUND_TRUTH_DIR" else name.upper().replace("-", "_")
        if variable in read:
            resolved[name] = str(remote.channel(parse(value, name)))
        elif name in written and leads:
            make_folder = remote.checkpoint_folder if name == "SM_CHECKPOINT_DIR" else remote.output
            resolved[name] = str(make_folder(parse(value, name)))
        elif name in DIRECTORIES or name.startswith("SM_CHANNEL_"):
            resolved[name] = ""
    return resolved


def base_dir(environ: Mapping[str, str]) -> Path:
    """Return the root of SageMaker's folders: `/opt/ml`, or SAGEMAKER_BASE_DIR."""
    return Path(environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")


def has_sagemaker_dirs(environ: Mapping[str, str]) -> bool:
    """Return whether the platform has SageMaker's folders: SAGEMAKER_BASE_DIR is set, or `/opt/ml/input` exists."""
    return bool(environ.get("SAGEMAKER_BASE_DIR")) or (base_dir(environ) / "input").is_dir()


def output_dir(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the failure file, or None if the platform has none. A URL counts as none."""
    return None if is_url(environ.get("SM_OUTPUT_DIR", "")) else _folder(environ, "SM_OUTPUT_DIR", "output")


def hyperparameters_from_env(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return `hyperparameters.json`, overlaid by SM_HPS, overlaid by SM_HP_*, with lower-case names and no hyphens.

    An empty SM_HP_* variable counts as not set. The service's own names are ignored.
    """
    path = base_dir(environ) / "input" / "config" / "hyperparameters.json"
    text = path.read_bytes() if path.is_file() else b"{}"
    sources = (
        _json_map(text, str(path)),
        _json_map(environ.get("SM_HPS") or "{}", "SM_HPS"),
        {n[len("SM_HP_") :]: value for n, value in environ.items() if n.upper().startswith("SM_HP_") and value},
    )
    merged = {_canonical_name(name): value for source in sources for name, value in source.items()}
    return {name: value for name, value in merged.items() if not name.startswith(("sagemaker_", "_tuning_"))}


def output_data(environ: Mapping[str, str]) -> Path | None:
    """Return the folder for data, plots and reports, or None if no variable names one."""
    return _folder(environ, "SM_OUTPUT_DATA_DIR", "output/data")


def _folder(environ: Mapping[str, str], variable: str, below_base: str) -> Path | None:
    """Return the folder that `variable` names, or `below_base` in SageMaker's folders if they exist, or None."""
    if environ.get(variable):
        return Path(environ[variable])
    return base_dir(environ) / below_base if has_sagemaker_dirs(environ) else None


def channels_from_env(environ: Mapping[str, str]) -> dict[str, Path]:
    """Return the channels by name: SM_CHANNEL_* first, then SM_GROUND_TRUTH_DIR, then the folders in `input/data`."""
    data = base_dir(environ) / "input" / "data"
    channels = (
        {_canonical_name(path.name): path for path in sorted(data.iterdir()) if path.is_dir()} if data.is_dir() else {}
    )
    if environ.get("SM_GROUND_TRUTH_DIR"):
        channels["ground_truth"] = Path(environ["SM_GROUND_TRUTH_DIR"])
    for name, value in environ.items():
        if name.startswith("SM_CHANNEL_") and value:
            channels[_canonical_name(name.removeprefix("SM_CHANNEL_"))] = Path(value)
    return channels


def _canonical_name(name: str) -> str:
    """Return a name in lower case with `_` for hyphens, since some toolkits keep hyphens and others replace them."""
    return name.lower().replace("-", "_")


def _json_map(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{where} contains {type(value).__name__}, not a map of names to values")
    return value


@dataclass(frozen=True)
class StageResult:
    """The files that must be complete for the stage to count as done, and its figures."""

    outputs: Sequence[Path]
    metrics: Mapping[str, Any] = field(default_factory=dict)
