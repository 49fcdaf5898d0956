"""Mask recognition: models of some label factors, their product, and the three commands with only their variables."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference

from fivefold import predictions
from fivefold.contract.files import read_json, sha256
from fivefold.data.readers.profiles import STEMS, age_class, encode_label
from fivefold.data.split.fold_table import read_folds
from jobs.__main__ import run
from toy_data import LEARNS, failure, read_cells, run_stage, write_csv

pytestmark = pytest.mark.slow

AGES = (25, 45, 65)
TINY = [
    *LEARNS,
    "train.epochs=6",
    "train.ema_decay=0",
    'augment.train=["resize"]',
    "augment.batch_mix=none",
    "predict.tta=plain",
    "split.folds=2",
]
MASK_GENDER_MODEL = ["system=masks", "model.label_factors=mask,gender"]
AGE_MODEL = ["system=ages", "model.label_factors=age"]


def write_photograph(path: Path, mask: int, gender: int, age: int, random: np.random.Generator) -> int:
    """Write an image whose red encodes the mask, green the gender and blue the age. Return its class."""
    age_code = age_class(age, (30, 60))
    pixels = random.integers(0, 60, (12, 12, 3)) + np.array([90 * mask, 150 * gender, 90 * age_code])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return encode_label(mask, gender, age_code)


@pytest.fixture(scope="module")
def mask_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 people with seven photographs each, and 36 test images with ground truth."""
    root = tmp_path_factory.mktemp("masks")
    random = np.random.default_rng(0)
    for number, (gender, age, _) in enumerate(product(("male", "female"), AGES, range(4))):
        folder = root / "train" / "images" / f"{number:06d}_{gender}_Asian_{age}"
        for stem, mask in STEMS.items():
            write_photograph(folder / f"{stem}.png", mask, ("male", "female").index(gender), age, random)
        (folder / "._mask1.png").write_bytes(b"\0")
    rows = []
    for mask, gender, age, _ in product(range(3), range(2), AGES, range(2)):
        name = f"{random.bytes(20).hex()}.png"
        rows.append((name, write_photograph(root / "eval" / "images" / name, mask, gender, age, random)))
    write_table(root / "eval" / "info.csv", [(name, 0) for name, _ in rows])
    write_table(root / "truth" / "gt.csv", sorted(rows))
    return root


def run_command(name: str, *arguments: str, **variables: object) -> int:
    """Run a command with only these variables."""
    return run(name, arguments, {variable: str(value) for variable, value in variables.items()})


def write_table(path: Path, rows: list[tuple[str, int]]) -> None:
    write_csv(path, [["ImageID", "ans"], *rows], "utf-8")


@pytest.fixture(scope="module")
def model(mask_data: Path) -> Path:
    """The model of `train` with only two variables (the images and the model folder) and the settings of a tiny model."""
    folder = mask_data / "model" / "exp"
    assert run_command("train", *TINY, SM_CHANNEL_TRAIN=mask_data / "train", SM_MODEL_DIR=folder) == 0
    return folder


def test_train_makes_its_own_split_and_trains_fold_0_by_default(mask_data, model):
    info = read_json(model / "model.json")
    split = model / "output" / "split"
    table = read_folds(split / "folds.parquet", split / "classes.json")
    assert (info["role"], info["fold"], info["folds"], info["knows"]) == ("fold", 0, 2, [])
    assert info["split"] == sha256(split / "folds.parquet")
    assert info["classes"] == sorted(map(str, range(18)))
    assert len(table) == 24 * 7
    people = set(zip(table.groups.to_pylist(), table.fold.tolist(), strict=True))
    assert len(people) == len({person for person, _ in people}) == 24, "no person is in two folds"
    before = (model / "stage.json").stat().st_mtime_ns
    assert run_command("train", *TINY, SM_CHANNEL_TRAIN=mask_data / "train", SM_MODEL_DIR=model) == 0
    assert (model / "stage.json").stat().st_mtime_ns == before, "the second run has nothing to do"


def test_evaluation_prints_the_scores_of_scikit_learn(mask_data, tmp_path, capsys):
    truth = read_cells(mask_data / "truth" / "gt.csv")[1:]
    random = np.random.default_rng(1)
    answers = [(name, int(label) if random.random() < 0.6 else int(random.integers(0, 18))) for name, label in truth]
    channels = {"SM_GROUND_TRUTH_DIR": mask_data / "truth", "SM_OUTPUT_DATA_DIR": tmp_path}
    assert run_command("evaluation", **channels) == 66, "there are no answers yet"
    write_table(tmp_path / "output.csv", answers[::-1])
    true, predicted = [label for _, label in truth], [str(label) for _, label in answers]
    for _ in range(2):  # twice: a skipped stage would print nothing, unlike the original program
        assert run_command("evaluation", **channels) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["accuracy"] == pytest.approx(reference.accuracy_score(true, predicted))
        assert printed["f1_macro"] == pytest.approx(reference.f1_score(true, predicted, average="macro"))
        assert printed["n"] == 36


@pytest.fixture(scope="module")
def factor_models(mask_data: Path) -> Path:
    """One split, and two fold models of mask and gender, and two of age."""
    root = mask_data / "halves"
    run_and_check(mask_data, "split", root / "split", "split.folds=2")
    for fold, (name, settings) in product(range(2), {"masks": MASK_GENDER_MODEL, "ages": AGE_MODEL}.items()):
        run_and_check(mask_data, "train-fold", root / f"{name}-{fold}", *TINY, *settings, f"FOLD={fold}")
    return root


def run_and_check(mask_data: Path, name: str, folder: Path, *arguments: str, code: int = 0, **channels: object) -> str:
    """Run a stage and assert its exit code. Return the failure message, or an empty string."""
    all_channels = {"FOLDS": mask_data / "halves" / "split" / "output", **channels}
    assert run_stage(mask_data, name, folder, *arguments, **all_channels) == code
    return failure(folder) if code else ""


def link_models(factor_models: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(factor_models / name)
    return folder


def test_model_of_some_factors_has_only_the_classes_of_these_factors(factor_models):
    split = factor_models / "split" / "output"
    table = read_folds(split / "folds.parquet", split / "classes.json")
    assert table.factors.names == ("mask", "gender", "age")
    labels = dict(zip(table.ids.to_pylist(), table.labels(), strict=True))
    for name, factors, classes in (("masks", ["mask", "gender"], 6), ("ages", ["age"], 3)):
        info = read_json(factor_models / f"{name}-0" / "model" / "model.json")
        oof = predictions.read(factor_models / f"{name}-0" / "model" / "oof.parquet")
        assert (info["knows"], len(info["classes"])) == (factors, classes)
        assert list(oof.classes) == info["classes"] == list(table.factors.projected_classes(factors))
        assert list(oof.labels) == [table.factors.project(labels[row], factors) for row in oof.ids]
        assert (oof.log_probs.argmax(axis=1) == oof.codes()).mean() > 0.8


def test_student_must_have_the_factors_of_its_teachers(mask_data, factor_models, tmp_path):
    channels = {"MODEL": link_models(factor_models, tmp_path / "models", "masks-0", "masks-1")}
    message = run_and_check(mask_data, "distill", tmp_path / "bad", *TINY, *AGE_MODEL, code=64, **channels)
    assert re.search("fold 0 of masks, seed 42 .*mask, gender, .*age", message)
    message = run_and_check(mask_data, "distill", tmp_path / "bad", *TINY, code=64, **channels)
    assert re.search("fold 0 of masks, seed 42 .*mask, gender, .*classes", message)
    run_and_check(mask_data, "distill", tmp_path / "student", *TINY, *MASK_GENDER_MODEL, "train.epochs=1", **channels)
    info = read_json(tmp_path / "student" / "model" / "model.json")
    assert (info["role"], info["knows"], len(info["classes"])) == ("student", ["mask", "gender"], 6)


def test_inference_combines_models_of_different_factors_automatically(mask_data, factor_models, tmp_path):
    models = link_models(factor_models, tmp_path / "models", "masks-0", "ages-1")  # one fold of each is enough
    for name in ("masks-0", "ages-1"):
        run_and_check(mask_data, "inference", tmp_path / name, SM_CHANNEL_MODEL=factor_models / name)
    run_and_check(mask_data, "inference", tmp_path, MODEL=models)
    predicted = predictions.read(tmp_path / "output" / "predictions.parquet")
    assert (len(predicted.classes), predicted.system) == (18, "ages × masks")
    tables = (read_cells(tmp_path / name / "output" / "output.csv") for name in ("masks-0", "ages-1"))
    mask_gender_labels, age_labels = (dict(cells[1:]) for cells in tables)
    header, *answers = read_cells(tmp_path / "output" / "output.csv")
    listed = read_cells(mask_data / "eval" / "info.csv")
    assert (header, [name for name, _ in answers]) == (listed[0], [name for name, _ in listed[1:]])
    for name, answer in answers:
        mask, gender = mask_gender_labels[name].split("+")
        codes = ("mask", "incorrect", "normal").index(mask), ("male", "female").index(gender)
        assert int(answer) == codes[0] * 6 + codes[1] * 3 + ("<30", "<60", ">=60").index(age_labels[name])


def test_product_ensemble_predicts_and_is_evaluated_on_all_18_classes(mask_data, factor_models, tmp_path):
    models, output = {"SM_CHANNEL_MODEL": factor_models}, tmp_path / "joined" / "output"
    run_and_check(mask_data, "ensemble", tmp_path / "joined", "ensemble.blend=product", **models)
    predicted = predictions.read(output / "predictions.parquet")
    assert predicted.classes == tuple(sorted(map(str, range(18))))
    truth = dict(read_cells(mask_data / "truth" / "gt.csv")[1:])
    codes = [predicted.classes.index(truth[name]) for name in predicted.ids]
    assert (predicted.log_probs.argmax(axis=1) == codes).mean() > 0.5  # 1/18 by chance
    rows = read_cells(output / "submission.csv")
    assert rows[0] == ["ImageID", "ans"]
    assert {label for _, label in rows[1:]} <= set(map(str, range(18)))

    summary = read_json(output / "ensemble.json")
    assert summary["weights"] == {"ages": 1.0, "masks": 1.0}
    scores = [(score["what"].removeprefix("single models of "), score["n"]) for score in summary["scores"]]
    assert scores == [("ages", 24 * 7), ("masks", 24 * 7), ("ages × masks", 24 * 7)]

    channels = {**models, "SM_CHANNEL_PREDICTIONS": output, "SM_GROUND_TRUTH_DIR": mask_data / "truth"}
    run_and_check(mask_data, "evaluate", tmp_path / "report", **channels)
    metrics = read_json(tmp_path / "report" / "output" / "metrics.json")
    assert metrics["test"]["n"] == 36
    assert metrics["oof"]["accuracy"] == pytest.approx(summary["scores"][-1]["accuracy"], abs=1e-5)
    assert metrics["oof"]["what"].startswith("product of 4 fold models")


def test_age_models_alone_are_scored_on_age(mask_data, factor_models, tmp_path):
    models = {"MODEL": link_models(factor_models, tmp_path / "models", "ages-0", "ages-1")}
    run_and_check(mask_data, "ensemble", tmp_path / "ages", **models)
    channels = {"SM_CHANNEL_PREDICTIONS": tmp_path / "ages" / "output", "SM_GROUND_TRUTH_DIR": mask_data / "truth"}
    run_and_check(mask_data, "evaluate", tmp_path / "report", **models, **channels)
    assert read_json(tmp_path / "report" / "output" / "metrics.json")["test"]["accuracy"] > 0.8
