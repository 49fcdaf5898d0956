"""People with and without masks: models of some factors, their product, and the three commands with their variables alone."""

import json
import re
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fivefold import predictions
from fivefold.contract.files import sha256
from fivefold.data.readers.profiles import STEMS, age_class, encode_label
from fivefold.data.split.fold_table import read_folds
from jobs.__main__ import run
from toy_data import LEARNS, call_jobs, failure, read_cells, run_stage, write_csv

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
MASKS = ["system=masks", "model.label_factors=mask,gender"]
YEARS = ["system=ages", "model.label_factors=age"]


def draw(path: Path, mask: int, gender: int, age: int, random: np.random.Generator) -> int:
    """Draws a photograph whose red says the mask, green the gender and blue the age; returns its class."""
    years = age_class(age, (30, 60))
    pixels = random.integers(0, 60, (12, 12, 3)) + np.array([90 * mask, 150 * gender, 90 * years])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return encode_label(mask, gender, years)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 people with seven photographs each, and 36 images to predict with their truth."""
    root = tmp_path_factory.mktemp("masks")
    random = np.random.default_rng(0)
    for number, (gender, age, _) in enumerate(product(("male", "female"), AGES, range(4))):
        folder = root / "train" / "images" / f"{number:06d}_{gender}_Asian_{age}"
        for stem, mask in STEMS.items():
            draw(folder / f"{stem}.png", mask, ("male", "female").index(gender), age, random)
        (folder / "._mask1.png").write_bytes(b"\0")
    rows = []
    for mask, gender, age, _ in product(range(3), range(2), AGES, range(2)):
        name = f"{random.bytes(20).hex()}.png"
        rows.append((name, draw(root / "eval" / "images" / name, mask, gender, age, random)))
    write_table(root / "eval" / "info.csv", [(name, 0) for name, _ in rows])
    write_table(root / "truth" / "gt.csv", sorted(rows))
    return root


def write_table(path: Path, rows: list[tuple[str, int]]) -> None:
    write_csv(path, [["ImageID", "ans"], *rows], "utf-8")


@pytest.fixture(scope="module")
def model(world: Path) -> Path:
    """What `train` makes, told nothing but where the images and the model are (and how small to be)."""
    done = call_jobs("train", *TINY, SM_CHANNEL_TRAIN=world / "train", SM_MODEL_DIR=world / "model" / "exp")
    assert done.returncode == 0, done.stderr
    return world / "model" / "exp"


def test_train_needs_no_folds_and_no_fold(world, model):
    info = json.loads((model / "model.json").read_text())
    split = model / "output" / "split"
    table = read_folds(split / "folds.parquet", split / "classes.json")
    assert (info["role"], info["fold"], info["folds"], info["knows"]) == ("fold", 0, 2, [])
    assert info["split"] == sha256(split / "folds.parquet")
    assert info["classes"] == sorted(map(str, range(18)))
    assert len(table) == 24 * 7
    people = {}
    for person, fold in zip(table.groups.to_pylist(), table.fold.tolist(), strict=True):
        people.setdefault(person, set()).add(fold)
    assert len(people) == 24
    assert all(len(folds) == 1 for folds in people.values())
    again = call_jobs("train", *TINY, SM_CHANNEL_TRAIN=world / "train", SM_MODEL_DIR=model)
    assert "nothing to do" in again.stderr


def test_train_can_train_another_fold_and_write_elsewhere(world, tmp_path):
    given = {"SM_CHANNEL_TRAIN": str(world / "train"), "SM_MODEL_DIR": str(tmp_path / "model")}
    given["SM_OUTPUT_DATA_DIR"] = str(tmp_path / "out")
    assert run("train", [*TINY, "train.epochs=1", "FOLD=1", "split.folds=3"], given) == 0
    assert json.loads((tmp_path / "model" / "model.json").read_text())["fold"] == 1
    assert (tmp_path / "out" / "split" / "folds.parquet").is_file()
    assert not (tmp_path / "model" / "output").exists()


def test_tensorboard_has_the_tags_and_images_with_truth_and_prediction(model):
    events = EventAccumulator(str(model / "output" / "tensorboard"))
    events.Reload()
    assert {"Train/loss", "Train/accuracy", "Train/lr", "Val/loss", "Val/accuracy"} <= set(events.Tags()["scalars"])
    best = json.loads((model / "model.json").read_text())["best"]["epoch"]
    (shown,) = events.Images("Val/examples")
    assert shown.step == best
    with Image.open(model / "output" / "validation_examples.png") as picture:
        assert (shown.width, shown.height) == picture.size
        assert np.asarray(picture.convert("L")).std() > 10


def test_defect_mask_evaluation_prints_what_scikit_learn_says(world, tmp_path):
    truth = read_cells(world / "truth" / "gt.csv")[1:]
    random = np.random.default_rng(1)
    answers = [(name, int(label) if random.random() < 0.6 else int(random.integers(0, 18))) for name, label in truth]
    write_table(tmp_path / "output.csv", answers[::-1])
    for _ in range(2):  # the original printed nothing, and a skipped stage would not either
        done = call_jobs("evaluation", SM_GROUND_TRUTH_DIR=world / "truth", SM_OUTPUT_DATA_DIR=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        true, guessed = [label for _, label in truth], [str(label) for _, label in answers]
        assert found["accuracy"] == pytest.approx(reference.accuracy_score(true, guessed))
        assert found["f1_macro"] == pytest.approx(reference.f1_score(true, guessed, average="macro"))
        assert found["n"] == 36


def test_evaluation_takes_probabilities_too(tmp_path, capsys):
    (tmp_path / "gt.csv").write_text("ImageID,ans\na,x\nb,y\nc,y\n")
    (tmp_path / "output.csv").write_text("ImageID,x,y\na,0.9,0.1\nb,0.2,0.8\nc,0.6,0.4\n")
    given = {"SM_GROUND_TRUTH_DIR": str(tmp_path), "SM_OUTPUT_DATA_DIR": str(tmp_path)}
    assert run("evaluation", [], given) == 0
    assert json.loads(capsys.readouterr().out) == {"accuracy": 2 / 3, "f1_macro": pytest.approx(2 / 3), "n": 3}


@pytest.mark.parametrize(
    ("truth", "answers", "code", "message"),
    [
        (None, "ImageID,ans\na,1\n", 66, "no gt.csv"),
        ("ImageID,ans\na,1\n", None, 66, "no answers at"),
        ("ImageID,ans\na,1\nb,2\n", "ImageID,ans\na,1\n", 65, "1 of the 2 ids"),
    ],
)
def test_evaluation_refuses_what_cannot_be_scored(tmp_path, truth, answers, code, message, capfd):
    (tmp_path / "truth").mkdir()
    (tmp_path / "out").mkdir()
    for name, text in {"truth/gt.csv": truth, "out/output.csv": answers}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    given = {"SM_GROUND_TRUTH_DIR": str(tmp_path / "truth"), "SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}
    assert run("evaluation", [], given) == code
    told = capfd.readouterr()
    assert message in told.err
    assert not told.out


@pytest.fixture(scope="module")
def halves(world: Path) -> Path:
    """One split, and two folds each of a model of mask and gender and of one of age."""
    root = world / "halves"
    stage(world, "split", root / "split", "split.folds=2")
    for fold, (name, factors) in product(range(2), {"masks": MASKS, "ages": YEARS}.items()):
        stage(world, "train-fold", root / f"{name}-{fold}", *TINY, *factors, f"FOLD={fold}")
    return root


def stage(world: Path, name: str, folder: Path, *arguments: str, code: int = 0, **channels: object) -> str:
    """Runs a stage in this process and asserts its exit code; returns its failure."""
    given = {"FOLDS": world / "halves" / "split" / "output", **channels}
    assert run_stage(world, name, folder, *arguments, **given) == code
    return failure(folder) if code else ""


def linked(halves: Path, folder: Path, *names: str) -> Path:
    """A folder of some of the halves' models."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(halves / name)
    return folder


def test_a_model_of_some_factors_has_classes_of_its_own(halves):
    table = read_folds(halves / "split" / "output" / "folds.parquet", halves / "split" / "output" / "classes.json")
    assert table.factors.names == ("mask", "gender", "age")
    labels = dict(zip(table.ids.to_pylist(), table.labels(), strict=True))
    for name, knows, classes in (("masks", ["mask", "gender"], 6), ("ages", ["age"], 3)):
        info = json.loads((halves / f"{name}-0" / "model" / "model.json").read_text())
        oof = predictions.read(halves / f"{name}-0" / "model" / "oof.parquet")
        assert (info["knows"], len(info["classes"])) == (knows, classes)
        assert list(oof.classes) == info["classes"] == list(table.factors.projected_classes(knows))
        assert list(oof.labels) == [table.factors.project(labels[row], knows) for row in oof.ids]
        assert (oof.log_probs.argmax(axis=1) == oof.codes()).mean() > 0.8


def test_a_student_knows_the_factors_of_its_teachers(world, halves, tmp_path):
    given = {"MODEL": linked(halves, tmp_path / "models", "masks-0", "masks-1")}
    told = stage(world, "distill", tmp_path / "bad", *TINY, *YEARS, code=64, **given)
    assert re.search("fold 0 of masks, seed 42 .*mask, gender, .*age", told)
    told = stage(world, "distill", tmp_path / "bad", *TINY, code=64, **given)
    assert re.search("fold 0 of masks, seed 42 .*mask, gender, .*classes", told)
    stage(world, "distill", tmp_path / "student", *TINY, *MASKS, "train.epochs=1", **given)
    info = json.loads((tmp_path / "student" / "model" / "model.json").read_text())
    assert (info["role"], info["knows"], len(info["classes"])) == ("student", ["mask", "gender"], 6)


def test_inference_answers_by_one_model_in_the_columns_of_the_list(world, model, tmp_path):
    given = {"SM_CHANNEL_EVAL": world / "eval", "SM_CHANNEL_MODEL": model, "SM_OUTPUT_DATA_DIR": tmp_path}
    done = call_jobs("inference", **given)
    assert done.returncode == 0, done.stderr
    answers, asked = read_cells(tmp_path / "output.csv"), read_cells(world / "eval" / "info.csv")
    assert answers[0] == ["ImageID", "ans"]
    assert [name for name, _ in answers] == [name for name, _ in asked]
    assert {label for _, label in answers[1:]} <= set(map(str, range(18)))
    found = predictions.read(tmp_path / "predictions.parquet")
    assert [found.classes[code] for code in found.log_probs.argmax(axis=1)] == [label for _, label in answers[1:]]
    scored = call_jobs("evaluation", SM_GROUND_TRUTH_DIR=world / "truth", SM_OUTPUT_DATA_DIR=tmp_path)
    assert (
        json.loads(scored.stdout)["accuracy"] > 3 / 18
    )  # three times chance: the network is tiny, and trained for a moment


def test_inference_joins_models_of_different_factors_by_itself(world, halves, tmp_path):
    """The joined code is that of what each half answers alone: neither out of range, nor with the age added wrongly."""
    models = linked(halves, tmp_path / "models", "masks-0", "ages-1")  # one fold of each will do
    for name in ("masks-0", "ages-1"):
        stage(world, "inference", tmp_path / name, SM_CHANNEL_MODEL=halves / name)
    stage(world, "inference", tmp_path, MODEL=models)
    found = predictions.read(tmp_path / "output" / "predictions.parquet")
    assert (len(found.classes), found.system) == (18, "ages × masks")
    both, years = (dict(read_cells(tmp_path / name / "output" / "output.csv")[1:]) for name in ("masks-0", "ages-1"))
    answers = read_cells(tmp_path / "output" / "output.csv")[1:]
    assert len(answers) == 36
    for name, answer in answers:
        mask, gender = both[name].split("+")
        places = ("mask", "incorrect", "normal").index(mask), ("male", "female").index(gender)
        assert int(answer) == places[0] * 6 + places[1] * 3 + ("<30", "<60", ">=60").index(years[name])


@pytest.fixture(scope="module")
def joined(world: Path, halves: Path) -> Path:
    stage(world, "ensemble", world / "joined", "ensemble.blend=product", SM_CHANNEL_MODEL=halves)
    return world / "joined"


def test_the_product_speaks_of_all_18_classes(world, halves, joined):
    found = predictions.read(joined / "output" / "predictions.parquet")
    assert found.classes == tuple(sorted(map(str, range(18))))
    truth = dict(read_cells(world / "truth" / "gt.csv")[1:])
    codes = [found.classes.index(truth[name]) for name in found.ids]
    assert (found.log_probs.argmax(axis=1) == codes).mean() > 0.5  # of one in eighteen by chance
    rows = read_cells(joined / "output" / "submission.csv")
    assert rows[0] == ["ImageID", "ans"]
    assert {label for _, label in rows[1:]} <= set(map(str, range(18)))

    facts = json.loads((joined / "output" / "ensemble.json").read_text())
    assert facts["weights"] == {"ages": 1.0, "masks": 1.0}
    assert [score["what"] for score in facts["scores"]] == [
        "single models of ages", "single models of masks", "single models of ages × masks",
    ]  # fmt: skip
    assert {score["n"] for score in facts["scores"]} == {24 * 7}
    right = defaultdict(lambda: True)
    for name, fold in product(("masks", "ages"), range(2)):
        table = predictions.read(halves / f"{name}-{fold}" / "model" / "oof.parquet")
        for row, hit in zip(table.ids, table.log_probs.argmax(axis=1) == table.codes(), strict=True):
            right[row] &= bool(hit)
    assert facts["scores"][-1]["accuracy"] == pytest.approx(np.mean(list(right.values())), abs=1e-5)


def test_evaluation_of_the_product_is_by_the_joined_classes(world, halves, joined):
    given = {
        "SM_CHANNEL_PREDICTIONS": joined / "output",
        "SM_CHANNEL_MODEL": halves,
        "SM_GROUND_TRUTH_DIR": world / "truth",
    }
    stage(world, "evaluate", world / "report", **given)
    metrics = json.loads((world / "report" / "output" / "metrics.json").read_text())
    facts = json.loads((joined / "output" / "ensemble.json").read_text())
    assert metrics["test"]["n"] == 36
    assert metrics["oof"]["accuracy"] == pytest.approx(facts["scores"][-1]["accuracy"], abs=1e-5)
    assert metrics["oof"]["what"].startswith("product of 4 fold models")


def test_half_a_system_is_scored_by_the_factors_it_knows(world, halves, tmp_path):
    models = {"MODEL": linked(halves, tmp_path / "models", "ages-0", "ages-1")}
    stage(world, "ensemble", tmp_path / "ages", **models)
    given = {**models, "SM_CHANNEL_PREDICTIONS": tmp_path / "ages" / "output", "SM_GROUND_TRUTH_DIR": world / "truth"}
    stage(world, "evaluate", tmp_path / "report", **given)
    assert json.loads((tmp_path / "report" / "output" / "metrics.json").read_text())["test"]["accuracy"] > 0.8
