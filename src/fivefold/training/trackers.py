"""Who watches a training run: its log, and trackers by name, which keep it to compare it with others.

A tracker is opened before the first epoch with what the run is, observes its epochs, and is closed
with the final scores, or as failed. Its package is imported when a recipe names it. Where W&B and
MLflow send to is theirs to know (WANDB_MODE, WANDB_API_KEY, MLFLOW_TRACKING_URI).
"""

import csv
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from fivefold import logline
from fivefold.choose import choose
from fivefold.contract.files import sync
from fivefold.errors import SettingsError
from fivefold.extras import need
from fivefold.logline import LOG_COLUMNS
from fivefold.training.loop import Observer

log = logging.getLogger("fivefold")
TAGS = {
    "train_loss": "Train/loss",
    "train_acc": "Train/accuracy",
    "lr": "Train/lr",
    "val_loss": "Val/loss",
    "val_acc": "Val/accuracy",
    "val_logloss": "Val/logloss",
    "val_f1_macro": "Val/f1_macro",
}
"""What the figures of an epoch's row are called in every tracker."""
MOST_AT_ONCE = 100
"""MLflow takes no more parameters in one call."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run: its `name`, the `group` and `project` it belongs to, flat settings, a folder."""

    name: str
    group: str
    project: str
    settings: Mapping[str, Any]
    folder: Path


class Tracker(Protocol):
    """An observer of epochs that is closed at the end."""

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Takes the row of an epoch."""

    def picture(self, tag: str, path: Path, epoch: int) -> None:
        """Keeps the picture file at `path`, drawn after `epoch`."""

    def close(self, scores: Mapping[str, float] | None) -> None:
        """Ends the run with its final scores; None: it failed."""


def open_trackers(names: Sequence[str], run: Run) -> list[Tracker]:
    """The trackers `names`, opened; a SettingsError for an unknown one, or an absent package, before any is opened."""
    chosen = [choose(TRACKERS, "tracker", name) for name in dict.fromkeys(names)]
    for name in names:
        need([name], "trackers", f"train.trackers={name}")
    return [make(run) for make in chosen]


def close_trackers(trackers: Sequence[Tracker], scores: Mapping[str, float] | None) -> None:
    """Ends each tracker's run with the final scores; None: it failed."""
    for tracker in trackers:
        tracker.close(scores)


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an epoch's row by their tags, those that it has."""
    return {tag: row[name] for name, tag in TAGS.items() if row.get(name) is not None}


def csv_log(path: Path) -> Observer:
    """Appends each epoch to a CSV, so that a killed run keeps what it did; it holds no times, so equal runs give equal bytes."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(LOG_COLUMNS)

    def observe(row: Mapping[str, Any]) -> None:
        cells = [row["epoch"], *("" if row.get(name) is None else f"{row[name]:.6g}" for name in LOG_COLUMNS[1:])]
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(cells)
            file.flush()
            sync(file.fileno())

    return observe


def metric_line(fold: int | None) -> Observer:
    """Prints one stable line an epoch, from which platforms read the metrics."""

    def observe(row: Mapping[str, Any]) -> None:
        print(logline.metric_line(fold, row), flush=True)

    return observe


class TensorBoard:
    """Events in the folder's `tensorboard/`: the settings as a text, the figures of epochs, `Final/…` at the end."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()  # a run that starts over must not be drawn over its predecessor
        self.writer, self.epoch = SummaryWriter(str(folder)), 0
        lines = [f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |" for key, value in run.settings.items()]
        self.writer.add_text("settings", "\n".join(["| key | value |", "|---|---|", *lines]))

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.epoch = row["epoch"]
        for tag, value in figures(row).items():
            self.writer.add_scalar(tag, value, self.epoch)
        self.writer.flush()

    def picture(self, tag: str, path: Path, epoch: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # the file as it is: `add_image` would decode it and write it again
        with Image.open(path) as image:
            size = {"height": image.height, "width": image.width, "colorspace": len(image.getbands())}
        kept = Summary.Image(**size, encoded_image_string=path.read_bytes())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=kept)]), epoch)

    def close(self, scores: Mapping[str, float] | None) -> None:
        for name, value in (scores or {}).items():
            self.writer.add_scalar(f"Final/{name}", value, self.epoch)
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; offline (WANDB_MODE=offline) its files lie in the folder's `wandb/`, for `wandb sync`."""

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
                f"train.trackers=wandb: {error}; set WANDB_API_KEY, or WANDB_MODE=offline to send it later"
            ) from error

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.run.log(figures(row), step=row["epoch"])

    def picture(self, tag: str, path: Path, epoch: int) -> None:
        from wandb import Image

        # W&B takes no step that lies behind: the picture stands at the last one, and says its epoch.
        self.run.log({tag: Image(str(path), caption=f"epoch {epoch}")})

    def close(self, scores: Mapping[str, float] | None) -> None:
        self.run.summary.update(scores or {})
        self.run.finish(exit_code=1 if scores is None else 0)


class Mlflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or else in the folder's `mlflow.db`, a SQLite file that `mlflow ui` reads."""

    def __init__(self, run: Run) -> None:
        import mlflow
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        run.folder.mkdir(parents=True, exist_ok=True)
        folder, own = run.folder.absolute(), not mlflow.is_tracking_uri_set()
        try:
            self.client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}" if own else None)
            experiment = self._experiment(run.project, (folder / "mlartifacts").as_uri() if own else None)
            opened = self.client.create_run(experiment, run_name=run.name, tags={"group": run.group})
            self.id = opened.info.run_id
            settings = [Param(key, json.dumps(value, ensure_ascii=False)) for key, value in run.settings.items()]
            for start in range(0, len(settings), MOST_AT_ONCE):
                self.client.log_batch(self.id, params=settings[start : start + MOST_AT_ONCE])
        except MlflowException as error:
            raise SettingsError(f"train.trackers=mlflow: {error}; check MLFLOW_TRACKING_URI") from error

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """The id of the experiment `name`, whose pictures lie at `artifacts` or where the server wants them; folds that start side by side may all want to make it."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.create_experiment(name, artifacts)
        except MlflowException:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._log(figures(row), row["epoch"])

    def picture(self, tag: str, path: Path, epoch: int) -> None:
        self.client.log_artifact(self.id, str(path), f"{tag}/epoch {epoch}")

    def close(self, scores: Mapping[str, float] | None) -> None:
        self._log({f"Final/{name}": value for name, value in (scores or {}).items()}, 0)
        self.client.set_terminated(self.id, "FAILED" if scores is None else "FINISHED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])


@dataclass
class Outlived:
    """A tracker whose service may go away: the training goes on without it, and says so once."""

    tracker: Tracker
    there: bool = True

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._try(lambda: self.tracker(row))

    def picture(self, tag: str, path: Path, epoch: int) -> None:
        self._try(lambda: self.tracker.picture(tag, path, epoch))

    def close(self, scores: Mapping[str, float] | None) -> None:
        self._try(lambda: self.tracker.close(scores))

    def _try(self, call: Callable[[], None]) -> None:
        if not self.there:
            return
        try:
            call()
        except Exception as error:
            self.there = False
            name = type(self.tracker).__name__
            log.warning("%s fails (%s: %s): the training goes on without it", name, type(error).__name__, error)


TRACKERS: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda run: Outlived(Wandb(run)),
    "mlflow": lambda run: Outlived(Mlflow(run)),
}
"""Trackers by the name of the package that each needs."""
