"""A linear probe gives a model folder like fine-tuning does: out-of-fold table, ensemble, student, and the same predictions when loaded."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fivefold import predictions
from fivefold.contract.artifacts import open_model_dir
from fivefold.contract.files import read_json
from fivefold.contract.run_layout import CACHES
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.evaluation.metrics import compute_metrics
from fivefold.trained_model import ImageList, SharedEvalImages, load_model
from toy_data import MODEL, copy_run, draw_toy_images, failure, make_toy_run, noise_in, run_stage

PROBE = [
    *MODEL, "train.method=linear_probe", "train.batch_size=8", "train.precision=fp32", "train.loggers=[]", "predict.tta=plain,flip",
    "model.image_stats=color_mean",
]  # fmt: skip


@pytest.fixture(scope="module")
def probe_run(tmp_path_factory) -> Path:
    """The toy run with three linear probes, their ensemble and a student, with caches below `caches`."""
    root = draw_toy_images(tmp_path_factory.mktemp("probe"))
    return make_toy_run(root, [*PROBE, f"data.cache={root / 'caches'}"])


def out_of_fold(root: Path, fold: int) -> predictions.Predictions:
    return predictions.read(root / f"fold-{fold}" / "model" / "oof.parquet")


def test_out_of_fold_rows_are_learned_and_equal_those_of_the_loaded_model(probe_run):
    table = read_folds(probe_run / "split" / "output" / "folds.parquet")
    for fold in range(3):
        oof = out_of_fold(probe_run, fold)
        assert compute_metrics(oof.log_probs, oof.codes())["accuracy"] > 0.75
        model = load_model(open_model_dir(probe_run / f"fold-{fold}" / "model"), {})
        images = ImageList(open_store(probe_run / "train"), table.paths_of(table.valid_rows(fold)))
        again = model.predict_cached(SharedEvalImages(images), "again")
        assert np.abs(np.exp(again) - np.exp(oof.log_probs)).max() < 1e-4


def test_the_heads_of_an_ensemble_share_one_pass_over_the_images(probe_run, tmp_path):
    settings = [*PROBE, "data.cache=off", "model.image_stats=[]"]
    for fold in range(2):
        assert run_stage(probe_run, "train-fold", tmp_path / f"fold-{fold}", f"FOLD={fold}", *settings) == 0
    models = [load_model(open_model_dir(tmp_path / f"fold-{fold}" / "model"), {}) for fold in range(2)]
    paths = sorted(str(path.relative_to(probe_run)) for path in (probe_run / "eval" / "test").iterdir())
    shared = SharedEvalImages(ImageList(open_store(probe_run), paths))
    together = [model.predict_cached(shared, "") for model in models]
    assert len(shared.features) == 1
    every_row = np.arange(len(paths))
    for model, log_probs in zip(models, together, strict=True):
        alone = model.predict_cached(SharedEvalImages(shared.files), "", rows=every_row)  # the whole network
        np.testing.assert_allclose(log_probs, alone, atol=1e-5)
    assert not np.allclose(*together, atol=1e-3)
    models[0].predict_cached(shared, "", ["plain"])
    with torch.no_grad():
        next(models[1].network.backbone.parameters()).add_(0.1)
    models[1].predict_cached(shared, "")
    assert len(shared.features) == 3, "other views or weights have features of their own"


def test_the_backbone_is_frozen_and_the_heads_differ(probe_run):
    states = [load_file(probe_run / f"fold-{fold}" / "model" / "model.safetensors") for fold in range(3)]
    for name, tensor in states[0].items():
        assert tensor.equal(states[1][name]) == name.startswith("backbone."), name


def test_the_student_learns_from_the_teachers(probe_run):
    info = read_json(probe_run / "distill" / "model" / "model.json")
    assert (info["role"], info["leak_free"]) == ("student", True)
    table = predictions.read(probe_run / "ensemble-student" / "output" / "predictions.parquet")
    truth = dict(line.split(",") for line in (probe_run / "gt.csv").read_text(encoding="utf-8-sig").splitlines()[1:])
    guesses = [table.classes[code] for code in table.log_probs.argmax(axis=1)]
    assert np.mean([truth[row] == guess for row, guess in zip(table.ids, guesses, strict=True)]) > 0.75


def test_the_students_targets_are_not_softened(probe_run):
    settings = [*PROBE, f"data.cache={probe_run / 'caches'}", "distill.temperature=9"]
    assert run_stage(probe_run, "distill", "softened", *settings, MODEL=probe_run) == 0
    weights = "model/model.safetensors"
    assert (probe_run / "softened" / weights).read_bytes() == (probe_run / "distill" / weights).read_bytes()


def test_all_folds_share_features_and_other_weights_get_their_own(probe_run, tmp_path, caplog):
    def count_files(root: Path) -> int:
        return len(list((root / "caches").glob("features-*/*.npz")))

    folders = list((probe_run / "caches").glob("features-*"))
    assert len(folders) == 1
    root = copy_run(probe_run, tmp_path / "run")
    before = count_files(root)
    settings = [*PROBE, f"data.cache={root / 'caches'}"]
    assert run_stage(root, "train-fold", "again", "FOLD=1", *settings, "seed=42") == 0
    assert count_files(root) == before
    weights = "model/model.safetensors"
    assert (root / "again" / weights).read_bytes() == (root / "fold-1" / weights).read_bytes()
    for step, change in enumerate(
        ("seed=7", "predict.tta=plain", "model.mean=[0.4,0.4,0.4]", "augment.eval=centre_crop")
    ):
        assert run_stage(root, "train-fold", f"other-{step}", "FOLD=1", *settings, change) == 0
        assert len(list((root / "caches").glob("features-*"))) == 2 + step, change


def test_a_head_is_fitted_once_for_the_same_rows_and_targets(probe_run, tmp_path, capsys):
    root = copy_run(probe_run, tmp_path / "run")
    settings, weights = [*PROBE, f"data.cache={root / 'caches'}"], "model/model.safetensors"

    def count_fits(name: str) -> int:
        assert run_stage(root, "train-fold", name, "FOLD=0", *settings) == 0
        assert (root / name / weights).read_bytes() == (root / "fold-0" / weights).read_bytes()
        return capsys.readouterr().err.count("in a cross-validation")

    assert count_fits("again") == 0
    for path in next((root / "caches").glob("features-*/heads")).iterdir():
        path.write_bytes(b"half a fi")
    assert count_fits("repaired") == 1
    assert count_fits("last") == 0


def test_the_same_bytes_with_and_without_a_cache(probe_run, tmp_path):
    root = copy_run(probe_run, tmp_path / "run", "caches", "fold-*", "ensemble*", "distill")
    assert run_stage(root, "train-fold", "fold-0", "FOLD=0", *PROBE, "data.cache=off") == 0
    for name in ("model.safetensors", "oof.parquet", "train_log.csv"):
        assert (root / "fold-0" / "model" / name).read_bytes() == (probe_run / "fold-0" / "model" / name).read_bytes()
    assert not (root / CACHES).exists()


def test_fine_tuning_starts_from_the_probe(probe_run, tmp_path):
    root = copy_run(probe_run, tmp_path / "run", "fold-*", "ensemble*", "distill")
    settings = [
        *PROBE,
        "train.method=lp_ft",
        "train.epochs=1",
        "train.freeze_epochs=1",
        "train.lr=1e-6",
        f"data.cache={root / 'caches'}",
    ]
    assert run_stage(root, "train-fold", "tuned", "FOLD=0", *settings) == 0
    tuned, probe = predictions.read(root / "tuned" / "model" / "oof.parquet"), out_of_fold(probe_run, 0)
    assert np.abs(np.exp(tuned.log_probs) - np.exp(probe.log_probs)).max() < 0.05
    assert run_stage(root, "train-fold", "untrained", "FOLD=0", *settings, "train.method=fine_tune") == 0
    random = predictions.read(root / "untrained" / "model" / "oof.parquet")
    assert (
        compute_metrics(random.log_probs, random.codes())["logloss"]
        > 2 * compute_metrics(tuned.log_probs, tuned.codes())["logloss"]
    )


@pytest.mark.parametrize("counts", [(3, 2), (1, 1, 4)], ids=["five images", "classes of one image"])
def test_the_smallest_data_sets_give_a_finite_model(counts, tmp_path):
    for number, count in enumerate(counts):
        noise_in(tmp_path / "train", [f"class{number}"], count, seed=number)
    assert run_stage(tmp_path, "split", "split", "split.folds=2") == 0
    for fold in range(2):
        assert run_stage(tmp_path, "train-fold", f"fold-{fold}", f"FOLD={fold}", *PROBE) == 0
        oof = out_of_fold(tmp_path, fold)
        assert np.isfinite(oof.log_probs).all()
        assert np.exp(oof.log_probs).sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("change", ["model.head=mlp", "train.loss=bce"])
def test_what_logistic_regression_cannot_fit_exits_64(change, toy_run, tmp_path):
    root = copy_run(toy_run, tmp_path / "run", "fold-*", "ensemble*", "distill")
    assert run_stage(root, "train-fold", "fold-0", "FOLD=0", *PROBE, change) == 64
    assert re.search(r"train\.method=linear_probe", failure(root / "fold-0"))
