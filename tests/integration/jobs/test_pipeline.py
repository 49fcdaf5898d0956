"""The five stages on generated images, run by their entrypoint: outputs and rejected inputs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold import predictions
from fivefold.contract.files import read_json, sha256, write_json
from fivefold.contract.job import context_from_env
from fivefold.contract.record import compute_key
from fivefold.contract.stage_specs import STAGES
from toy_data import CLASSES, LEARNS, call_jobs, copy_run, failure, read_cells, run_stage, variables
from wandb_reader import wandb_records


def read_wandb_end(step: Path) -> tuple[list[int], set[str]]:
    """Return the exit codes and the names of the final scores of a step's W&B run."""
    records = wandb_records(step / "output")
    keys = {(i.key or i.nested_key[0]) for r in records if r.HasField("summary") for i in r.summary.update}
    return [record.exit.exit_code for record in records if record.HasField("exit")], keys


def test_fold_writes_a_complete_model_and_its_out_of_fold_rows(toy_run):
    folder = toy_run / "fold-1" / "model"
    info, record = read_json(folder / "model.json"), read_json(folder / "stage.json")
    oof = predictions.read(folder / "oof.parquet")
    assert (info["role"], info["fold"], info["folds"], info["classes"]) == ("fold", 1, 3, sorted(CLASSES))
    assert info["split"] == sha256(toy_run / "split" / "output" / "folds.parquet")
    names = ("model.safetensors", "model.json", "oof.parquet", "holdout.parquet", "train_log.csv")
    assert set(record["outputs"]) == {f"model/{name}" for name in names}
    assert record["metrics"]["images_per_second"] > 0
    assert (len(oof), set(oof.fold), set(oof.labels)) == (27, {1}, set(CLASSES))
    log = (folder / "train_log.csv").read_text().splitlines()
    assert log[0].startswith("epoch,train_loss,train_acc,val_loss,val_acc,val_logloss")
    assert len(log) == 4
    assert (toy_run / "fold-1" / "output" / "training_curves.png").stat().st_size > 5_000


def test_ensemble_is_the_mean_of_its_models_in_the_sample_columns(toy_run):
    output = toy_run / "ensemble" / "output"
    summary = read_json(output / "ensemble.json")
    assert [model["weight"] for model in summary["members"]] == [pytest.approx(1 / 3)] * 3
    assert summary["temperature"] == 1.0  # nine holdout rows are too few to fit one
    # each fold selected its epoch on its out-of-fold rows, none on the holdout
    assert {(score["rows"], score.get("selected_on")) for score in summary["scores"]} == {
        ("out-of-fold", "oof"),
        ("holdout", None),
    }
    rows, sample = read_cells(output / "submission.csv"), read_cells(toy_run / "eval" / "sample_submission.csv")
    assert rows[0] == sample[0]
    assert [row[0] for row in rows] == [row[0] for row in sample]
    holdout = predictions.read(output / "holdout.parquet")
    fold_tables = [predictions.read(toy_run / f"fold-{fold}" / "model" / "holdout.parquet") for fold in range(3)]
    expected = np.mean([np.exp(table.reindex(holdout.ids).log_probs) for table in fold_tables], axis=0)
    np.testing.assert_allclose(np.exp(holdout.log_probs), expected, atol=1e-5)


def test_student_is_leak_free_and_the_ensemble_stage_predicts_with_it(toy_run):
    info = read_json(toy_run / "distill" / "model" / "model.json")
    assert (info["role"], info["leak_free"], info["fold"], info["best"]["epoch"]) == ("student", True, None, 3)
    table = predictions.read(toy_run / "ensemble-student" / "output" / "predictions.parquet")
    assert table.system.endswith("(student)")
    assert len(table) == 18


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_in_a_new_process_with_workers(toy_run, tmp_path):
    result = call_jobs("train-fold", "FOLD=1", *LEARNS, "train.num_workers=1", **variables(toy_run, tmp_path))
    assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "oof.parquet", "holdout.parquet", "train_log.csv"):
        assert (tmp_path / "model" / name).read_bytes() == (toy_run / "fold-1" / "model" / name).read_bytes(), name
    infos = [read_json(folder / "model" / "model.json") for folder in (toy_run / "fold-1", tmp_path)]
    for info in infos:
        info["settings"]["train"].pop("num_workers")
    assert infos[0] == infos[1]


ENDLESS = "train.epochs=1000000"


@pytest.mark.parametrize(
    ("name", "arguments", "channels", "code", "message"),
    [
        ("train-fold", ["FOLD=3"], {}, 64, "FOLD=3 is out of range: the split has the folds 0 to 2"),
        ("train-fold", [], {}, 64, "FOLD=0"),
        ("train-fold", ["FOLD=0", "train.precision=fp16"], {}, 64, "fp16 needs CUDA"),
        ("train-fold", ["FOLD=0", "train.device=cuda"], {}, 64, "no such device"),
        # The channel has no image of the split: the error comes before any image is read.
        ("train-fold", ["FOLD=0", "train.warmup_epochs=3"], {"TRAIN": "eval"}, 64, "train.epochs=3"),
        ("train-fold", ["FOLD=0", "predict.tta=plain,flop", ENDLESS], {}, 64, "did you mean 'flip'"),
        ("train-fold", ["FOLD=0", "train.batch_size=100000000"], {}, 64, "would fit"),
        ("train-fold", ["FOLD=0", "model.weights=absent.pth"], {}, 66, "absent.pth"),
        ("train-fold", ["FOLD=0", "train.lr=1e30", "train.epochs=2"], {}, 65, "not finite"),
        ("distill", ["distill.temperature_decay=0.9", "distill.temperature=1", ENDLESS], {}, 64, "min_temperature=1.0"),
        ("distill", ["distill.teacher=nobody"], {}, 66, "nobody"),
        ("distill", ["distill.teacher_tta=flip,flop", ENDLESS], {}, 64, "did you mean 'flip'"),
        ("ensemble", ["ensemble.submission=../out.csv"], {}, 64, "'../out.csv'"),
        ("ensemble", [], {"MODEL": "eval"}, 66, "no model below"),
        ("ensemble", [], {"MODEL": "fold-1"}, 65, "lacks fold 0, fold 2 of 3"),
    ],
)
def test_bad_input_gives_one_clear_error_and_writes_nothing(
    toy_run, tmp_path, name, arguments, channels, code, message
):
    all_channels = {"MODEL": toy_run} | {channel: toy_run / folder for channel, folder in channels.items()}
    settings = [] if name == "ensemble" else LEARNS
    assert run_stage(toy_run, name, tmp_path, *settings, *arguments, **all_channels) == code
    assert message in failure(tmp_path)
    assert not [path for path in tmp_path.rglob("*.*") if path.name == "stage.json" or path.suffix == ".parquet"]


def test_holdout_scores_an_ensemble_only_if_predicted_with_the_same_views(toy_run, tmp_path):
    views = {
        "same": '["flip", {name = "plain"}]',
        "more": '["plain", "flip", {"name": "rotate", "degrees": 15}, {"name": "shift", "x": 1, "y": 1}]',
        "plain": "plain",
    }
    original, tables = predictions.read(toy_run / "ensemble" / "output" / "predictions.parquet"), {}
    for name, text in views.items():
        assert run_stage(toy_run, "ensemble", tmp_path / name, f"predict.tta={text}", MODEL=toy_run) == 0
        tables[name] = predictions.read(tmp_path / name / "output" / "predictions.parquet").log_probs
        assert (tmp_path / name / "output" / "holdout.parquet").exists() == (name == "same")
        scores = read_json(tmp_path / name / "output" / "ensemble.json")["scores"]
        assert {score["rows"] for score in scores} == {"out-of-fold", *(["holdout"] if name == "same" else [])}
    np.testing.assert_allclose(tables["same"], original.log_probs, atol=1e-5)
    assert np.abs(tables["more"] - original.log_probs).max() > 1e-4


def test_vote_of_folds_and_blending_a_submission_file_with_its_models(toy_run, tmp_path):
    assert run_stage(toy_run, "ensemble", tmp_path / "vote", "ensemble.seed_blend=vote", MODEL=toy_run) == 0
    output = tmp_path / "vote" / "output"
    holdout = predictions.read(output / "holdout.parquet")
    assert read_json(output / "ensemble.json")["scores"][-1]["what"] == "3 models, vote within a system"
    tables = [predictions.read(toy_run / f"fold-{fold}" / "model" / "holdout.parquet") for fold in range(3)]
    votes = sum(np.eye(3)[table.reindex(holdout.ids).log_probs.argmax(axis=1)] for table in tables)
    assert (votes[np.arange(len(holdout)), holdout.log_probs.argmax(axis=1)] == votes.max(axis=1)).all()
    # The mean of the folds, which the stage writes as a file, blends with the fold models under another name.
    (mean,) = (toy_run / "ensemble" / "output" / "csv").glob("output_*.csv")
    assert mean.name == f"output_{holdout.system}.csv"
    renamed = shutil.copy(mean, tmp_path / "output_before.csv")
    arguments = ["ensemble.blend=mean", f"ensemble.submissions={renamed}"]
    assert run_stage(toy_run, "ensemble", tmp_path / "both", *arguments, MODEL=toy_run) == 0
    tables = [
        predictions.read(path / "output/predictions.parquet") for path in (tmp_path / "both", toy_run / "ensemble")
    ]
    np.testing.assert_allclose(np.exp(tables[0].log_probs), np.exp(tables[1].log_probs), atol=1e-6)
    twice = f"ensemble.submissions={mean}"
    assert run_stage(toy_run, "ensemble", tmp_path / "twice", twice, MODEL=toy_run) == 65
    assert "a system of the models" in failure(tmp_path / "twice")


@pytest.mark.parametrize("key", ["model.weights", "distill.teacher", "ensemble.submissions"])
def test_content_of_a_path_in_the_settings_is_part_of_the_stage_key(key, toy_run, tmp_path):
    job, path = context_from_env(STAGES["train-fold"], variables(toy_run, tmp_path), tmp_path), tmp_path / "file"
    keys = set()
    for content in ("a", "b"):
        path.write_text(content)
        keys.add(compute_key(job, {key: [str(path)] if key == "ensemble.submissions" else str(path)}).digest())
    assert len(keys) == 2


WEIGHTS = "model.weights={tmp}/w.pth"


@pytest.mark.parametrize(
    ("name", "arguments", "content", "code"),
    [
        ("train-fold", ["FOLD=0", "data.cache={tmp}/cache", WEIGHTS], None, 66),
        ("train-fold", ["FOLD=0", "data.cache={tmp}/cache", WEIGHTS], b"text", 65),
        ("train-fold", ["FOLD=0", "data.cache={tmp}/cache", WEIGHTS], {"fc.weight": torch.ones(3)}, 64),
        ("distill", ["distill.teacher=ensemble", "distill.model.weights={tmp}/w.pth"], None, 66),
        ("train", [WEIGHTS], None, 66),
    ],
)
def test_unusable_initial_weights_are_reported_before_images_are_read(
    toy_run, tmp_path, name, arguments, content, code
):
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "w.pth")
    (tmp_path / "none").mkdir()  # an empty train channel: reading an image would fail
    channels = {"MODEL": toy_run, "TRAIN": tmp_path / "none"}
    formatted = [text.format(tmp=tmp_path) for text in arguments]
    assert run_stage(toy_run, name, tmp_path / "out", *LEARNS, *formatted, **channels) == code
    assert "w.pth" in failure(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # raised inside the loggers
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_platform_variables_appear_in_no_file_and_no_output_of_a_stage(toy_run, tmp_path, monkeypatch, caplog, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe, secrets = tmp_path / "mine.toml", ("canary-of-all", "canary-of-folds")
    recipe.write_text(
        "[sagemaker]\nenvironment = { API_TOKEN = 'canary-of-all' }\n"
        "[sagemaker.stages.train_fold]\nenvironment = { API_TOKEN = 'canary-of-folds' }\n"
    )
    arguments = [f"recipe={recipe}", *LEARNS, "train.epochs=1", "train.loggers=tensorboard,wandb,mlflow"]
    assert run_stage(toy_run, "train-fold", tmp_path / "fold", "FOLD=0", *arguments) == 0
    diverges = ["FOLD=0", *arguments, "train.epochs=2", "train.lr=1e30"]
    assert run_stage(toy_run, "train-fold", tmp_path / "failed", *diverges) == 65
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != recipe]
    texts = [caplog.text, *capfd.readouterr(), *(path.read_bytes().decode("latin-1") for path in files)]
    assert not [text[:200] for text in texts if any(secret in text for secret in secrets)]
    names = {path.name for path in files}
    assert {"stage.json", "model.json", "failure", "mlflow.db"} <= names
    events = next(path for path in files if path.name.startswith("events."))
    assert b"train.epochs" in events.read_bytes(), "the logger records the settings of the stage"
    logged = EventAccumulator(str(tmp_path / "fold" / "output" / "tensorboard")).Reload()
    assert {"Train/loss", "Train/lr", "Val/accuracy"} <= set(logged.Tags()["scalars"])
    assert [image.step for image in logged.Images("Val/examples")] == [1]
    scores = {"oof_accuracy", "holdout_logloss"}
    for step, code in (("fold", 0), ("failed", 1)):
        codes, summary_keys = read_wandb_end(tmp_path / step)
        assert (codes, scores <= summary_keys) == ([code], code == 0)


def test_defect_car_b5_student_is_not_selected_on_training_images_of_its_teachers(toy_run, tmp_path):
    assert run_stage(toy_run, "split", tmp_path / "split", "split.folds=3") == 0
    folds, arguments = tmp_path / "split" / "output", [*LEARNS, "distill.patience=2"]
    assert run_stage(toy_run, "distill", tmp_path / "bad", *arguments, MODEL=toy_run, FOLDS=folds) == 65
    assert "split than" in failure(tmp_path / "bad")
    for fold in range(3):
        folder = copy_run(toy_run / f"fold-{fold}" / "model", tmp_path / "models" / str(fold))
        info = read_json(folder / "model.json") | {"split": sha256(folds / "folds.parquet")}
        write_json(folder / "model.json", info)
        write_json(folder / "stage.json", {})
    assert run_stage(toy_run, "distill", tmp_path / "bad", *arguments, MODEL=tmp_path / "models", FOLDS=folds) == 64
    assert "needs a holdout" in failure(tmp_path / "bad")


def test_defect_car_convnext_validation_has_no_augmentation_and_every_class(toy_run, tmp_path):
    """The original validated on randomly cropped and flipped images, with a split that was not stratified."""
    crops = 'augment.train=[{"name": "random_resized_crop", "scale": [0.08, 0.1]}]'
    arguments = ["FOLD=0", *LEARNS, "train.epochs=1", "predict.tta=plain", crops]
    assert run_stage(toy_run, "train-fold", tmp_path, *arguments) == 0
    oof = predictions.read(tmp_path / "model" / "oof.parquet")
    true_log_probs = oof.log_probs[np.arange(len(oof)), oof.codes()]
    best = read_json(tmp_path / "model" / "model.json")["best"]
    assert best["logloss"] == pytest.approx(-true_log_probs.astype(float).mean(), rel=1e-5)
    assert np.bincount(oof.codes()).tolist() == [9, 9, 9]


@pytest.mark.parametrize(
    ("teacher", "same_network", "student"),
    [
        ("ensemble", True, ['distill.teacher_tta=[{"name": "scale", "factor": 1.2}]']),
        ("best_fold", False, ['distill.model.backbone_kwargs={"widths": [6], "stem": 4}', "distill.train.lr=0.01"]),
        ("distill", True, ["distill.temperature_decay=0.5"]),
    ],
)
def test_student_of_any_teacher_is_not_leak_free_and_may_have_another_network(
    toy_run, tmp_path, teacher, same_network, student
):
    model = toy_run / teacher / "model"
    arguments = [*LEARNS, "train.epochs=1", f"distill.teacher={model if model.exists() else teacher}", *student]
    assert run_stage(toy_run, "distill", tmp_path / "student", *arguments, MODEL=toy_run) == 0
    info = read_json(tmp_path / "student" / "model" / "model.json")
    fold_info = read_json(toy_run / "fold-0" / "model" / "model.json")
    assert (info["role"], info["leak_free"]) == ("student", False)
    assert (info["settings"]["model"] == fold_info["settings"]["model"]) == same_network
    if not same_network:
        assert run_stage(toy_run, "ensemble", tmp_path / "ensemble", MODEL=tmp_path / "student" / "model") == 0
