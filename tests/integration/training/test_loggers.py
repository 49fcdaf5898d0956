"""Each tracker's record of a run, read back with the tracker's own reader; settings rejected before training."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from fivefold.errors import SettingsError
from fivefold.training.loggers import Run, close_trackers, open_trackers
from wandb_reader import wandb_records

ROWS = [
    {"epoch": 1, "train_loss": 0.9, "train_acc": 0.5, "lr": 0.1, "val_logloss": 1.25, "val_acc": 0.5},
    {"epoch": 2, "train_loss": 0.4, "train_acc": 0.75, "lr": 0.05, "val_logloss": 0.5, "val_acc": None},
]
SCORES = {"oof_accuracy": 0.875, "oof_logloss": 0.5}
SETTINGS = {
    "train.epochs": 2,
    "train.lr": 0.1,
    "model.backbone_kwargs": {"widths": [8, 16]},
    "fold": None,
    "system": "빨강",
}
IGNORED_WARNINGS = ("DeprecationWarning", "sqlalchemy.exc.SADeprecationWarning", "ResourceWarning")
"""Warnings that MLflow and W&B cause themselves."""
ignore_library_warnings = pytest.mark.filterwarnings(*(f"ignore::{name}" for name in IGNORED_WARNINGS))


def make_run(folder: Path) -> Run:
    return Run("digits fold 1", "digits", "fivefold", SETTINGS, folder)


def log_run(name: str, folder: Path, scores: dict[str, float] | None = SCORES) -> None:
    (tracker,) = open_trackers([name], make_run(folder))
    for row in ROWS:
        tracker(row)
    path = folder.parent / f"{folder.name}.png"
    Image.new("RGB", (3, 2), (250, 120, 5)).save(path)
    tracker.log_image("Val/examples", path, 1)
    close_trackers([tracker], scores)


def test_tensorboard_records_settings_epochs_and_final_scores(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_run("tensorboard", tmp_path)
    log_run("tensorboard", tmp_path)  # a restarted run replaces the earlier one
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "Train/loss": [(1, 0.9), (2, 0.4)],
        "Train/accuracy": [(1, 0.5), (2, 0.75)],
        "Train/lr": [(1, 0.1), (2, 0.05)],
        "Val/logloss": [(1, 1.25), (2, 0.5)],
        "Val/accuracy": [(1, 0.5)],
        "Final/oof_accuracy": [(2, 0.875)],
        "Final/oof_logloss": [(2, 0.5)],
    }
    (image,) = events.Images("Val/examples")
    pixels = Image.open(io.BytesIO(image.encoded_image_string))
    assert (image.step, pixels.size, pixels.getpixel((0, 0))) == (1, (3, 2), (250, 120, 5))
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '| model.backbone_kwargs | `{"widths": [8, 16]}` |' in text
    assert '| system | `"빨강"` |' in text


@ignore_library_warnings
def test_wandb_records_a_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_run("wandb", tmp_path)
    records = wandb_records(tmp_path)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.display_name) == ("fivefold", "digits", "digits fold 1")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: config[key] for key in SETTINGS} == SETTINGS
    history = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item} for r in records if r.HasField("history")]  # fmt: skip
    assert [(row["_step"], row["Train/loss"], row.get("Val/accuracy")) for row in history] == [(1, 0.9, 0.5), (2, 0.4, None)]  # fmt: skip
    summary = {i.key or i.nested_key[0]: json.loads(i.value_json) for r in records if r.HasField("summary") for i in r.summary.update}  # fmt: skip
    assert {name: summary.get(name) for name in SCORES} == SCORES
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    (image,) = tmp_path.glob("wandb/offline-run-*/files/media/images/Val/*.png")
    assert Image.open(image).getpixel((0, 0)) == (250, 120, 5)


@pytest.mark.slow
@ignore_library_warnings
def test_mlflow_records_runs_locally_and_its_failures_do_not_stop_training(tmp_path, caplog):
    from mlflow import MlflowClient

    log_run("mlflow", tmp_path)
    log_run("mlflow", tmp_path, scores=None)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("fivefold")
    failed, done = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    assert (done.info.run_name, done.info.status, done.data.tags["group"]) == ("digits fold 1", "FINISHED", "digits")
    assert {key: json.loads(value) for key, value in done.data.params.items()} == SETTINGS
    losses = client.get_metric_history(done.info.run_id, "Train/loss")
    assert [(m.step, m.value) for m in losses] == [(1, 0.9), (2, 0.4)]
    assert {name: done.data.metrics[f"Final/{name}"] for name in SCORES} == SCORES
    (image,) = Path(tmp_path / "mlartifacts" / done.info.run_id).glob("artifacts/Val/examples/epoch 1/*.png")
    assert Image.open(image).getpixel((0, 0)) == (250, 120, 5)
    assert failed.info.status == "FAILED"
    assert not [name for name in failed.data.metrics if name.startswith("Final/")]

    (tracker,) = open_trackers(["mlflow"], make_run(tmp_path))
    tracker(ROWS[0])
    client.delete_run(tracker.tracker.id)  # MLflow rejects metrics of a deleted run
    tracker(ROWS[1])
    tracker.close(SCORES)
    assert len([text for text in caplog.messages if text.startswith("Mlflow fails")]) == 1


def test_missing_package_is_reported_only_if_its_tracker_is_selected(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # Python's own mark for a module that cannot be imported
    assert open_trackers([], make_run(tmp_path)) == []
    with pytest.raises(SettingsError, match=r"train.loggers=mlflow needs mlflow, .* 'fivefold\[trackers\]'"):
        open_trackers(["mlflow"], make_run(tmp_path))
    with pytest.raises(SettingsError, match="unknown tracker 'wanda'; did you mean 'wandb'"):
        open_trackers(["tensorboard", "wanda"], make_run(tmp_path))
    assert not list(tmp_path.iterdir())


@ignore_library_warnings
def test_wandb_without_a_key_names_the_setting_to_change(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # else its service keeps the mode of an earlier test
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r"train\.loggers=wandb: .*WANDB_MODE=offline"):
        open_trackers(["wandb"], make_run(tmp_path))
