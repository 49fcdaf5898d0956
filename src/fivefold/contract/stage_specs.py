"""The stages: the channels that each stage reads, the files that it writes and the settings that it uses."""

from dataclasses import dataclass

FOLDS = "folds.parquet"
CLASSES = "classes.json"
SPLIT_SUMMARY = "split_summary.json"
OVERLAP = "test_overlap.csv"
WEIGHTS = "model.safetensors"
RAW_WEIGHTS = "model_raw.safetensors"
MODEL = "model.json"
OOF = "oof.parquet"
HOLDOUT = "holdout.parquet"
TRAIN_LOG = "train_log.csv"
CURVES = "training_curves.png"
EXAMPLES = "validation_examples.png"
PREDICTIONS = "predictions.parquet"
ENSEMBLE = "ensemble.json"
EXPORT = "export.json"
LABELS = "labels.csv"
ODD_IMAGES = "odd_images.csv"
AUDIT = "audit.json"
AUDIT_PAGE = "audit.html"
PER_SYSTEM_CSV = "csv"
OUTPUT = "output.csv"
METRICS = "metrics.json"
REPORT = "report.html"
COMPARISON = "compare.html"
RECORD = "stage.json"
FAILURE = "failure"
LOG_COLUMNS = (
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss", "val_f1_macro", "lr"
)  # fmt: skip
"""The columns of the training log."""
LOGGED_METRICS = LOG_COLUMNS[1:-1]
"""The columns that the line `metric fold=…` contains."""


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline, as its container runs it.

    - `channels` are required, `optional` channels are not.
    - `hashed`: the channels whose bytes enter the stage's key. The images of a split are not hashed, because
      `folds.parquet` holds their digests. No key includes a `cache` channel, because it cannot change a result.
    - `recorded_channels`: the key records only whether these channels are set. They supply images for plots, and change no metric.
    - `output_channel`: the channel that is read from the output data folder if it is not set.
    - `output_in_model`: the output data folder is `output/` in the model folder if it is not set.
    - `sections`: sections of the settings, or single keys of a section.
    - `never_skipped`: the stage never skips, because its result is what it prints.
    """

    name: str
    summary: str
    hashed: tuple[str, ...]
    channels: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    writes_model: bool = False
    recorded_channels: tuple[str, ...] = ()
    output_channel: str = ""
    output_in_model: bool = False
    never_skipped: bool = False
    path_arguments: bool = False
    """Whether channels may also be arguments, as in `images=photo.jpg`: for stages that people run by hand."""

    @property
    def module(self) -> str:
        """Return the module of jobs/ that runs the stage, relative to that package."""
        return f".{self.name.replace('-', '_')}"


_IMAGES = tuple(
    f"data.{name}"
    for name in ("resize_shorter_side", "jpeg_draft", "cache", "cache_gib", "max_unpacked_gib", "max_megapixels")
)
_ANSWER = ("ensemble.answer", "ensemble.positive_class")
_PLANNED = ("data", "split", "model", "augment", "train", "predict", "ensemble", "distill")
_TRAINING = ("offline", *_IMAGES, "model", "augment", "train", "predict")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="split",
            summary="images -> folds.parquet: folds, groups, holdout, digests; checks test images",
            channels=("train",),
            optional=("eval",),
            hashed=("train", "eval"),
            sections=("data", "split", "ensemble.unreadable", *_ANSWER),
        ),
        Stage(
            name="plan",
            summary="a split -> recipe.toml: settings for this data and this machine, with reasons",
            channels=("train", "folds"),
            optional=("weights",),
            hashed=("folds", "weights"),
            sections=(*_PLANNED, "system", "seed", "offline", "time", "budget", "hourly_price"),
        ),
        Stage(
            name="prepare",
            summary="images -> image cache: decode every image once for all stages",
            channels=("train", "folds"),
            optional=("eval", "unlabeled"),
            hashed=("folds", "eval", "unlabeled"),
            sections=("data",),
        ),
        Stage(
            name="train-fold",
            summary="train one fold's model and predict its out-of-fold rows",
            channels=("train", "folds"),
            optional=("weights", "cache"),
            hashed=("folds", "weights"),
            sections=("system", "seed", "fold", *_TRAINING),
            writes_model=True,
        ),
        Stage(
            name="ensemble",
            summary="fold models, submission files -> predictions.parquet and the submission",
            optional=("eval", "model", "folds", "submissions", "cache"),
            hashed=("model", "eval", "folds", "submissions"),
            sections=("data", "predict", "ensemble"),
        ),
        Stage(
            name="evaluate",
            summary="predictions and ground truth -> metrics.json, plots, report.html",
            optional=("predictions", "ground_truth", "eval", "train", "model", "folds"),
            hashed=("predictions", "ground_truth", "model", "folds"),
            sections=("data", "evaluate", *_ANSWER),
            recorded_channels=("eval", "train"),
            output_channel="predictions",
        ),
        Stage(
            name="audit",
            summary="a split, fold models or pretrained weights -> labels.csv, audit.html: labels and images to look at",
            channels=("train", "folds"),
            optional=("model", "weights", "cache"),
            hashed=("folds", "model", "weights"),
            sections=("system", "seed", *_TRAINING, "audit"),
        ),
        Stage(
            name="compare",
            summary="compare runs and submission files -> tables, plots, compare.html",
            optional=("runs", "submissions", "ground_truth"),
            hashed=("runs", "submissions", "ground_truth"),
            sections=("compare", *_ANSWER),
        ),
        Stage(
            name="predict",
            summary="one image, a folder or a table of images -> predictions.csv: classes and confidences",
            channels=("images", "model"),
            optional=("folds", "cache"),
            hashed=("images", "model", "folds"),
            sections=("data", "predict"),
            never_skipped=True,
            path_arguments=True,
        ),
        Stage(
            name="export",
            summary="a student, a fold model or an ensemble -> one ONNX or .pth file",
            channels=("model",),
            optional=("ensemble",),
            hashed=("model", "ensemble"),
            sections=("fold", "predict", "export"),
        ),
        Stage(
            name="distill",
            summary="distill the fold models into one student",
            channels=("train", "folds", "model"),
            optional=("unlabeled", "weights", "cache"),
            hashed=("folds", "model", "unlabeled", "weights"),
            sections=("system", "seed", *_TRAINING, "distill"),
            writes_model=True,
        ),
        Stage(
            name="train",
            summary="split and train one fold in one stage, without a folds channel",
            channels=("train",),
            optional=("weights", "cache"),
            hashed=("train", "weights"),
            sections=("system", "seed", "offline", "fold", "data", "split", "model", "augment", "train", "predict"),
            writes_model=True,
            output_in_model=True,
        ),
        Stage(
            name="inference",
            summary="the models of a channel -> output.csv with the requested columns",
            channels=("model", "eval"),
            hashed=("model", "eval"),
            sections=("data", "predict", "ensemble.unreadable", *_ANSWER),
        ),
        Stage(
            name="evaluation",
            summary="output.csv and gt.csv -> accuracy and macro F1 as JSON on stdout",
            channels=("ground_truth",),
            optional=("predictions",),
            hashed=("ground_truth",),
            sections=_ANSWER,
            never_skipped=True,
        ),
    )
}
