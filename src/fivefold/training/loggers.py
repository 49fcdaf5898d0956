"""Observers of a training run: the CSV log, the metric line, and experiment trackers by name.

A tracker is opened with a description of the run before the first epoch, observes its epochs, and is closed with the
final scores, or as failed. Its package is imported only if a recipe names it. W&B and MLflow read their destination from
WANDB_MODE, WANDB_API_KEY and MLFLOW_TRACKING_URI.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from fivefold.contract.files import sync
from fivefold.contract.stage_specs import LOG_COLUMNS, LOGGED_METRICS
from fivefold.errors import SettingsError
from fivefold.log import log
from fivefold.lookup import choose, require_packages
from fivefold.training.trainer import Observer

TAGS = {
    "train_loss": "Train/loss",
    "train_acc": "Train/accuracy",
    "lr": "Train/lr",
    "val_loss": "Val/loss",
    "val_acc": "Val/accuracy",
    "val_logloss": "Val/logloss",
    "val_f1_macro": "Val/f1_macro",
}
"""Tags of the metrics of an epoch's row, the same in every tracker."""


@dataclass(frozen=True)
class Run:
    """Description of a run for trackers: `name`, `group`, `project`, flat settings, and a folder for files."""

    name: str
    group: str
    project: str
    settings: Mapping[str, Any]
    folder: Path


class Tracker(Protocol):
    """An observer of epochs that is closed at the end."""

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Log the row of an epoch."""

    def log_image(self, tag: str, path: Path, epoch: int) -> None:
        """Log the image file at `path`, which shows the state after `epoch`."""

    def close(self, scores: Mapping[str, float] | None) -> None:
        """End the run with its final scores, or as failed if they are None."""


def open_trackers(names: Sequence[str], run: Run) -> list[Tracker]:
    """Open the trackers `names`. Raise a SettingsError for an unknown name or a missing package before opening any."""
    chosen = [choose(TRACKERS, "tracker", name) for name in dict.fromkeys(names)]
    for name in names:
        require_packages([name], "trackers", f"train.loggers={name}")
    return [make(run) for make in chosen]


def close_trackers(trackers: Sequence[Tracker], scores: Mapping[str, float] | None) -> None:
    """End each tracker's run with the final scores, or as failed if they are None."""
    for tracker in trackers:
        tracker.close(scores)


def tagged_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that an epoch's row contains, by tag."""
    return {tag: row[name] for name, tag in TAGS.items() if row.get(name) is not None}


def csv_logger(path: Path) -> Observer:
    """Append each epoch to a CSV, so that a killed run keeps its rows. The CSV has no times, so equal runs give equal bytes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(LOG_COLUMNS)

    def observe(row: Mapping[str, Any]) -> None:
        cells = [row["epoch"], *("" if row.get(name) is None else f"{row[name]:.6g}" for name in LOG_COLUMNS[1:])]
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(cells)
            file.flush()
            sync(file.fileno())

    return observe


def stdout_logger(fold: int | None) -> Observer:
    """Print `metric fold=2 epoch=3 train_loss=0.4120 …` with the metrics that a row has; fold None is the student.

    The format is stable: SageMaker parses it with the regular expressions of `requests.py`.
    """
    model = "student" if fold is None else fold

    def observe(row: Mapping[str, Any]) -> None:
        values = " ".join(f"{name}={row[name]:.4f}" for name in LOGGED_METRICS if row.get(name) is not None)
        print(f"metric fold={model} epoch={row['epoch']} {values}", flush=True)

    return observe


class TensorBoard:
    """TensorBoard events in the folder's `tensorboard/`: the settings as text, metrics per epoch, `Final/…` at the end."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()  # else TensorBoard would overlay a restarted run and its predecessor
        self.writer, self.epoch = SummaryWriter(str(folder)), 0
        lines = [f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |" for key, value in run.settings.items()]
        self.writer.add_text("settings", "\n".join(["| key | value |", "|---|---|", *lines]))

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.epoch = row["epoch"]
        for tag, value in tagged_metrics(row).items():
            self.writer.add_scalar(tag, value, self.epoch)
        self.writer.flush()

    def log_image(self, tag: str, path: Path, epoch: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as image:
            width, height = image.size
        # The PNG as it is: add_image would encode its pixels again.
        encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=encoded)]), epoch)

    def close(self, scores: Mapping[str, float] | None) -> None:
        for name, value in (scores or {}).items():
            self.writer.add_scalar(f"Final/{name}", value, self.epoch)
        self.writer.close()


class Wandb:
    """A Weights & Biases run; with WANDB_MODE=offline it writes files for `wandb sync` to the folder's `wandb/`."""

    def __init__(self, run: Run) -> None:
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=run.project,
                group=run.group,
                name=run.name,
                config=dict(run.settings),
                dir=str(run.folder),
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise SettingsError(
                f"train.loggers=wandb: {error}; set WANDB_API_KEY, or WANDB_MODE=offline to upload later"
            ) from error

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.run.log(tagged_metrics(row), step=row["epoch"])

    def log_image(self, tag: str, path: Path, epoch: int) -> None:
        from wandb import Image

        # W&B rejects earlier steps: log the image at the current step, with its epoch in the caption.
        self.run.log({tag: Image(str(path), caption=f"epoch {epoch}")})

    def close(self, scores: Mapping[str, float] | None) -> None:
        self.run.summary.update(scores or {})
        self.run.finish(exit_code=1 if scores is None else 0)


class Mlflow:
    """An MLflow run, at MLFLOW_TRACKING_URI or else in the folder's `mlflow.db`, a SQLite file that `mlflow ui` reads."""

    def __init__(self, run: Run) -> None:
        import mlflow
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        run.folder.mkdir(parents=True, exist_ok=True)
        folder, local = run.folder.absolute(), not mlflow.is_tracking_uri_set()
        try:
            self.client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}" if local else None)
            try:
                artifacts = (folder / "mlartifacts").as_uri() if local else None
                experiment = self.client.create_experiment(run.project, artifacts)
            except MlflowException:  # another fold may have created it
                existing = self.client.get_experiment_by_name(run.project)
                if existing is None:
                    raise
                experiment = existing.experiment_id
            self.id = self.client.create_run(experiment, run_name=run.name, tags={"group": run.group}).info.run_id
            settings = [Param(key, json.dumps(value, ensure_ascii=False)) for key, value in run.settings.items()]
            self.client.log_batch(self.id, params=settings)
        except MlflowException as error:
            raise SettingsError(f"train.loggers=mlflow: {error}; check MLFLOW_TRACKING_URI") from error

    def __call__(self, row: Mapping[str, Any]) -> None:
        for tag, value in tagged_metrics(row).items():
            self.client.log_metric(self.id, tag, value, step=row["epoch"])

    def log_image(self, tag: str, path: Path, epoch: int) -> None:
        self.client.log_artifact(self.id, str(path), f"{tag}/epoch {epoch}")

    def close(self, scores: Mapping[str, float] | None) -> None:
        for name, value in (scores or {}).items():
            self.client.log_metric(self.id, f"Final/{name}", value, step=0)
        self.client.set_terminated(self.id, "FAILED" if scores is None else "FINISHED")


@dataclass
class FaultTolerantTracker:
    """A tracker whose service may fail: the training then continues without it, with one warning."""

    tracker: Tracker
    active: bool = True

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._try(lambda: self.tracker(row))

    def log_image(self, tag: str, path: Path, epoch: int) -> None:
        self._try(lambda: self.tracker.log_image(tag, path, epoch))

    def close(self, scores: Mapping[str, float] | None) -> None:
        self._try(lambda: self.tracker.close(scores))

    def _try(self, call: Callable[[], None]) -> None:
        if not self.active:
            return
        try:
            call()
        except Exception as error:
            self.active = False
            name = type(self.tracker).__name__
            log.warning("%s fails (%s: %s): the training continues without it", name, type(error).__name__, error)


TRACKERS: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda run: FaultTolerantTracker(Wandb(run)),
    "mlflow": lambda run: FaultTolerantTracker(Mlflow(run)),
}
"""Trackers by the name of the package that they need."""
