"""The container contract: SM_* variables, or the folders below /opt/ml, as one frozen Job.

SageMaker sets no SM_* variable for an image of one's own, so what is missing is filled from
`/opt/ml` (or SAGEMAKER_BASE_DIR), and what is set is never overwritten.
"""

import contextlib
import json
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.contract.files import probe_writable, write_text
from fivefold.contract.stages import FAILURE, HOLDOUT, PREDICTIONS, Stage
from fivefold.errors import FivefoldError, MissingInputError, SettingsError

FAILURE_CHARACTERS = 1024
"""SageMaker shows this much of the failure file, so the message comes first."""
PREDICTED = (PREDICTIONS, HOLDOUT)


@dataclass(frozen=True)
class Job:
    """What the platform hands to a stage: folders of inputs and outputs, and hyperparameters."""

    stage: Stage
    channels: Mapping[str, Path]
    model_dir: Path | None
    output_dir: Path | None
    output_data_dir: Path | None
    checkpoint_dir: Path | None
    hyperparameters: Mapping[str, Any]
    scratch: Path

    def channel(self, name: str) -> Path:
        """The folder (or file) of a channel that must be there."""
        path = self.optional_channel(name)
        if path is None:
            given = ", ".join(sorted(self.channels)) or "none"
            raise MissingInputError(
                f"{self.stage.name} needs the channel {name!r}: set SM_CHANNEL_{name.upper()} to its folder (given: {given})"
            )
        return path

    def optional_channel(self, name: str) -> Path | None:
        """The folder of a channel, or None where it is not given; given but absent is an error."""
        path = self.channels.get(name)
        if path is not None and not path.exists():
            raise MissingInputError(f"channel {name!r}: {path} does not exist; check SM_CHANNEL_{name.upper()}")
        return path

    def output(self) -> Path:
        """The folder for data and for what people look at."""
        if self.output_data_dir is None:
            raise MissingInputError(f"{self.stage.name} writes to SM_OUTPUT_DATA_DIR, which is not set")
        return self.output_data_dir

    def model(self) -> Path:
        """The folder for a trained model and all that a later stage needs of it."""
        if self.model_dir is None:
            raise MissingInputError(f"{self.stage.name} writes its model to SM_MODEL_DIR, which is not set")
        return self.model_dir

    def record_dir(self) -> Path:
        """Where stage.json goes: the model's folder if the stage has one, else the output's."""
        return self.model() if self.stage.writes_model else self.output()

    def probe(self) -> None:
        """Checks that required channels exist and that outputs can be written, before any work."""
        for name in self.stage.channels:
            self.channel(name)
        for name in self.stage.optional:
            self.optional_channel(name)
        folders = [self.record_dir(), self.output_data_dir]
        for folder in {folder for folder in folders if folder is not None}:
            probe_writable(folder)


def job_from(stage: Stage, environ: Mapping[str, str], scratch: Path) -> Job:
    """The Job of `stage` in this environment: SM_* variables first, then `/opt/ml`.

    `scratch` is a folder of this process, for what it unpacks; the caller removes it.
    """
    base = Path(environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")
    has_base = (base / "input").is_dir() or "SAGEMAKER_BASE_DIR" in environ

    def folder(variable: str, default: Path) -> Path | None:
        value = environ.get(variable)
        return Path(value) if value else (default if has_base else None)

    output_dir = folder("SM_OUTPUT_DIR", base / "output")
    model_dir = folder("SM_MODEL_DIR", base / "model")
    checkpoints = folder("SM_CHECKPOINT_DIR", base / "checkpoints")
    if checkpoints is None and model_dir is not None:
        checkpoints = model_dir.parent / "checkpoints"
    output_data_dir = folder("SM_OUTPUT_DATA_DIR", base / "output" / "data")
    channels = _channels(environ, base)
    if stage.from_output and output_data_dir is not None and any((output_data_dir / n).is_file() for n in PREDICTED):
        channels.setdefault(stage.from_output, output_data_dir)
    return Job(
        stage=stage,
        channels=channels,
        model_dir=model_dir,
        output_dir=output_dir,
        output_data_dir=output_data_dir,
        checkpoint_dir=checkpoints,
        hyperparameters=hyperparameters(environ, base),
        scratch=scratch,
    )


def hyperparameters(environ: Mapping[str, str], base: Path) -> dict[str, Any]:
    """`hyperparameters.json`, overlaid by SM_HPS, overlaid by SM_HP_*; hyphens become underscores."""
    path = base / "input" / "config" / "hyperparameters.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    found = _json_map(text, str(path)) | _json_map(environ.get("SM_HPS") or "{}", "SM_HPS")
    for name, value in environ.items():
        if name.upper().startswith("SM_HP_"):
            found[name[len("SM_HP_") :].lower()] = value
    service_keys = ("sagemaker_", "_tuning_")
    return {k.replace("-", "_"): v for k, v in found.items() if not k.startswith(service_keys)}


def report_failure(output_dir: Path | None, error: BaseException) -> None:
    """Writes the failure file: the message first, the traceback after."""
    if output_dir is None:
        return
    message = str(error) if isinstance(error, FivefoldError) else f"{type(error).__name__}: {error}"
    # The folder itself may be what failed; the message is on stderr in any case.
    with contextlib.suppress(OSError):
        trace = "".join(traceback.format_exception(error))
        write_text(output_dir / FAILURE, f"{message[:FAILURE_CHARACTERS]}\n\n{trace}")


def _channels(environ: Mapping[str, str], base: Path) -> dict[str, Path]:
    config = base / "input" / "config" / "inputdataconfig.json"
    modes = _json_map(config.read_text(encoding="utf-8"), str(config)) if config.is_file() else {}
    for name, entry in modes.items():
        if isinstance(entry, dict) and entry.get("TrainingInputMode") == "Pipe":
            raise SettingsError(f"channel {name!r} uses Pipe mode, which has no random access; use File or FastFile")
    data = base / "input" / "data"
    found = {path.name.lower(): path for path in sorted(data.iterdir()) if path.is_dir()} if data.is_dir() else {}
    for name, value in environ.items():
        if name.startswith("SM_CHANNEL_") and value:
            found[name.removeprefix("SM_CHANNEL_").lower()] = Path(value)
    if environ.get("SM_GROUND_TRUTH_DIR"):
        found.setdefault("ground_truth", Path(os.fspath(environ["SM_GROUND_TRUTH_DIR"])))
    return found


def _json_map(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{where} holds {type(value).__name__}, not a map of names to values")
    return value
