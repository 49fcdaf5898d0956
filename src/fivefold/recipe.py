"""What a system is: one frozen model a section, every key with its type, default and meaning.

A recipe is a TOML (or JSON) file with these sections. `settings.py` beside this file lays the
command line, the environment and hyperparameters over it. Settings stop at `assemble.py`: below
it functions take plain arguments.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Spec = str | dict[str, Any]
"""A thing with parameters, by name: `"horizontal_flip"` or `{ name = "rotation", degrees = 15 }`."""


IMAGE_TYPES = {
    "main_image": "full_shot",
    "back_image": "full_shot",
    "text_tag_image": "care_label",
    "neck_tag_image": "neck_label",
    "other": "detail_shot",
}


Blend = Literal["mean", "weighted", "fitted", "geometric", "rank", "vote", "product", "greedy", "greedy_accuracy"]
ImageFormat = Literal["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM"]


MAX_NAME_BYTES = 150
"""Of the names of a system and of a run, which are parts of file names."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


def _check_name(key: str, name: str, needed: bool = False) -> None:
    if set(name) & set("/\\") or name in (".", "..") or (needed and not name):
        raise ValueError(f"{key}={name!r} is not a name alone, for a place in the output's folder")


class Data(Section):
    layout: str = Field("auto", description="auto, folders, mask_profiles (one a person), csv, or products (one a row)")
    table: str = Field("", description="the CSV below the channel; empty: train.csv, or the only one")
    id_column: str = Field("", description="CSV column of row ids; empty: id if there is one, else the path")
    path_column: str = Field("", description="CSV column of image paths; empty: image_path, img_path, path or the like")
    label_column: str = Field("", description="CSV column of classes; empty: target, label, class_name or the like")
    group_column: str = Field("", description="CSV column of groups that no fold may part (people, products)")
    base_path: str = Field("", description="folder that a CSV's paths count from; empty: the one where they exist")
    category_column: str = Field("", description="products: column of categories; empty: category_name or category")
    image_types: dict[str, str] = Field(IMAGE_TYPES, description="products: the class of the images in each column")
    age_cuts: list[float] = Field([30, 60], description="mask_profiles: ages at which the next class of age begins")
    same_classes: list[list[str]] = Field([], description='names that mean the same class, as [["A", "B"], ["C", "D"]]')
    same_class: Literal["none", "merge", "sum"] = Field("none", description="same_classes: one class, or summed later")
    store_size: int = Field(0, ge=0, description="shorter side, in pixels, that images are shrunk to first; 0: as is")
    scaled_decoding: bool = Field(False, description="decode JPEGs at 1/2, 1/4 or 1/8, not below store_size: faster")
    cache: str = Field("auto", description="folder of decoded images for all stages; auto: .cache beside the runs; off")
    cache_gib: float = Field(64.0, gt=0, description="largest size of an image cache; one that is larger is not made")
    max_unpacked_gib: float = Field(200.0, gt=0, description="largest size a .zip may unpack to")
    max_megapixels: float = Field(100.0, gt=0, description="largest image, in millions of pixels")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if not self.age_cuts or sorted(set(self.age_cuts)) != self.age_cuts or self.age_cuts[0] <= 0:
            raise ValueError(f"age_cuts={self.age_cuts} are ages above 0, each larger than the one before")
        names = [name for group in self.same_classes for name in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if any(len(group) < 2 for group in self.same_classes):
            raise ValueError("same_classes are groups of two names or more")
        if twice:
            raise ValueError(f"same_classes name {twice[0]!r} twice; a name is in one group, once")
        if self.same_class != "none" and not names:
            raise ValueError(f"same_class={self.same_class} needs same_classes, the groups of names")
        if self.scaled_decoding and not self.store_size:
            raise ValueError("scaled_decoding=true needs store_size, below which nothing is scaled")
        return self


class Split(Section):
    folds: int = Field(5, ge=2, description="number of folds")
    stratify: bool = Field(True, description="give every fold the same shares of the classes")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of rows that no model trains or selects on")
    parts: list[float] = Field([], description="instead of folds: shares of train, valid and test, e.g. [.8,.1,.1]")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of the shuffle")
    open_images: bool = Field(True, description="open all once to find broken and equal ones; false: a CSV is trusted")
    csv: bool = Field(False, description="also write train, validation and test as CSVs; products: always")
    skip_unreadable: bool = Field(False, description="leave unreadable images out, instead of stopping")

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
    backbone: str = Field("timm/resnet18", description="timm/, torchvision/, efficientnet_pytorch/ or fivefold/NAME")
    options: dict[str, Any] = Field({}, description="arguments of the backbone; torchvision's bare=true: pooling alone")
    pretrained: bool = Field(False, description="start from the weights of the backbone's own hub")
    weights: str = Field("", description="start from this file, also a checkpoint: a path, or in SM_CHANNEL_WEIGHTS")
    factors: list[str] = Field([], description="factors of the classes to know, e.g. mask,gender; empty: the classes")
    drop_path: float | None = Field(None, ge=0, lt=1, description="stochastic depth; none: the backbone's own")
    head: Spec = Field("linear", description="linear, mlp or convnext, or a table with parameters")
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

    @model_validator(mode="after")
    def _options_load_nothing(self) -> "Model":
        """Weights come from `pretrained` and `weights` alone: an option may name a file or an address that nobody checks."""
        for option in self.options:
            if option.startswith(("pretrained", "weights", "checkpoint", "cache_dir")):
                raise ValueError(f"options.{option}: no option loads weights; set pretrained=true, or weights=PATH")
        return self

    @property
    def size(self) -> tuple[int, ...]:
        """(height, width) in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)


class Augment(Section):
    train: list[Spec] = Field(
        [{"name": "random_resized_crop", "scale": [0.7, 1.0]}, "horizontal_flip"],
        description="transforms of a training image, in order",
    )
    eval: list[Spec] = Field(["resize"], description="transforms of an image that is predicted, in order")
    mix: str = Field("none", description="mixing of a batch: none, mixup or cutmix")
    mix_alpha: float = Field(1.0, gt=0, description="lambda ~ Beta(alpha, alpha)")
    mix_p: float = Field(1.0, ge=0, le=1, description="share of batches that are mixed")
    mix_off_epochs: int = Field(0, ge=0, description="last epochs without mixing, in which images are as they will be")


class Train(Section):
    epochs: int = Field(30, ge=1, description="passes over the training rows")
    batch_size: int = Field(32, ge=1, description="images a step")
    accumulate: int = Field(1, ge=1, description="batches that are one step together")
    drop_last: bool = Field(False, description="leave out a last batch that is not full (else if under 1/8, or 1 row)")
    loss: Spec = Field("cross_entropy", description="cross_entropy, label_smoothing, focal, binary_focal, bce or f1")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: rare classes count more")
    sampler: str = Field("shuffle", description="shuffle: every row once an epoch; balanced: classes in equal parts")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a target spread over all classes")
    rdrop_alpha: float = Field(
        0.0, ge=0, description="weight of R-Drop (half the α of the paper, which adds two losses); 0: none"
    )
    update: str = Field("plain", description="a step: plain, or sam (two gradients)")
    sam_rho: float = Field(0.05, ge=0, description="sam: how far up the gradient the second one is taken")
    optimizer: str = Field("adamw", description="adamw, adam, sgd (Nesterov) or muon (AdamW where it does not apply)")
    lr: float = Field(1e-3, gt=0, description="largest learning rate")
    backbone_lr: float = Field(1.0, gt=0, le=1, description="the backbone's share of the learning rate")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from a layer to that before (timm/… alone)"
    )
    freeze_epochs: int = Field(0, ge=0, description="first epochs in which the backbone stays as it is, BatchNorm too")
    weight_decay: float = Field(1e-4, ge=0, description="not applied to norms, biases, scales and what timm exempts")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and muon")
    schedule: str = Field("cosine", description="constant, cosine or step")
    warmup_epochs: float = Field(0.0, ge=0, description="linear rise of the learning rate at the start")
    step_epochs: int = Field(10, ge=1, description="step: epochs between two drops")
    gamma: float = Field(0.5, gt=0, lt=1, description="step: factor of a drop")
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of the averaged weights; 0: no averaging")
    patience: int = Field(0, ge=0, description="epochs without improvement before the end; 0: never")
    validate_every: int = Field(1, ge=1, description="epochs between validations; the last epoch is always validated")
    monitor: str = Field("logloss", description="what chooses the best epoch: logloss, loss, acc or f1_macro")
    precision: str = Field("auto", description="fp32, bf16, bf16_grouped_fp32, fp16, or auto: the fastest in a probe")
    channels_last: bool = Field(True, description="NHWC memory, faster on most machines")
    cpu_convs: bool = Field(True, description="on CPUs: convolutions with quicker gradients than torch's own")
    compile: bool = Field(False, description="on CUDA: torch.compile the backbone; slow to start, then faster")
    keep_raw: bool = Field(False, description="with ema_decay: also keep the best unaveraged weights (validates twice)")
    deterministic: bool = Field(True, description="on CUDA: same bits each time where kernels can; false: the fastest")
    device: str = Field("auto", description="auto, cuda, mps or cpu")
    workers: int = Field(-1, ge=-1, description="loader processes; -1: chosen for the machine")
    keep_in_memory: bool = Field(True, description="keep decoded images in memory while they fit in 1 GiB")
    checkpoint_minutes: float = Field(10.0, ge=0, description="minutes between checkpoints within an epoch; 0: none")
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints within an epoch; 0: by time alone")
    trackers: list[str] = Field(["tensorboard"], description="who keeps the run's figures: tensorboard, wandb, mlflow")
    project: str = Field("fivefold", min_length=1, description="of wandb, and the experiment of mlflow")


class Predict(Section):
    batch_size: int = Field(0, ge=0, description="images a step; 0: twice that of training")
    device: str = Field("auto", description="auto (CUDA, else MPS, else the CPU), cuda, mps or cpu")
    file: str = Field("predictions.csv", description="predict: file name of the table of images and their classes")
    folder: str = Field("", description="predict: folder below the output in which each run makes a run_…; empty: none")
    rows: list[str] = Field(["train", "valid", "test"], description="predict, with SM_CHANNEL_FOLDS: rows to predict")
    views: list[Spec] = Field(["plain"], description="views to average: plain, flip, rotate, shift, scale, five_crops")

    @model_validator(mode="after")
    def _check(self) -> "Predict":
        _check_name("file", self.file, needed=True)
        _check_name("folder", self.folder)
        if not self.rows or set(self.rows) - {"train", "valid", "test"}:
            raise ValueError(f"rows={self.rows} are not some of train, valid and test")
        if not self.views:
            raise ValueError("views is empty; to see each image as it is, write plain")
        return self


class Ensemble(Section):
    blend: Blend = Field("fitted", description="between systems; fitted: weights by out-of-fold logloss")
    weights: dict[str, Any] = Field({}, description="of blend weighted: a number for each system, by its name")
    within: Literal["mean", "geometric", "rank", "vote"] = Field("mean", description="between the models of one system")
    submissions: list[str] = Field([], description="submission files that are systems too, as SM_CHANNEL_SUBMISSIONS")
    temperature: Literal["none", "holdout"] = Field("holdout", description="fitted on the holdout if there is one")
    unreadable: Literal["error", "prior"] = Field(
        "error", description="test images that cannot be read: an error, or the classes' shares in training"
    )
    submission: str = Field("submission.csv", description="file name of the submission")
    answer: Literal["auto", "class", "number", "probability"] = Field(
        "auto", description="what a sample's single column holds; auto: what its values look like"
    )
    positive_class: str = Field("", description="the class whose probability a sample's single column holds")
    answer_column: str = Field("", description="column of predicted classes if no sample names one; empty: one a class")
    number_column: str = Field("", description="with answer_column: first column, of the rows' numbers; empty: none")

    @model_validator(mode="after")
    def _check(self) -> "Ensemble":
        if bool(self.weights) != (self.blend == "weighted"):
            raise ValueError(f"weights={self.weights}: blend weighted has weights, others have none")
        for name, value in self.weights.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"weights.{name}={value!r}: a number from 0 on is needed")
        _check_name("submission", self.submission, needed=True)
        if self.number_column and self.number_column == self.answer_column:
            raise ValueError(f"number_column and answer_column are both {self.number_column!r}; name two columns")
        if self.number_column and not self.answer_column:
            raise ValueError(f"number_column={self.number_column!r} needs answer_column, the column of the classes")
        if self.positive_class and self.answer in ("class", "number"):
            raise ValueError(
                f"answer={self.answer} has no positive_class={self.positive_class!r}; leave one of them out"
            )
        return self


class Distill(Section):
    teacher: str = Field("oof", description="oof (leak-free), best_fold, ensemble, or the path of a model dir")
    views: list[Spec] = Field([], description="further views that the teacher's target is averaged over")
    alpha: float = Field(0.7, ge=0, le=1, description="weight of the teacher's term; the labels' has the rest")
    annealing: float = Field(0.0, ge=0, le=1, description="share of the steps over which alpha falls to 0; 0: it stays")
    temperature: float = Field(2.0, gt=0, description="softens teacher and student in the teacher's term")
    temperature_decay: float = Field(1.0, gt=0, le=1, description="factor of the temperature per epoch; 1: fixed")
    temperature_end: float = Field(1.0, gt=0, description="with temperature_decay: least temperature")
    patience: int = Field(0, ge=0, description="early stopping, on the holdout alone; 0: all epochs")
    model: dict[str, Any] = Field({}, description="what the student has otherwise than [model]")
    train: dict[str, Any] = Field({}, description="what the student has otherwise than [train]")

    @model_validator(mode="after")
    def _cools(self) -> "Distill":
        if self.temperature_decay < 1 and self.temperature_end >= self.temperature:
            raise ValueError(f"temperature={self.temperature} cannot fall to temperature_end={self.temperature_end}")
        return self


class Export(Section):
    format: str = Field("onnx", description="onnx (a graph with all its members), or pth (the state dict of one)")
    file: str = Field("", description="file name; empty: model.onnx, model.pth")
    weights: Literal["best", "raw"] = Field("best", description="best: those that predict (EMA); raw: not averaged")

    @model_validator(mode="after")
    def _a_name_alone(self) -> "Export":
        _check_name("file", self.file)
        return self


class Evaluate(Section):
    bins: int = Field(15, ge=1, description="bins of the calibration error")
    top_k: int = Field(5, ge=1, description="k of the top-k accuracy")
    gallery: int = Field(48, ge=0, description="most confident mistakes that the report shows as images")
    allow_empty: bool = Field(False, description="end without an error where no row has a ground truth")


class Serve(Section):
    host: str = Field("127.0.0.1", min_length=1, description="address to listen at; 0.0.0.0 (IPv6 too: ::) for others")
    port: int = Field(8080, ge=0, le=65535, description="port to listen at (or SAGEMAKER_BIND_TO_PORT); 0: a free one")
    batch_size: int = Field(32, ge=1, description="images of all requests that the model takes in one step at most")
    max_wait_ms: float = Field(5.0, ge=0, description="how long the first image of a batch waits for others")
    queue: int = Field(256, ge=1, description="images of all requests under way at most; the rest get 503")
    connections: int = Field(
        900, ge=2, description="most open connections; of more the one that sends longest is closed"
    )
    max_body_mb: float = Field(8.0, gt=0, description="largest body of a request, in millions of bytes")
    bodies_mb: float = Field(256.0, gt=0, description="bodies of all requests in memory, in millions of bytes at most")
    max_megapixels: float = Field(16.0, gt=0, description="largest image, in millions of pixels; JPEG: 4 times, halved")
    megapixels_at_once: float = Field(0.0, ge=0, description="of all images being decoded; 0: a quarter of free memory")
    formats: list[ImageFormat] = Field(["JPEG", "PNG", "WEBP"], min_length=1, description="image files that are taken")
    timeout_s: float = Field(60.0, gt=0, description="seconds for a request to be received and answered")
    drain_s: float = Field(25.0, ge=0, description="seconds that requests under way have to be answered after SIGTERM")


class Compare(Section):
    runs: list[str] = Field([], description="folders of runs, each with its ensemble's submission, its models, or both")
    files: list[str] = Field([], description="submission files, beside those of SM_CHANNEL_SUBMISSIONS")


class SageMaker(Section):
    image: str = Field("", description="its URI in ECR; sagemaker-local: a local one, empty: fivefold:latest")
    role: str = Field("", description="ARN of the role that the jobs have, arn:aws:iam::ACCOUNT:role/NAME")
    output: str = Field("", description="s3://bucket/prefix below which each run has a folder of its name")
    region: str = Field("", description="empty: that of AWS_DEFAULT_REGION or of the profile")
    instance_type: str = Field("", description="of each job, as ml.g5.xlarge")
    instance_count: int = Field(1, ge=1, description="instances of a job that trains")
    volume_gb: int = Field(50, ge=1, description="disk of an instance")
    max_hours: float = Field(24.0, gt=0, le=672, description="longest runtime of a job")
    spot: bool = Field(False, description="spare capacity, cheaper and sometimes taken back; goes on from checkpoints")
    max_wait_hours: float = Field(0.0, ge=0, description="spot: longest time from request to end; 0: twice max_hours")
    keep_alive_minutes: int = Field(0, ge=0, le=360, description="warm pool: wait for the next job; not with spot")
    subnets: list[str] = Field([], description="of the VPC that jobs run in; with security_groups")
    security_groups: list[str] = Field([], description="of the VPC that jobs run in; with subnets")
    isolate: bool | None = Field(None, description="no network in the container; empty: where nothing is fetched")
    encrypt_traffic: bool = Field(False, description="what the hosts of a fold send one another; slower")
    kms_key: str = Field("", description="KMS key that encrypts outputs in S3")
    volume_kms_key: str = Field("", description="KMS key that encrypts disks; not for instances with NVMe disks")
    tags: dict[str, Any] = Field({}, description="of each job: texts by name")
    environment: dict[str, Any] = Field({}, description="further variables of each container, shown as ***")
    input_mode: Literal["File", "FastFile"] = Field("File", description="channels are copied first, or read when used")
    compress: bool = Field(True, description="outputs as model.tar.gz and output.tar.gz; false: as plain files")
    price: float = Field(0.0, ge=0, description="of an instance for an hour, as you pay it; 0: not given")
    max_cost: float = Field(0.0, ge=0, description="most that all jobs may cost, in the unit of price; 0: no limit")
    poll_seconds: float = Field(15.0, ge=0.1, description="seconds between two looks at a job")
    stages: dict[str, Any] = Field({}, description="of one stage: sagemaker.stages.ensemble.instance_type=ml.m5.xlarge")

    @model_validator(mode="after")
    def _check(self) -> "SageMaker":
        if self.spot and self.keep_alive_minutes:
            raise ValueError("spot and keep_alive_minutes exclude each other: spot instances have no warm pool")
        if self.max_wait_hours and not self.spot:
            raise ValueError(f"max_wait_hours={self.max_wait_hours:g} is of spot instances: set spot=true")
        if 0 < self.max_wait_hours < self.max_hours:
            raise ValueError(f"max_wait_hours={self.max_wait_hours:g} is less than max_hours={self.max_hours:g}")
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("subnets and security_groups go together: a VPC needs both")
        for key, table in (("tags", self.tags), ("environment", self.environment)):
            for name, value in table.items():
                if isinstance(value, bool) or not isinstance(value, str | int | float):
                    raise ValueError(f"{key}.{name} is no text but a {type(value).__name__}")
        for name, table in self.stages.items():
            if name not in STAGES_OF_A_RUN or not isinstance(table, dict):
                raise ValueError(f"stages.{name} is no table of a stage; the stages are {', '.join(STAGES_OF_A_RUN)}")
            unknown = sorted(set(table) - OF_A_STAGE)
            if unknown:
                raise ValueError(
                    f"stages.{name}.{unknown[0]} is nothing that a stage has: {', '.join(sorted(OF_A_STAGE))}"
                )
            try:
                self.of_stage(name)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, ("stages", name, *problem["loc"])))
                raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
        return self

    def of_stage(self, stage: str) -> "SageMaker":
        """These settings with what `stage` has otherwise; a hyphen in its name is as good as a `_`."""
        own = self.stages.get(stage.replace("-", "_"), {})
        return SageMaker.model_validate({**self.model_dump(), "stages": {}, **own}) if own else self


STAGES_OF_A_RUN = ("split", "train_fold", "ensemble", "evaluate", "distill")
OF_A_STAGE = frozenset(SageMaker.model_fields) - {"output", "region", "max_cost", "poll_seconds", "stages"}
"""The keys of `[sagemaker]` that a stage may have otherwise."""


QUANTITY = r"^\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?$"
"""An amount as Kubernetes writes it, of CPUs, memory or disk."""


class Kubernetes(Section):
    image: str = Field("fivefold:latest", min_length=1, description="the image of every pod")
    namespace: str = Field("", description="empty: that of kubectl's context")
    context: str = Field("", description="the cluster, as kubectl config names it; empty: the current one")
    claim: str = Field("fivefold", min_length=1, description="the claim with data and runs; made where it is not there")
    runs: str = Field("/runs", description="where runs lie: /runs of the claim, or s3://bucket/prefix")
    gpus: int = Field(1, ge=0, description="GPUs of a pod that trains or predicts; 0: none")
    cpus: int = Field(2, ge=1, description="CPUs that a pod asks for; without a GPU also the threads of its process")
    memory: str = Field("4Gi", pattern=QUANTITY, description="memory that a pod asks for; twice as much is its limit")
    limits: dict[str, Any] = Field({}, description='most that a pod may have, beside GPUs: cpu = 4, memory = "8Gi"')
    service_account: str = Field("", description="the pods' service account, for a role that may use s3://")
    queue: str = Field("", description="the LocalQueue of Kueue that Jobs wait in")
    poll_seconds: float = Field(5.0, ge=0.05, description="seconds between two looks at the Jobs")

    @model_validator(mode="after")
    def _check(self) -> "Kubernetes":
        for name, value in self.limits.items():
            if not re.fullmatch(QUANTITY, str(value)):
                raise ValueError(f"limits.{name}={value!r} is no quantity, as 4, 500m or 8Gi")
        return self


OF_PLATFORMS = ("sagemaker", "kubernetes")
"""Sections that say where stages run: they are no part of a model, and of no stage's key."""


class Settings(Section):
    """All settings of a run. A stage reads the sections that `contract.stages` names for it."""

    recipe: str = Field("", description="a shipped recipe's name, or the path of a .toml or .json file")
    system: str = Field("", description="name of the models made of this recipe; empty: the recipe's name")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="of weights, order and augmentation")
    fold: int | None = Field(None, ge=0, description="the fold to train (or to export); FOLD or JOB_COMPLETION_INDEX")
    stage: str = Field("", description="the stage, where no argument names it")
    run: str = Field("", description="the run's name, the title of its report; a stage reads and writes in its folder")
    runs: str = Field("runs", description="where the folders of all runs are, or an s3://bucket/prefix")
    reuse: Literal["strict", "warn", "force"] = Field("warn", description="results of other code: redo, warn or ignore")
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

    @model_validator(mode="after")
    def _check_names(self) -> "Settings":
        for key in ("system", "run"):
            if len(getattr(self, key).encode()) > MAX_NAME_BYTES:
                raise ValueError(f"{key} is longer than {MAX_NAME_BYTES} bytes, which file names have no room for")
        return self

    def student(self) -> "Settings":
        """The same settings with `[distill.model]` and `[distill.train]` laid over `[model]` and `[train]`."""
        model = Model.model_validate({**self.model.model_dump(), **self.distill.model})
        train = Train.model_validate({**self.train.model_dump(), **self.distill.train})
        return self.model_copy(update={"model": model, "train": train})


SECTIONS = {name for name, field in Settings.model_fields.items() if isinstance(field.default, Section)}
EXECUTION_KEYS = {"stage", "run", "runs", "reuse", "data.cache", "data.cache_gib", "data.max_unpacked_gib"} | {
    f"train.{name}"
    for name in ("checkpoint_minutes", "checkpoint_steps", "keep_in_memory", "project", "trackers", "workers")
}
"""Keys that cannot change a result: they are left out of a stage's key."""
