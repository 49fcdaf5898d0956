"""What a system is: one frozen model a section, every key with its type, default and meaning.

A recipe is a TOML (or JSON) file with these sections. `settings.py` beside this file lays the
command line, the environment and hyperparameters over it. Settings stop at `assemble.py`: below
it functions take plain arguments.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from fivefold.sections import Compare, Data, Ensemble, Evaluate, Export, Kubernetes, SageMaker, Section, Serve, Spec
from fivefold.training_sections import Augment, Train


class Split(Section):
    folds: int = Field(5, ge=2, description="number of folds")
    stratify: bool = Field(True, description="give every fold the same shares of the classes")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of rows that no model trains or selects on")
    parts: list[float] = Field([], description="instead of folds: shares of train, valid and test, e.g. [.8,.1,.1]")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of the shuffle")
    open_images: bool = Field(
        True,
        description="open every image once: finds broken, missing and equal ones; false: a CSV's paths are taken on trust",
    )
    csv: bool = Field(
        False, description="also write train_data.csv, validation_data.csv and test_data.csv; products: always"
    )
    skip_unreadable: bool = Field(False, description="leave unreadable images out, instead of stopping")
    max_unpacked_gib: float = Field(200.0, gt=0, description="largest size a .zip may unpack to")

    @model_validator(mode="after")
    def _parts_sum_to_one(self) -> "Split":
        if self.parts and (len(self.parts) != 3 or min(self.parts) < 0 or abs(sum(self.parts) - 1) > 1e-6):
            raise ValueError("parts are three shares (train, valid, test) that sum to 1")
        if self.parts and self.parts[1] == 0:
            raise ValueError("parts need a valid share above 0: the best epoch is chosen on it")
        if self.parts and self.holdout:
            raise ValueError("parts and holdout exclude each other: the test part is the holdout")
        return self


class Model(Section):
    backbone: str = Field(
        "timm/resnet18", description="timm/NAME, torchvision/NAME, efficientnet_pytorch/NAME, fivefold/NAME"
    )
    options: dict[str, Any] = Field(
        {}, description="further arguments of the backbone; torchvision's bare=true: nothing between pooling and head"
    )
    pretrained: bool = Field(False, description="start from the weights of the backbone's own hub")
    weights: str = Field(
        "", description="start from a .safetensors or .pth file: a path, or a name in SM_CHANNEL_WEIGHTS"
    )
    factors: list[str] = Field(
        [], description="know these factors of the classes alone, e.g. mask,gender; empty: the classes as they are"
    )
    drop_path: float | None = Field(
        None, ge=0, lt=1, description="share of residual branches left out (stochastic depth); none: the backbone's own"
    )
    head: Spec = Field(
        "linear", description="what turns features into classes: linear, mlp or convnext, or a table with parameters"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the last layer")
    meta: list[str] = Field([], description="numbers of the whole image that join the features: aspect, color_mean")
    image_size: int | list[int] = Field(224, description="pixels that it takes: one number, or [height, width]")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="of each channel, images in 0..1")
    std: list[float] = Field([0.229, 0.224, 0.225], description="of each channel, images in 0..1")

    @model_validator(mode="after")
    def _shapes(self) -> "Model":
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError("image_size is one positive number, or [height, width]")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std are three numbers each, and std is positive")
        if len(set(self.meta)) < len(self.meta):
            raise ValueError("meta names a feature twice")
        return self

    @property
    def size(self) -> tuple[int, ...]:
        """(height, width) in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)


class Predict(Section):
    batch_size: int = Field(0, ge=0, description="images a step; 0: twice that of training")
    device: str = Field("auto", description="auto (CUDA, else MPS, else the CPU), cuda, mps or cpu")
    file: str = Field("predictions.csv", description="predict: file name of the table of images and their classes")
    folder: str = Field("", description="predict: folder below the output in which each run makes a run_…; empty: none")
    rows: list[str] = Field(
        ["train", "valid", "test"], description="predict, with SM_CHANNEL_FOLDS: rows of the split that are predicted"
    )
    views: list[Spec] = Field(
        ["plain"],
        description="views that are averaged: plain, flip, rotate (degrees), shift (x, y), scale (factor), five_crops (share); "
        "with flip = true mirrored too",
    )

    @model_validator(mode="after")
    def _names_alone(self) -> "Predict":
        for key, name in (("file", self.file or "/"), ("folder", self.folder)):
            if set(name) & set("/\\") or name in (".", ".."):
                raise ValueError(f"{key}={name!r} is not a name alone, for a place in the output's folder")
        if not self.rows or set(self.rows) - {"train", "valid", "test"}:
            raise ValueError(f"rows={self.rows} are not some of train, valid and test")
        return self

    @model_validator(mode="after")
    def _a_view_at_least(self) -> "Predict":
        if not self.views:
            raise ValueError("views is empty; to see each image as it is, write plain")
        return self


class Distill(Section):
    teacher: str = Field("oof", description="oof (leak-free), best_fold, ensemble, or the path of a model dir")
    views: list[Spec] = Field([], description="further views that the teacher's target is averaged over")
    alpha: float = Field(0.7, ge=0, le=1, description="weight of the teacher's term; the labels' has the rest")
    annealing: float = Field(0.0, ge=0, le=1, description="share of the steps over which alpha falls to 0; 0: it stays")
    temperature: float = Field(2.0, gt=0, description="softens teacher and student in the teacher's term")
    temperature_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the temperature from epoch to epoch; 1: fixed"
    )
    temperature_end: float = Field(1.0, gt=0, description="with temperature_decay: least temperature")
    patience: int = Field(0, ge=0, description="early stopping, on the holdout alone; 0: all epochs")
    model: dict[str, Any] = Field({}, description="what the student has otherwise than [model]")
    train: dict[str, Any] = Field({}, description="what the student has otherwise than [train]")

    @model_validator(mode="after")
    def _cools(self) -> "Distill":
        if self.temperature_decay < 1 and self.temperature_end >= self.temperature:
            raise ValueError(
                f"temperature={self.temperature} cannot fall to temperature_end={self.temperature_end}: the end is lower"
            )
        return self


class Settings(Section):
    """All settings of a run. A stage reads the sections that `contract.stages` names for it."""

    recipe: str = Field("", description="a shipped recipe's name, or the path of a .toml or .json file")
    system: str = Field("", description="name of the models made of this recipe; empty: the recipe's name")
    seed: int = Field(42, ge=0, description="of weights, order and augmentation")
    fold: int | None = Field(None, ge=0, description="the fold to train (or to export); FOLD or JOB_COMPLETION_INDEX")
    stage: str = Field("", description="the stage, where no argument names it")
    run: str = Field("", description="the run's name, the title of its report; a stage reads and writes in its folder")
    runs: str = Field("runs", description="where the folders of all runs are, or an s3://bucket/prefix")
    reuse: Literal["strict", "warn", "force"] = Field(
        "warn", description="a result of other code or packages: strict makes it anew, warn says so, force is silent"
    )
    data: Data = Data()
    split: Split = Split()
    model: Model = Model()
    augment: Augment = Augment()
    train: Train = Train()
    predict: Predict = Predict()
    ensemble: Ensemble = Ensemble()
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    distill: Distill = Distill()
    export: Export = Export()
    serve: Serve = Serve()
    sagemaker: SageMaker = SageMaker()
    kubernetes: Kubernetes = Kubernetes()

    def student(self) -> "Settings":
        """The same settings with `[distill.model]` and `[distill.train]` laid over `[model]` and `[train]`."""
        model = Model.model_validate({**self.model.model_dump(), **self.distill.model})
        train = Train.model_validate({**self.train.model_dump(), **self.distill.train})
        return self.model_copy(update={"model": model, "train": train})


SECTIONS = {name for name, field in Settings.model_fields.items() if isinstance(field.default, Section)}
EXECUTION_KEYS = {"stage", "run", "runs", "reuse", "data.cache", "data.cache_gib", "data.on_device"} | {
    f"train.{name}"
    for name in ("checkpoint_minutes", "checkpoint_steps", "keep_in_memory", "project", "trackers", "workers")
}
"""Keys that cannot change a result: they are left out of a stage's key."""
