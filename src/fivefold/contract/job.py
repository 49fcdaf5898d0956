"""The container contract: SM_* variables, or the folders below /opt/ml, as one frozen Job.

SageMaker sets no SM_* variable for an image of one's own, so what is missing is filled from
`/opt/ml` (or SAGEMAKER_BASE_DIR), and what is set is never overwritten.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fivefold.contract.files import probe_writable, remove_abandoned
from fivefold.contract.s3.urls import is_url, parse
from fivefold.contract.stages import HOLDOUT, PREDICTIONS, Stage
from fivefold.contract.storage import Remote
from fivefold.distributed.place import ALONE, SHARED_SCRATCH, Place, place_of
from fivefold.errors import MissingInputError, SettingsError

PREDICTED = (PREDICTIONS, HOLDOUT)
DIRECTORIES = ("SM_MODEL_DIR", "SM_OUTPUT_DATA_DIR", "SM_CHECKPOINT_DIR", "SM_GROUND_TRUTH_DIR")


@dataclass(frozen=True)
class Job:
    """What the platform hands to a stage: its folders of inputs and outputs."""

    stage: Stage
    channels: Mapping[str, Path]
    model_dir: Path | None
    output_dir: Path | None
    output_data_dir: Path | None
    checkpoint_dir: Path | None
    scratch: Path
    remote: Remote = field(default_factory=lambda: Remote(Path()))
    """Which of these paths stand for URLs."""
    place: Place = ALONE
    """Of several processes that train together the first alone has outputs and checkpoints."""

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
        """The folder of a channel, or None where it is not given; given but absent is an error.

        One that lies at a URL is fetched when it is first asked for.
        """
        path = self.channels.get(name)
        if path is not None:
            self.remote.fetch(path)
        if path is not None and not path.exists():
            raise MissingInputError(f"channel {name!r}: {path} does not exist; check SM_CHANNEL_{name.upper()}")
        return path

    def output(self) -> Path:
        """The folder for data and for what people look at."""
        return self._given(self.output_data_dir, "writes to SM_OUTPUT_DATA_DIR")

    def model(self) -> Path:
        """The folder for a trained model and all that a later stage needs of it."""
        return self._given(self.model_dir, "writes its model to SM_MODEL_DIR")

    def checkpoints(self) -> Path:
        """The folder for what a killed training goes on from."""
        return self._given(self.checkpoint_dir, "keeps checkpoints in SM_CHECKPOINT_DIR, or beside SM_MODEL_DIR")

    def _given(self, folder: Path | None, use: str) -> Path:
        if folder is None:
            raise SettingsError(f"{self.stage.name} {use}, which is not set; give it a folder")
        return folder

    def of_key(self, digest: str) -> "Job":
        """This job with a folder of checkpoints for what `digest` stands for: its settings, data and classes alone."""
        return replace(self, checkpoint_dir=self.checkpoints() / digest[:16])

    def record_dir(self) -> Path:
        """Where stage.json goes: the model's folder if the stage has one, else the output's."""
        return self.model() if self.stage.writes_model else self.output()

    def probe(self) -> None:
        """Checks that required channels exist and that outputs can be written, before any work."""
        for name in (*self.stage.channels, *self.stage.optional):
            if self.channels.get(name) not in self.remote.channels:
                (self.channel if name in self.stage.channels else self.optional_channel)(name)
        if not self.place.leads:
            return
        for folder in {self.record_dir(), self.output()}:
            probe_writable(folder)
        if self.stage.writes_model:
            probe_writable(self.checkpoints(), "set SM_CHECKPOINT_DIR to another folder")

    def clean(self) -> None:
        """Removes what a killed process may have left in the folders that this stage writes."""
        for folder in {self.record_dir(), self.output(), self.checkpoint_dir}:
            if folder is not None:
                remove_abandoned(folder)


def job_from(stage: Stage, environ: Mapping[str, str], scratch: Path) -> Job:
    """The Job of `stage` in this environment: SM_* variables first, then `/opt/ml`.

    `scratch` is a folder of this process, for what it unpacks and fetches; the caller removes it.
    """
    remote = Remote(Path(environ.get(SHARED_SCRATCH) or scratch))
    place = place_of(environ) if stage.writes_model else ALONE
    environ = _localised(stage, environ, remote, place.leads)
    model_dir = _folder(environ, "SM_MODEL_DIR", "model")
    output_data_dir = output_data(environ)
    checkpoints = _folder(environ, "SM_CHECKPOINT_DIR", "checkpoints")
    if checkpoints is None and model_dir is not None:
        checkpoints = model_dir.parent / "checkpoints"
    if stage.output_in_model and output_data_dir is None and model_dir is not None:
        output_data_dir = model_dir / "output"
    channels = given_channels(environ)
    if stage.from_output and output_data_dir is not None and any((output_data_dir / n).is_file() for n in PREDICTED):
        channels.setdefault(stage.from_output, output_data_dir)
    return Job(
        stage=stage,
        channels=channels,
        model_dir=model_dir if place.leads else None,
        output_dir=output_dir(environ),
        output_data_dir=output_data_dir if place.leads else None,
        checkpoint_dir=checkpoints if place.leads else None,
        scratch=scratch,
        remote=remote,
        place=place,
    )


def _localised(stage: Stage, environ: Mapping[str, str], remote: Remote, leads: bool) -> dict[str, str]:
    """The environment with a path for each URL that the stage reads or, where this process `leads`, writes; of others none.

    Where the model goes to a URL and nothing is said of checkpoints, those lie beside it, as they do in folders.
    """
    given = {name: value for name, value in environ.items() if is_url(value)}
    if "SM_OUTPUT_DIR" in given:
        raise SettingsError("SM_OUTPUT_DIR is where the platform looks for the failure file: give it a folder, no URL")
    if stage.writes_model and "SM_MODEL_DIR" in given:
        url = parse(given["SM_MODEL_DIR"], "SM_MODEL_DIR")
        given.setdefault("SM_CHECKPOINT_DIR", str(url.parent / "checkpoints"))
    read = {f"SM_CHANNEL_{name.upper()}" for name in (*stage.channels, *stage.optional)}
    written = {"SM_OUTPUT_DATA_DIR", *(("SM_MODEL_DIR", "SM_CHECKPOINT_DIR") if stage.writes_model else ())}
    found = dict(environ)
    for name, value in given.items():
        variable = "SM_CHANNEL_GROUND_TRUTH" if name == "SM_GROUND_TRUTH_DIR" else name.upper().replace("-", "_")
        if variable in read:
            found[name] = str(remote.channel(parse(value, name)))
        elif name == "SM_CHECKPOINT_DIR" and leads and name in written:
            found[name] = str(remote.keep_checkpoints(parse(value, name)))
        elif name in written and leads:
            found[name] = str(remote.output(parse(value, name)))
        elif name in DIRECTORIES or name.startswith("SM_CHANNEL_"):
            found[name] = ""
    return found


def base_dir(environ: Mapping[str, str]) -> Path:
    """The root of SageMaker's folders: `/opt/ml`, or SAGEMAKER_BASE_DIR."""
    return Path(environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")


def has_base(environ: Mapping[str, str]) -> bool:
    """Whether the platform has folders there: SAGEMAKER_BASE_DIR is set, or `/opt/ml/input` is."""
    return bool(environ.get("SAGEMAKER_BASE_DIR")) or (base_dir(environ) / "input").is_dir()


def output_dir(environ: Mapping[str, str]) -> Path | None:
    """Where the failure file goes, or None where the platform names no such folder; a URL is none."""
    return None if is_url(environ.get("SM_OUTPUT_DIR", "")) else _folder(environ, "SM_OUTPUT_DIR", "output")


def hyperparameters(environ: Mapping[str, str]) -> dict[str, Any]:
    """`hyperparameters.json`, overlaid by SM_HPS, overlaid by SM_HP_*, with lower-case names and no hyphens.

    An empty SM_HP_* variable counts as one that is not set. The service's own names are left out.
    """
    path = base_dir(environ) / "input" / "config" / "hyperparameters.json"
    text = path.read_bytes() if path.is_file() else b"{}"
    sources = (
        _json_map(text, str(path)),
        _json_map(environ.get("SM_HPS") or "{}", "SM_HPS"),
        {n[len("SM_HP_") :]: value for n, value in environ.items() if n.upper().startswith("SM_HP_") and value},
    )
    found = {_plain(name): value for source in sources for name, value in source.items()}
    return {name: value for name, value in found.items() if not name.startswith(("sagemaker_", "_tuning_"))}


def output_data(environ: Mapping[str, str]) -> Path | None:
    """Where data and what people look at go, or None where nothing names a folder for it."""
    return _folder(environ, "SM_OUTPUT_DATA_DIR", "output/data")


def _folder(environ: Mapping[str, str], variable: str, below_base: str) -> Path | None:
    """The folder that `variable` names, or its place below the base where there is one."""
    if environ.get(variable):
        return Path(environ[variable])
    return base_dir(environ) / below_base if has_base(environ) else None


def given_channels(environ: Mapping[str, str]) -> dict[str, Path]:
    """Each channel by its name: SM_CHANNEL_*, SM_GROUND_TRUTH_DIR, then what lies in `input/data`."""
    base = base_dir(environ)
    config = base / "input" / "config" / "inputdataconfig.json"
    modes = _json_map(config.read_bytes(), str(config)) if config.is_file() else {}
    for name, entry in modes.items():
        if isinstance(entry, dict) and entry.get("TrainingInputMode") == "Pipe":
            raise SettingsError(f"channel {name!r} uses Pipe mode, which has no random access; use File or FastFile")
    data = base / "input" / "data"
    found = {_plain(path.name): path for path in sorted(data.iterdir()) if path.is_dir()} if data.is_dir() else {}
    if environ.get("SM_GROUND_TRUTH_DIR"):
        found["ground_truth"] = Path(environ["SM_GROUND_TRUTH_DIR"])
    for name, value in environ.items():
        if name.startswith("SM_CHANNEL_") and value:
            found[_plain(name.removeprefix("SM_CHANNEL_"))] = Path(value)
    return found


def _plain(name: str) -> str:
    """A name as ours are: lower case, and `_` for the hyphens that one toolkit keeps and another replaces."""
    return name.lower().replace("-", "_")


def _json_map(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{where} holds {type(value).__name__}, not a map of names to values")
    return value
