"""The five reference systems: how to draw their data, the commands that run them, and the expected files."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import toy_layouts
from expected_files import REST, Expected

TRAIN_LOG = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss", REST)
FOLDS_TABLE = ("id", "path", "label", "group", "fold", "part", "sha256")
RESULTS = ("image_path", "predicted_class", "confidence", "true_class")
SCORES = ("accuracy", "f1_macro", "n")
API = """
import json, sys
from fivefold import ImageClassificationAPI
print(json.dumps(ImageClassificationAPI(sys.argv[1]).predict(sys.argv[2:]), ensure_ascii=False))
"""


@dataclass(frozen=True)
class Command:
    """`python <program> <arguments>` with variables; its output is saved to the file `printed`."""

    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "jobs")
    printed: str = ""


@dataclass(frozen=True)
class System:
    """`draw` writes the data to a folder; `commands` run there one after the other; `files` must exist afterwards.

    `commands` takes the folder because a later command may use a name that an earlier one created.
    """

    draw: Callable[[Path], None]
    commands: Callable[[Path], Iterator[Command]]
    files: tuple[Expected, ...]


def job(name: str, *arguments: str, printed: str = "", **variables: str) -> Command:
    return Command((name, *arguments), variables, printed=printed)


def submit(recipe: str, *arguments: str) -> Command:
    return job("submit", "platform=local", f"recipe={recipe}", "parallel=2", *arguments)


def export(model: str, folder: str, file: str, *arguments: str) -> Command:
    """Export a model's weights as a .pth file in `folder`."""
    channels = {"SM_CHANNEL_MODEL": model, "SM_OUTPUT_DATA_DIR": folder}
    return job("export", "export.format=pth", f"export.file={file}", *arguments, **channels)


def fold_files(folder: str, epochs: int, rows: int | None = None) -> list[Expected]:
    """Files that the training of a fold writes below `folder`: its model directory and its output."""
    return [
        Expected(f"{folder}/model/model.safetensors", least=10_000),
        Expected(f"{folder}/model/model.json"),
        Expected(f"{folder}/model/train_log.csv", TRAIN_LOG, epochs),
        Expected(f"{folder}/model/stage.json"),
        Expected(f"{folder}/output/training_curves.png", least=2_000),
        Expected(f"{folder}/output/tensorboard/events.*"),
    ] + ([Expected(f"{folder}/model/oof.parquet", rows=rows)] if rows else [])


def split_files(run: str, rows: int) -> list[Expected]:
    folder = f"{run}/split/output"
    return [
        Expected(f"{folder}/folds.parquet", (*FOLDS_TABLE, REST), rows),
        Expected(f"{folder}/classes.json"),
        Expected(f"{folder}/split_summary.json"),
    ]


def report_files(folder: str, classes: int) -> list[Expected]:
    return [
        Expected(f"{folder}/report.html", least=10_000),
        Expected(f"{folder}/metrics.json"),
        Expected(f"{folder}/per_class.csv", ("class", "precision", "recall", "f1", "support", "predicted"), classes),
        Expected(f"{folder}/confusion_matrix.csv", rows=classes),
        Expected(f"{folder}/confusion_matrix.png", least=2_000),
        Expected(f"{folder}/wrong_valid.csv"),
    ]


def ensemble_files(folder: str, submission: str, columns: tuple[str, ...], images: int) -> list[Expected]:
    return [
        Expected(f"{folder}/{submission}", columns, images),
        Expected(f"{folder}/predictions.parquet", rows=images),
        Expected(f"{folder}/ensemble.json"),
    ]


def fold_pair_files(run: str, epochs: int, rows: int) -> list[Expected]:
    """Files that the training of two folds writes."""
    return [file for fold in (0, 1) for file in fold_files(f"{run}/fold-{fold}", epochs, rows)]


def run_files(run: str, submission: str, columns: tuple[str, ...]) -> list[Expected]:
    """Files that a run of two folds on 32 images writes; its ensemble predicts 8 images."""
    return [
        *split_files(run, 32),
        *fold_pair_files(run, 2, 16),
        *ensemble_files(f"{run}/ensemble/output", submission, columns, 8),
        *report_files(f"{run}/evaluate/output", 4),
    ]


SYSTEMS: dict[str, System] = {}
SUBMISSION = "submission_fold5_ensemble_{}.csv"
STUDENT = "Student_stage2_fold1_best.pth"
CAR_COLUMNS = ("ID", *sorted(toy_layouts.CARS))


def b5_commands(root: Path) -> Iterator[Command]:
    yield submit("car_efficientnet_b5:smoke", "train=open.zip", "eval=open.zip", "run=C")
    for name in "AB":
        recipe = f"car_efficientnet_b5:{name.lower()},smoke"
        yield submit(recipe, "train=open.zip", "eval=open.zip", f"run={name}", "stages=split,train-fold,ensemble")
    runs = ",".join(f"runs/{name}" for name in "ABC")
    yield job("compare", f"compare.runs={runs}", SM_GROUND_TRUTH_DIR="runs/C", SM_OUTPUT_DATA_DIR="compare")
    yield export("runs/C/distill", "student", STUDENT)


SYSTEMS["car_efficientnet_b5"] = System(
    draw=toy_layouts.draw_cars,
    commands=b5_commands,
    files=(
        *run_files("runs/C", SUBMISSION.format("C"), CAR_COLUMNS),
        *fold_files("runs/C/distill", 3),
        *report_files("runs/C/evaluate-student/output", 4)[:2],
        *ensemble_files("runs/A/ensemble/output", SUBMISSION.format("A"), CAR_COLUMNS, 8),
        *ensemble_files("runs/B/ensemble/output", SUBMISSION.format("B"), CAR_COLUMNS, 8),
        Expected("runs/C/ensemble/output/csv/output_car_efficientnet_b5.csv", CAR_COLUMNS, 8),
        Expected(f"student/{STUDENT}", least=10_000),
        Expected("compare/all_experiments_submission_compare.csv", ("experiment", *CAR_COLUMNS), 3 * 8),
        Expected("compare/comparison.csv", rows=3),
        Expected("compare/model_acc.png", least=2_000),
        Expected("compare/correlation.png", least=2_000),
        Expected("compare/compare.html", least=5_000),
    ),
)


def convnext_commands(root: Path) -> Iterator[Command]:
    stages = "stages=split,train-fold,ensemble,evaluate"
    yield submit("car_convnext_tiny:smoke", "train=open.zip", "eval=open.zip", "run=convnext", stages)
    yield export("runs/convnext/fold-0", "best", "best_model_ema.pth")
    yield export("runs/convnext/fold-0", "raw", "best_model.pth", "export.weights=raw")


SYSTEMS["car_convnext_tiny"] = System(
    draw=toy_layouts.draw_cars,
    commands=convnext_commands,
    files=(
        *run_files("runs/convnext", "convnexttiny_ema_submission.csv", CAR_COLUMNS),
        *(Expected(f"runs/convnext/fold-{fold}/model/model_raw.safetensors", least=10_000) for fold in (0, 1)),
        Expected("best/best_model_ema.pth", least=10_000),
        Expected("raw/best_model.pth", least=10_000),
    ),
)


def sketch_commands(root: Path) -> Iterator[Command]:
    stages = "stages=split,train-fold,ensemble,evaluate"
    yield submit("sketch_caformer:smoke", "train=data", "eval=data", "run=caformer", stages)
    yield submit("sketch_caformer:smoke,resnet101", "train=data", "eval=data", "run=resnet101", stages)
    channels = {"SM_CHANNEL_MODEL": "runs", "SM_CHANNEL_EVAL": "data", "SM_OUTPUT_DATA_DIR": "blend"}
    yield job("ensemble", "recipe=sketch_caformer:smoke", **channels)


ANSWER_COLUMNS = ("ID", "image_path", "target")
SYSTEMS["sketch_caformer"] = System(
    draw=toy_layouts.draw_sketches,
    commands=sketch_commands,
    files=(
        *run_files("runs/caformer", "output.csv", ANSWER_COLUMNS),
        *fold_pair_files("runs/resnet101", 2, 16),
        *ensemble_files("blend", "output.csv", ANSWER_COLUMNS, 8),
        Expected("blend/csv/output_sketch_caformer.csv", ("image_path", "0", "1", "2", "3"), 8),
        Expected("blend/csv/output_sketch_caformer_resnet101.csv", ("image_path", "0", "1", "2", "3"), 8),
    ),
)


def product_commands(root: Path) -> Iterator[Command]:
    yield submit("product_image_type:smoke", "train=data")
    (run,) = [path.name for path in (root / "runs").glob("run_*")]
    recipe, model = "recipe=product_image_type:smoke", f"model=runs/{run}/fold-0"
    yield job("predict", recipe, model, "images=batch.csv", "output=.", printed="batch.out")
    yield job("predict", recipe, model, "images=data", f"folds=runs/{run}/split", "output=parts", "predict.folder=")
    images = [f"data/사진/P{number:03d}/other_0.jpg" for number in range(3)]
    api = ("-c", API, f"runs/{run}/fold-0", images[0], "broken.jpg", *images[1:])
    yield Command((), program=api, printed="api.out")


PRODUCT_COLUMNS = ("product_id", "image_path", "image_type")
SYSTEMS["product_image_type"] = System(
    draw=toy_layouts.draw_products,
    commands=product_commands,
    files=(
        *split_files("runs/run_????????_??????_????????", 120),
        Expected("runs/run_*/split/output/train_data.csv", PRODUCT_COLUMNS, 96),
        Expected("runs/run_*/split/output/validation_data.csv", PRODUCT_COLUMNS, 12),
        Expected("runs/run_*/split/output/test_data.csv", PRODUCT_COLUMNS, 12),
        Expected("runs/run_*/split/output/data_split_summary.json"),
        *fold_files("runs/run_*/fold-0", 3),
        *report_files("runs/run_*/evaluate/output", 4),
        Expected("runs/run_*/evaluate/output/wrong_test.csv"),
        Expected("test_result/run_????????_??????_????????/inference_results.csv", RESULTS, 6),
        *(
            Expected(f"parts/wrong_{part}.csv", ("id", "path", "true_class", "predicted_class", "confidence"))
            for part in ("train", "valid", "test")
        ),
        Expected("parts/inference_results.csv", RESULTS, 120),
        Expected("api.out", RESULTS[:3], 4),
    ),
)


def mask_commands(root: Path) -> Iterator[Command]:
    for recipe, name in (("mask_gender", "exp"), ("age", "exp2")):
        variables = {"RECIPE": f"mask_profile:{recipe},smoke", "SM_CHANNEL_TRAIN": "train"}
        yield job("train", SM_MODEL_DIR=f"model/{name}", **variables)
    variables = {"SM_CHANNEL_EVAL": "eval", "SM_CHANNEL_MODEL": "model", "SM_OUTPUT_DATA_DIR": "output"}
    yield job("inference", **variables)
    yield job("evaluation", SM_GROUND_TRUTH_DIR="truth", SM_OUTPUT_DATA_DIR="output", printed="inference.out")
    for recipe in ("mask_gender", "age"):
        arguments = ("train=train", "run=exp", "increment=true", "stages=split,train-fold")
        yield submit(f"mask_profile:{recipe},smoke", *arguments)
    variables = {"SM_CHANNEL_MODEL": "runs", "SM_CHANNEL_EVAL": "eval", "SM_OUTPUT_DATA_DIR": "product"}
    yield job("ensemble", "recipe=mask_profile:smoke", "ensemble.blend=product", **variables)
    yield job("evaluation", SM_GROUND_TRUTH_DIR="truth", SM_OUTPUT_DATA_DIR="product", printed="product.out")


SYSTEMS["mask_profile"] = System(
    draw=toy_layouts.draw_faces,
    commands=mask_commands,
    files=(
        Expected("model/exp/model.safetensors", least=10_000),
        Expected("model/exp/train_log.csv", TRAIN_LOG, 2),
        Expected("model/exp/output/tensorboard/events.*"),
        Expected("model/exp/output/validation_examples.png", least=2_000),
        Expected("model/exp2/model.safetensors", least=10_000),
        Expected("model/exp/output/split/folds.parquet", (*FOLDS_TABLE, REST), 84),
        *fold_pair_files("runs/exp", 2, 42),
        *fold_pair_files("runs/exp2", 2, 42),
        Expected("output/output.csv", ("ImageID", "ans"), 18),
        *ensemble_files("product", "output.csv", ("ImageID", "ans"), 18),
        Expected("inference.out", SCORES, 1),
        Expected("product.out", SCORES, 1),
    ),
)
