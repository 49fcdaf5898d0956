"""The five stages over drawn images, by their entrypoint; what each leaves behind and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fivefold import predictions
from fivefold.contract.files import sha256
from jobs.__main__ import run
from reading import wandb_records

CLASSES = ("fold", "id", "빨강 차")
SETTINGS = [
    "model.backbone=fivefold/small_net", 'model.options={"widths": [8, 16], "stem": 8}', "model.image_size=12", "train.epochs=3",
    "train.batch_size=16", "train.lr=0.02", "train.ema_decay=0.9", "train.precision=fp32",
    'augment.train=["random_crop", "horizontal_flip"]', "augment.mix=cutmix", "predict.views=plain,flip",
]  # fmt: skip


def draw(path: Path, code: int, random: np.random.Generator) -> None:
    """An image of one class: noise, with the class's own channel brighter."""
    pixels = random.integers(0, 120, (12, 12, 3))
    pixels[..., code] += 100
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Train and test images, and the split, three folds, student and ensembles made of them."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for code, name in enumerate(CLASSES):
        for number in range(30):
            draw(root / "train" / name / f"{number}.png", code, random)
        for number in range(6):
            draw(root / "eval" / "test" / f"T{code}{number}.png", code, random)
    names = sorted(path.stem for path in (root / "eval" / "test").iterdir())
    rows = "".join(f"{name},test/{name}.png\n" for name in names)
    (root / "eval" / "test.csv").write_text(f"ID,img_path\n{rows}")
    truth = "".join(f"{name},{CLASSES[int(name[1])]}\n" for name in names)
    (root / "gt.csv").write_text(f"ID,label\n{truth}")
    sample = f"ID,{','.join(reversed(CLASSES))}\n" + "".join(f"{name},0,0,0\n" for name in reversed(names))
    (root / "eval" / "sample_submission.csv").write_text(sample, encoding="utf-8-sig")
    assert stage(root, "split", "split", "split.folds=3", "split.holdout=0.1") == 0
    for fold in range(3):
        assert stage(root, "train-fold", f"fold-{fold}", f"FOLD={fold}", *SETTINGS) == 0
    assert stage(root, "ensemble", "ensemble", SM_CHANNEL_MODEL=str(root)) == 0
    assert stage(root, "distill", "distill", *SETTINGS, SM_CHANNEL_MODEL=str(root)) == 0
    return root


def stage(root: Path, name: str, folder: str, *arguments: str, **environment: str) -> int:
    """Runs a stage as its container would, with the contract's variables alone; its exit code."""
    return run(name, arguments, {**variables(root, folder), **environment})


def variables(root: Path, folder: str) -> dict[str, str]:
    return {
        "SM_CHANNEL_TRAIN": str(root / "train"),
        "SM_CHANNEL_FOLDS": str(root / "split" / "output"),
        "SM_CHANNEL_EVAL": str(root / "eval"),
        "SM_MODEL_DIR": str(root / folder / "model"),
        "SM_OUTPUT_DATA_DIR": str(root / folder / "output"),
        "SM_OUTPUT_DIR": str(root / folder),
    }


def test_a_fold_leaves_a_model_that_can_be_rebuilt_and_its_out_of_fold_rows(world):
    folder = world / "fold-1" / "model"
    info = json.loads((folder / "model.json").read_text())
    record = json.loads((folder / "stage.json").read_text())
    oof = predictions.read(folder / "oof.parquet")
    assert (info["role"], info["fold"], info["folds"], info["classes"]) == ("fold", 1, 3, sorted(CLASSES))
    assert info["split"] == sha256(world / "split" / "output" / "folds.parquet")
    assert set(record["outputs"]) == {
        f"model/{name}"
        for name in ("model.safetensors", "model.json", "oof.parquet", "holdout.parquet", "train_log.csv")
    }
    assert record["metrics"]["images_per_second"] > 0
    assert len(oof) == 27
    assert set(oof.fold) == {1}
    assert set(oof.labels) == set(CLASSES)
    log = (folder / "train_log.csv").read_text().splitlines()
    assert log[0].startswith("epoch,train_loss,train_acc,val_loss,val_acc,val_logloss")
    assert len(log) == 4
    assert (world / "fold-1" / "output" / "training_curves.png").stat().st_size > 5_000
    assert list((world / "fold-1" / "output" / "tensorboard").glob("events.*"))


def test_the_folds_together_predict_each_row_once_and_learn_something(world):
    tables = [predictions.read(world / f"fold-{fold}" / "model" / "oof.parquet") for fold in range(3)]
    ids = [name for table in tables for name in table.ids]
    assert len(ids) == len(set(ids)) == 81
    hits = [table.log_probs.argmax(axis=1) == table.codes() for table in tables]
    assert np.concatenate(hits).mean() > 0.8


def test_the_ensemble_is_the_mean_of_its_members_in_the_samples_columns(world):
    output = world / "ensemble" / "output"
    facts = json.loads((output / "ensemble.json").read_text())
    assert [member["weight"] for member in facts["members"]] == [pytest.approx(1 / 3)] * 3
    assert facts["temperature"] == 1.0  # nine holdout rows are too few to fit one
    assert {score["rows"] for score in facts["scores"]} == {"out-of-fold", "holdout"}
    lines = (output / "submission.csv").read_text(encoding="utf-8-sig").splitlines()
    sample = (world / "eval" / "sample_submission.csv").read_text(encoding="utf-8-sig").splitlines()
    assert lines[0] == sample[0]
    assert [line.split(",")[0] for line in lines] == [line.split(",")[0] for line in sample]
    held = predictions.read(output / "holdout.parquet")
    members = [predictions.read(world / f"fold-{fold}" / "model" / "holdout.parquet") for fold in range(3)]
    expected = np.mean([np.exp(member.in_order(held.ids).log_probs) for member in members], axis=0)
    np.testing.assert_allclose(np.exp(held.log_probs), expected, atol=1e-5)


def test_the_student_is_leak_free_and_is_predicted_by_the_same_stage(world):
    info = json.loads((world / "distill" / "model" / "model.json").read_text())
    assert (info["role"], info["leak_free"], info["fold"]) == ("student", True, None)
    assert info["best"]["epoch"] == 3
    code = stage(world, "ensemble", "ensemble-student", SM_CHANNEL_MODEL=str(world / "distill" / "model"))
    assert code == 0
    found = predictions.read(world / "ensemble-student" / "output" / "predictions.parquet")
    assert found.system.endswith("(student)")
    assert len(found) == 18


def test_evaluation_reports_on_test_holdout_and_out_of_fold_rows(world):
    given = {"SM_CHANNEL_PREDICTIONS": str(world / "ensemble" / "output"), "SM_CHANNEL_MODEL": str(world)}
    assert stage(world, "evaluate", "evaluate", **given, SM_CHANNEL_GROUND_TRUTH=str(world / "gt.csv")) == 0
    metrics = json.loads((world / "evaluate" / "output" / "metrics.json").read_text())
    assert metrics["test"]["n"] == 18
    assert metrics["test"]["accuracy"] > 0.8
    assert (world / "evaluate" / "output" / "report.html").stat().st_size > 20_000


def test_a_stage_with_a_matching_record_is_skipped_and_says_so(world, caplog):
    before = (world / "fold-0" / "model" / "stage.json").read_bytes()
    with caplog.at_level("INFO", "fivefold"):
        assert stage(world, "train-fold", "fold-0", "FOLD=0", *SETTINGS, "train.workers=1") == 0
    assert (world / "fold-0" / "model" / "stage.json").read_bytes() == before


def test_the_same_seed_gives_the_same_bytes_in_a_fresh_process_and_with_workers(world, tmp_path):
    shutil.copytree(world / "split", tmp_path / "split")
    environment = {**os.environ, **variables(tmp_path, "again"), "SM_CHANNEL_TRAIN": str(world / "train")}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")} if "OMP_NUM_THREADS" in os.environ else {}
    command = [sys.executable, "-m", "jobs", "train-fold", "FOLD=1", *SETTINGS, "train.workers=1"]
    subprocess.run(command, env={**environment, **threads}, check=True, capture_output=True, timeout=120)
    for name in ("model.safetensors", "model.json", "oof.parquet", "holdout.parquet", "train_log.csv"):
        original, again = world / "fold-1" / "model" / name, tmp_path / "again" / "model" / name
        if name == "model.json":
            first, second = (json.loads(path.read_text()) for path in (original, again))
            for info in (first, second):
                info["settings"]["train"].pop("workers")
            assert first == second
        else:
            assert original.read_bytes() == again.read_bytes(), name


def test_other_teachers_are_recorded_as_not_leak_free(world):
    for teacher in ("best_fold", "ensemble", str(world / "fold-2" / "model")):
        folder = f"distill-{Path(teacher).name}"
        arguments = [
            *SETTINGS,
            "train.epochs=1",
            f"distill.teacher={teacher}",
            'distill.views=[{"name": "scale", "factor": 1.2}]',
        ]
        assert stage(world, "distill", f"elsewhere/{folder}", *arguments, SM_CHANNEL_MODEL=str(world)) == 0
        info = json.loads((world / "elsewhere" / folder / "model" / "model.json").read_text())
        assert info["leak_free"] is False
        assert "fold" in info["teacher"]
    shutil.rmtree(world / "elsewhere")


def test_the_whole_ensemble_may_teach_images_that_no_fold_saw(world):
    arguments = [*SETTINGS, "train.epochs=1", "distill.views=flip"]
    given = {"SM_CHANNEL_MODEL": str(world), "SM_CHANNEL_UNLABELED": str(world / "eval" / "test")}
    assert stage(world, "distill", "elsewhere/unlabeled", *arguments, **given) == 0
    info = json.loads((world / "elsewhere" / "unlabeled" / "model" / "model.json").read_text())
    assert (info["unlabeled"], info["leak_free"]) == (18, True)
    given["SM_CHANNEL_UNLABELED"] = str(world / "train")
    assert stage(world, "distill", "elsewhere/overlap", *arguments, **given) == 0
    info = json.loads((world / "elsewhere" / "overlap" / "model" / "model.json").read_text())
    assert info["unlabeled"] == 0  # all of them are files of the split
    shutil.rmtree(world / "elsewhere")


@pytest.mark.parametrize(
    ("name", "arguments", "environment", "code", "message"),
    [
        ("train-fold", ["FOLD=3"], {}, 64, "FOLD=3 is out of range: the split has the folds 0 to 2"),
        ("train-fold", [], {}, 64, "which fold?"),
        ("train-fold", ["FOLD=two"], {}, 64, "fold"),
        ("train-fold", ["FOLD=0", "train.precision=fp16"], {}, 64, "fp16 needs CUDA"),
        ("train-fold", ["FOLD=0", "train.device=cuda"], {}, 64, "no such device"),
        (
            "train-fold",
            ["FOLD=0", "train.device=cpu:3"],
            {},
            64,
            "train.device=cpu:3, but this machine has cpu:0 to cpu:0",
        ),
        (
            "train-fold",
            ["FOLD=0", "train.device=cpu:first"],
            {},
            64,
            "train.device=cpu:first, but this machine has cpu:0",
        ),
        ("train-fold", ["FOLD=0", "train.monitor=auc"], {}, 64, "unknown monitor 'auc'"),
        (
            "train-fold",
            ["FOLD=0", "train.warmup_epochs=3"],
            {"SM_CHANNEL_TRAIN": "eval"},  # no image of the split is there: it is told before any is read
            64,
            "train.warmup_epochs=3 leaves nothing of train.epochs=3: give more epochs, or a shorter warm-up",
        ),
        ("train-fold", ["FOLD=0", "predict.views=plain,flop", "train.epochs=1000000"], {}, 64, "did you mean 'flip'"),
        ("train-fold", ["FOLD=0", "train.monitor=auc", "train.epochs=1000000"], {}, 64, "unknown monitor 'auc'"),
        ("train-fold", ["FOLD=0", "train.trackers=wanda", "train.epochs=1000000"], {}, 64, "did you mean 'wandb'"),
        ("ensemble", ["ensemble.submission=../out.csv"], {}, 64, "not the name of a file"),
        ("train-fold", ["FOLD=0", "train.batch_size=100000000"], {}, 64, "would fit"),
        ("train-fold", ["FOLD=0", "model.weights=absent.pth"], {}, 66, "absent.pth"),
        ("train-fold", ["FOLD=0", "train.lr=1e30", "train.epochs=2"], {}, 65, "not finite"),
        ("distill", ["distill.teacher=nobody"], {}, 66, "nobody"),
        ("ensemble", ["predict.views=plain,flop"], {}, 64, "did you mean 'flip'"),
        ("ensemble", ["predict.views=[]"], {}, 64, "views is empty"),
        (
            "train-fold",
            ["FOLD=0", 'predict.views=[{"name":"rotate","degree":3}]', "train.epochs=1000000"],
            {},
            64,
            "degrees",
        ),
        ("distill", ["distill.views=flip,flop", "train.epochs=1000000"], {}, 64, "did you mean 'flip'"),
        ("ensemble", [], {"SM_CHANNEL_MODEL": "eval"}, 66, "no model below the channel"),
        ("ensemble", [], {"SM_CHANNEL_MODEL": "fold-1"}, 65, "lacks fold 0, fold 2 of 3"),
    ],
)
def test_bad_input_gets_one_clear_error_and_leaves_nothing(
    world, tmp_path, name, arguments, environment, code, message
):
    folder = f"bad-{tmp_path.name}"
    given = {"SM_CHANNEL_MODEL": str(world), **{key: str(world / value) for key, value in environment.items()}}
    settings = [] if name == "ensemble" else SETTINGS
    assert stage(world, name, folder, *settings, *arguments, **given) == code
    failure = (world / folder / "failure").read_text()
    assert message in failure[:1024]
    assert not list((world / folder).rglob("stage.json"))
    assert not list((world / folder).rglob("*.parquet"))
    shutil.rmtree(world / folder)


def test_views_that_are_written_otherwise_are_the_same_views_and_others_take_parameters(world):
    given = {"SM_CHANNEL_MODEL": str(world)}
    same = 'predict.views=["flip", {name = "plain"}]'
    more = 'predict.views=["plain", "flip", {"name": "rotate", "degrees": 15}, {"name": "shift", "x": 1, "y": 1}]'
    assert stage(world, "ensemble", "elsewhere/same", same, **given) == 0
    assert stage(world, "ensemble", "elsewhere/more", more, **given) == 0
    assert (world / "elsewhere" / "same" / "output" / "holdout.parquet").exists()
    assert not (world / "elsewhere" / "more" / "output" / "holdout.parquet").exists()
    paths = [
        world / name / "output" / "predictions.parquet" for name in ("ensemble", "elsewhere/same", "elsewhere/more")
    ]
    own, turned, wider = (predictions.read(path).log_probs for path in paths)
    np.testing.assert_allclose(turned, own, atol=1e-5)
    assert np.abs(wider - own).max() > 1e-4
    shutil.rmtree(world / "elsewhere")


def test_a_holdout_that_was_predicted_by_other_views_does_not_score_this_ensemble(world):
    given = {"SM_CHANNEL_MODEL": str(world)}
    assert stage(world, "ensemble", "elsewhere/plain", "predict.views=plain", **given) == 0
    assert not (world / "elsewhere" / "plain" / "output" / "holdout.parquet").exists()
    facts = json.loads((world / "elsewhere" / "plain" / "output" / "ensemble.json").read_text())
    assert {score["rows"] for score in facts["scores"]} == {"out-of-fold"}
    shutil.rmtree(world / "elsewhere")


def test_a_vote_of_the_folds_and_each_systems_own_file_blended_again(world):
    given = {"SM_CHANNEL_MODEL": str(world)}
    assert stage(world, "ensemble", "elsewhere/vote", "ensemble.within=vote", **given) == 0
    output = world / "elsewhere" / "vote" / "output"
    facts = json.loads((output / "ensemble.json").read_text())
    assert [score["what"] for score in facts["scores"] if score["rows"] == "holdout"] == [
        "3 models, vote within a system"
    ]
    held = predictions.read(output / "holdout.parquet")
    members = [predictions.read(world / f"fold-{fold}" / "model" / "holdout.parquet") for fold in range(3)]
    votes = sum(np.eye(3)[member.in_order(held.ids).log_probs.argmax(axis=1)] for member in members)
    assert (np.exp(held.log_probs).argmax(axis=1) == votes.argmax(axis=1)).all()
    # The mean of the folds goes on as a file, under the system's name, and blends with the folds' own system.
    (mean,) = (world / "ensemble" / "output" / "csv").glob("output_*.csv")
    assert mean.name == f"output_{held.system}.csv"
    renamed = world / "elsewhere" / "output_before.csv"
    shutil.copy(mean, renamed)
    arguments = ["ensemble.blend=mean", f"ensemble.submissions={renamed}"]
    assert stage(world, "ensemble", "elsewhere/both", *arguments, **given) == 0
    both, before = (world / folder / "output" / "submission.csv" for folder in ("elsewhere/both", "ensemble"))
    rows = [
        np.array([line.split(",")[1:] for line in path.read_text("utf-8-sig").splitlines()[1:]], float)
        for path in (both, before)
    ]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert stage(world, "ensemble", "elsewhere/twice", f"ensemble.submissions={mean}", **given) == 65
    assert "like a system of the models" in (world / "elsewhere" / "twice" / "failure").read_text()
    shutil.rmtree(world / "elsewhere")


def test_weights_that_settings_name_are_part_of_the_key(world, tmp_path, caplog):
    folder, weights = "elsewhere/weights", tmp_path / "start.safetensors"
    arguments = ["FOLD=0", *SETTINGS, "train.epochs=1", f"model.weights={weights}"]
    shutil.copy(world / "fold-1" / "model" / "model.safetensors", weights)
    assert stage(world, "train-fold", folder, *arguments) == 0
    first = (world / folder / "model" / "model.safetensors").read_bytes()
    shutil.copy(world / "fold-2" / "model" / "model.safetensors", weights)
    assert stage(world, "train-fold", folder, *arguments) == 0
    assert (world / folder / "model" / "model.safetensors").read_bytes() != first
    shutil.rmtree(world / "elsewhere")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of W&B's own
@pytest.mark.parametrize(("lr", "code", "ended"), [("0.02", 0, 0), ("1e30", 65, 1)])
def test_a_tracker_is_told_how_the_run_ended(world, lr, code, ended, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = [*SETTINGS, "train.trackers=wandb", f"train.lr={lr}", "train.epochs=2"]
    assert stage(world, "train-fold", "tracked", "FOLD=0", *arguments) == code
    records = wandb_records(world / "tracked" / "output")
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [ended]
    final = {(i.key or i.nested_key[0]) for r in records if r.HasField("summary") for i in r.summary.update}
    assert (final >= {"oof_accuracy", "holdout_logloss"}) is (code == 0)
    assert not (world / "tracked" / "output" / "tensorboard").exists()
    shutil.rmtree(world / "tracked")


def test_defect_car_b5_a_student_is_not_selected_on_images_that_its_teachers_trained_on(world):
    assert stage(world, "split", "no-holdout", "split.folds=3") == 0
    folds = world / "no-holdout" / "output"
    given = {"SM_CHANNEL_MODEL": str(world), "SM_CHANNEL_FOLDS": str(folds)}
    assert stage(world, "distill", "bad", *SETTINGS, "distill.patience=2", **given) == 65
    assert "another split" in (world / "bad" / "failure").read_text()
    for fold in range(3):
        model = {"SM_CHANNEL_FOLDS": str(folds)}
        assert stage(world, "train-fold", f"nh/fold-{fold}", f"FOLD={fold}", *SETTINGS, "train.epochs=1", **model) == 0
    given["SM_CHANNEL_MODEL"] = str(world / "nh")
    assert stage(world, "distill", "bad", *SETTINGS, "distill.patience=2", **given) == 64
    assert "needs a holdout" in (world / "bad" / "failure").read_text()
    assert stage(world, "distill", "nh/distill", *SETTINGS, "train.epochs=1", **given) == 0
    for folder in ("nh", "bad", "no-holdout"):
        shutil.rmtree(world / folder)


def test_defect_car_convnext_validation_sees_no_training_augmentation_and_every_class(world):
    """The original validated on randomly cropped and flipped images of a split that it did not stratify."""
    folder, crops = "elsewhere/augmented", 'augment.train=[{"name": "random_resized_crop", "scale": [0.08, 0.1]}]'
    arguments = ["FOLD=0", *SETTINGS, "train.epochs=2", "predict.views=plain", crops]
    assert stage(world, "train-fold", folder, *arguments) == 0
    info = json.loads((world / folder / "model" / "model.json").read_text())
    oof = predictions.read(world / folder / "model" / "oof.parquet")
    truth = oof.log_probs[np.arange(len(oof)), oof.codes()]
    assert info["best"]["logloss"] == pytest.approx(-truth.astype(float).mean(), rel=1e-5)
    assert np.bincount(oof.codes()).tolist() == [9, 9, 9]
    shutil.rmtree(world / "elsewhere")


@pytest.mark.parametrize(
    ("folder", "student", "teacher"),
    [
        ("self", [], "best_fold"),
        ("smaller", ['distill.model.options={"widths": [6], "stem": 4}', "distill.train.lr=0.01"], "oof"),
        ("other", ["distill.model.backbone=timm/test_resnet", "distill.model.options={}"], "ensemble"),
        ("again", ["distill.temperature_decay=0.5"], "student"),
    ],
)
def test_a_student_may_be_its_teachers_twin_another_network_or_a_students_student(world, folder, student, teacher):
    named = str(world / "distill" / "model") if teacher == "student" else teacher
    given = {"SM_CHANNEL_MODEL": str(world)}
    arguments = [*SETTINGS, "train.epochs=2", f"distill.teacher={named}", *student]
    assert stage(world, "distill", f"elsewhere/{folder}", *arguments, **given) == 0
    model = world / "elsewhere" / folder / "model"
    info = json.loads((model / "model.json").read_text())
    assert info["role"] == "student"
    same = (
        info["settings"]["model"]
        == json.loads((world / "fold-0" / "model" / "model.json").read_text())["settings"]["model"]
    )
    assert same == (folder in ("self", "again"))
    assert stage(world, "ensemble", f"elsewhere/{folder}-ensemble", SM_CHANNEL_MODEL=str(model)) == 0
    shutil.rmtree(world / "elsewhere")


@pytest.mark.parametrize(
    ("name", "change", "code", "message"),
    [
        ("model.safetensors", lambda old: old[: len(old) // 2], 65, "does not hold the weights"),
        ("model.safetensors", lambda old: old[:-1] + b"x", 65, "is not the file that its stage made"),
        ("model.json", lambda old: b"{", 65, "model.json"),
        ("model.json", lambda old: old.replace(b'"role": "fold"', b'"role": "guru"'), 65, "neither fold nor student"),
        ("model.json", lambda old: old.replace("빨강 차".encode(), b"red car"), 65, "knows other classes"),
    ],
)
def test_a_teacher_that_cannot_be_read_or_knows_other_classes_is_one_clear_error(
    world, tmp_path, name, change, code, message
):
    original = (world / "fold-1" / "model" / name).read_bytes()
    teacher = tmp_path / "teacher"
    shutil.copytree(world / "fold-1" / "model", teacher)
    (teacher / name).write_bytes(change(original))
    assert (teacher / name).read_bytes() != original
    if not message.startswith("is not the file"):
        (teacher / "stage.json").write_text("{}")  # of an age before digests
    arguments = [*SETTINGS, f"distill.teacher={teacher}"]
    assert stage(world, "distill", "bad-teacher", *arguments, SM_CHANNEL_MODEL=str(world)) == code
    assert message in (world / "bad-teacher" / "failure").read_text()
    assert not list((world / "bad-teacher").rglob("*.safetensors"))
    shutil.rmtree(world / "bad-teacher")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.loss=focall"], "did you mean 'focal'"),
        (['train.loss={"name": "focal", "gama": 2}'], "gama"),
        (["train.update=samm"], "did you mean 'sam'"),
        (["train.sampler=balance"], "did you mean 'balanced'"),
        (["train.class_weights=equal"], "'none' or 'balanced' is needed"),
        (["train.freeze_epochs=-1"], "at least 0"),
        (["train.backbone_lr=0"], "more than 0"),
        (["distill.temperature_decay=0.9", "distill.temperature=1"], "cannot fall to temperature_end=1.0"),
    ],
)
def test_parts_of_training_that_there_are_not_are_explained_before_the_first_epoch(world, arguments, message):
    assert stage(world, "train-fold", "bad-part", "FOLD=0", *SETTINGS, "train.epochs=1000000", *arguments) == 64
    assert message in (world / "bad-part" / "failure").read_text()
    shutil.rmtree(world / "bad-part")


def test_parts_of_training_run_by_their_settings_alone(world, caplog):
    arguments = [
        "FOLD=0", *SETTINGS, 'train.loss={name = "focal", alpha = 0.5, gamma = 2}', "train.class_weights=balanced",
        "train.sampler=balanced", "train.rdrop_alpha=0.5", "train.update=sam", "train.freeze_epochs=1",
        "train.backbone_lr=0.1", "train.layer_decay=0.9", "train.accumulate=2", "train.clip=1", "model.dropout=0.3",
    ]  # fmt: skip
    assert stage(world, "train-fold", "elsewhere/parts", *arguments) == 0
    settings = json.loads((world / "elsewhere" / "parts" / "model" / "model.json").read_text())["settings"]["train"]
    assert settings["loss"] == {"name": "focal", "alpha": 0.5, "gamma": 2}
    assert not [record for record in caplog.records if "dropout" in record.getMessage()]
    shutil.rmtree(world / "elsewhere")
