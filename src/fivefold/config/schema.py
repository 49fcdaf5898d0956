"""The schema of all settings: one frozen model per section, with the type, default and description of every key.

A recipe is a TOML or JSON file with these sections. `loading.py` overrides its values by hyperparameters,
environment variables and command-line arguments. Functions below `build.py` take plain arguments, not settings.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Spec = str | dict[str, Any]
"""A component by name, or by a table with parameters: `"horizontal_flip"` or `{ name = "rotation", degrees = 15 }`."""


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
"""Limit of the names of a system and of a run, because file names contain them."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


def _check_name(key: str, name: str, needed: bool = False) -> None:
    if set(name) & set("/\\") or name in (".", "..") or (needed and not name):
        raise ValueError(f"{key}={name!r} must be a plain name inside the output folder, without / and \\")


class Data(Section):
    layout: str = Field("auto", description="auto, folders, mask_profiles (by person), csv, or products (one per row)")
    table: str = Field("", description="CSV file inside the channel; empty: train.csv, or the only CSV")
    id_column: str = Field("", description="CSV column of row ids; empty: id if it exists, else the image path")
    path_column: str = Field("", description="CSV column of image paths; empty: image_path, img_path, path or similar")
    label_column: str = Field("", description="CSV column of classes; empty: target, label, class_name or similar")
    group_column: str = Field("", description="CSV column of groups (people, products) that folds must not split")
    image_root: str = Field("", description="folder that relative CSV paths start from; empty: where they exist")
    category_column: str = Field("", description="products: column of categories; empty: category_name or category")
    image_types: dict[str, str] = Field(IMAGE_TYPES, description="products: class of the images in each column")
    age_bins: list[float] = Field([30, 60], description="mask_profiles: ages at which the next age class begins")
    class_aliases: list[list[str]] = Field([], description='synonymous class names, e.g. [["A", "B"], ["C", "D"]]')
    alias_policy: Literal["none", "merge", "sum"] = Field(
        "none", description="class_aliases: merge before training, or sum their probabilities when predicting"
    )
    resize_shorter_side: int = Field(
        0, ge=0, description="first shrink images to this shorter side, in pixels; 0: keep size"
    )
    jpeg_draft: bool = Field(
        False, description="decode JPEGs at 1/2, 1/4 or 1/8, never below resize_shorter_side; faster"
    )
    cache: str = Field("auto", description="folder of decoded images for all stages; auto: .cache beside the runs; off")
    cache_gib: float = Field(64.0, gt=0, description="maximum size of an image cache in GiB; larger ones are not built")
    max_unpacked_gib: float = Field(200.0, gt=0, description="maximum unpacked size of a .zip, in GiB")
    max_megapixels: float = Field(100.0, gt=0, description="maximum image size, in megapixels")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if not self.age_bins or sorted(set(self.age_bins)) != self.age_bins or self.age_bins[0] <= 0:
            raise ValueError(f"age_bins={self.age_bins} must be ages above 0 in ascending order")
        names = [name for group in self.class_aliases for name in group]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if any(len(group) < 2 for group in self.class_aliases):
            raise ValueError("every group of class_aliases needs at least two names")
        if duplicates:
            raise ValueError(f"class_aliases has a duplicate name {duplicates[0]!r}; a name can be in one group only")
        if self.alias_policy != "none" and not names:
            raise ValueError(f"alias_policy={self.alias_policy} needs class_aliases, the groups of names")
        if self.jpeg_draft and not self.resize_shorter_side:
            raise ValueError("jpeg_draft=true needs resize_shorter_side, the size that it must not go below")
        return self


class Split(Section):
    folds: int = Field(5, ge=2, description="number of folds")
    stratify: bool = Field(True, description="give every fold the same class proportions")
    holdout: float = Field(0.0, ge=0, lt=1, description="fraction of rows that no model trains on or selects epochs on")
    ratios: list[float] = Field([], description="instead of folds: fractions of train, valid and test, e.g. [.8,.1,.1]")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of the shuffle")
    verify_images: bool = Field(True, description="open images to find unreadable and duplicate ones; false: trust CSV")
    write_csv: bool = Field(False, description="also write train, validation and test as CSVs; products always do")
    skip_unreadable: bool = Field(False, description="leave out unreadable images instead of stopping")

    @model_validator(mode="after")
    def _check_parts(self) -> "Split":
        if self.ratios and (len(self.ratios) != 3 or min(self.ratios) < 0 or abs(sum(self.ratios) - 1) > 1e-6):
            raise ValueError("ratios must be three fractions (train, valid, test) that sum to 1")
        if self.ratios and self.ratios[1] == 0:
            raise ValueError("ratios need a valid fraction above 0: it selects the best epoch")
        if self.ratios and self.holdout:
            raise ValueError("ratios and holdout exclude each other: the test part is the holdout")
        return self


class Model(Section):
    backbone: str = Field("timm/resnet18", description="timm/, torchvision/, efficientnet_pytorch/ or fivefold/NAME")
    backbone_kwargs: dict[str, Any] = Field(
        {}, description="backbone arguments; torchvision: bare=true ends at the pooling"
    )
    pretrained: bool = Field(False, description="start from the pretrained weights of the backbone's hub")
    weights: str = Field("", description="initial weights or checkpoint file: a path, or a name in SM_CHANNEL_WEIGHTS")
    label_factors: list[str] = Field([], description="label factors to predict, e.g. mask,gender; empty: the classes")
    drop_path: float | None = Field(None, ge=0, lt=1, description="stochastic depth rate; none: the backbone's default")
    head: Spec = Field("linear", description="linear, mlp or convnext, or a table with parameters")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate before the last layer")
    image_stats: list[str] = Field([], description="image statistics appended to the features: aspect, color_mean")
    image_size: int | list[int] = Field(224, description="input size in pixels: one number, or [height, width]")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="mean per channel, for images in 0..1")
    std: list[float] = Field([0.229, 0.224, 0.225], description="standard deviation per channel, for images in 0..1")

    @model_validator(mode="after")
    def _check_shapes(self) -> "Model":
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError("image_size must be one positive number, or [height, width]")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std must be three numbers each, and every std is positive")
        if len(set(self.image_stats)) < len(self.image_stats):
            raise ValueError("image_stats names a feature twice")
        return self

    @model_validator(mode="after")
    def _check_options(self) -> "Model":
        """Reject arguments that load weights: Fivefold checks the files of `weights` and `pretrained` only."""
        for option in self.backbone_kwargs:
            if option.startswith(("pretrained", "weights", "checkpoint", "cache_dir")):
                raise ValueError(
                    f"backbone_kwargs.{option}: backbone_kwargs cannot load weights; set pretrained=true or weights=PATH"
                )
        return self

    @property
    def size(self) -> tuple[int, ...]:
        """Return (height, width) in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)


class Augment(Section):
    train: list[Spec] = Field(
        [{"name": "random_resized_crop", "scale": [0.7, 1.0]}, "horizontal_flip"],
        description="transforms of a training image, in order",
    )
    eval: list[Spec] = Field(["resize"], description="transforms of an image for evaluation and prediction, in order")
    batch_mix: str = Field("none", description="mixing of the images of a batch: none, mixup or cutmix")
    mix_alpha: float = Field(1.0, gt=0, description="alpha of the mixing ratio lambda ~ Beta(alpha, alpha)")
    mix_prob: float = Field(1.0, ge=0, le=1, description="fraction of batches that are mixed")
    mixup_off_epochs: int = Field(0, ge=0, description="disable mixup/cutmix for the last N epochs")


class Train(Section):
    epochs: int = Field(30, ge=1, description="passes over the training rows")
    batch_size: int = Field(32, ge=1, description="images per batch")
    grad_accum_steps: int = Field(1, ge=1, description="batches per optimiser step (gradient accumulation)")
    drop_last: bool = Field(False, description="drop a partial last batch; false: only below 1/8, or with 1 row")
    loss: Spec = Field("cross_entropy", description="cross_entropy, label_smoothing, focal, binary_focal, bce or f1")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: weight by inverse frequency")
    sampler: str = Field("shuffle", description="shuffle: every row once per epoch; balanced: classes equally often")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="fraction of a target that is spread over all classes")
    rdrop_alpha: float = Field(
        0.0, ge=0, description="R-Drop weight: half the paper's α, which adds two losses; 0: off"
    )
    sam_rho: float = Field(0.0, ge=0, description="radius ρ of SAM (sharpness-aware steps, two gradients each); 0: off")
    optimizer: str = Field("adamw", description="adamw, adam, sgd (Nesterov), or muon (AdamW where it does not apply)")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    backbone_lr_scale: float = Field(1.0, gt=0, le=1, description="learning rate of the backbone, as a fraction of lr")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate factor per layer, from the last to the first; below 1: timm/ only"
    )
    freeze_epochs: int = Field(0, ge=0, description="first N epochs with a frozen backbone, BatchNorm included")
    weight_decay: float = Field(1e-4, ge=0, description="not applied to norms, biases, scales and timm's exemptions")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd and muon")
    schedule: str = Field("cosine", description="learning rate schedule: constant, cosine or step")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear learning rate warm-up")
    lr_step_epochs: int = Field(10, ge=1, description="schedule=step: epochs between two drops")
    lr_gamma: float = Field(0.5, gt=0, lt=1, description="schedule=step: factor of each drop")
    max_grad_norm: float = Field(0.0, ge=0, description="maximum gradient norm; 0: no clipping")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay of the averaged weights (EMA); 0: no averaging")
    patience: int = Field(0, ge=0, description="epochs without improvement before stopping; 0: never")
    validate_every: int = Field(1, ge=1, description="epochs between validations; the last epoch is always validated")
    monitor: str = Field("logloss", description="metric that selects the best epoch: logloss, loss, acc or f1_macro")
    precision: str = Field("auto", description="fp32, bf16, bf16_grouped_fp32, fp16, or auto: the fastest in a probe")
    channels_last: bool = Field(True, description="NHWC memory layout, faster on most machines")
    cpu_convs: bool = Field(True, description="CPU: convolutions with faster gradients than PyTorch's")
    compile: bool = Field(False, description="CUDA: torch.compile the backbone; slower start, faster steps")
    save_raw_weights: bool = Field(False, description="with ema_decay: also save the best raw weights; validates twice")
    deterministic: bool = Field(True, description="CUDA: bitwise repeatable where kernels allow it; false: fastest")
    device: str = Field("auto", description="auto (CUDA, else MPS, else CPU), cuda, mps or cpu")
    num_workers: int = Field(-1, ge=-1, description="loader processes; -1: choose for this machine")
    cache_in_memory: bool = Field(True, description="keep decoded images in memory if they fit in 1 GiB")
    checkpoint_minutes: float = Field(10.0, ge=0, description="minutes between checkpoints within an epoch; 0: none")
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints within an epoch; 0: by time only")
    loggers: list[str] = Field(["tensorboard"], description="experiment trackers: tensorboard, wandb, mlflow")
    logger_project: str = Field("fivefold", min_length=1, description="wandb project and mlflow experiment")


class Predict(Section):
    batch_size: int = Field(0, ge=0, description="images per batch; 0: twice train.batch_size")
    device: str = Field("auto", description="auto (CUDA, else MPS, else CPU), cuda, mps or cpu")
    file: str = Field("predictions.csv", description="predict: file name of the table of images and their classes")
    folder: str = Field("", description="predict: output subfolder in which each run creates run_…; empty: none")
    subsets: list[str] = Field(["train", "valid", "test"], description="predict with SM_CHANNEL_FOLDS: rows to predict")
    tta: list[Spec] = Field(["plain"], description="views to average: plain, flip, rotate, shift, scale, five_crops")

    @model_validator(mode="after")
    def _check(self) -> "Predict":
        _check_name("file", self.file, needed=True)
        _check_name("folder", self.folder)
        if not self.subsets or set(self.subsets) - {"train", "valid", "test"}:
            raise ValueError(
                f"subsets={self.subsets} must contain only train, valid and test, and at least one of them"
            )
        if not self.tta:
            raise ValueError("tta is empty; write plain to predict each image without augmentation")
        return self


class Ensemble(Section):
    blend: Blend = Field("fitted", description="how to blend systems; fitted: weights by out-of-fold logloss")
    weights: dict[str, Any] = Field({}, description="blend=weighted: weight of each system, by name")
    seed_blend: Literal["mean", "geometric", "rank", "vote"] = Field(
        "mean", description="blend of one system's models, equal weights"
    )
    submissions: list[str] = Field([], description="submission files to blend as systems, like SM_CHANNEL_SUBMISSIONS")
    calibrate_on: Literal["none", "holdout"] = Field("holdout", description="holdout: fit on the holdout, if any")
    unreadable: Literal["error", "prior"] = Field(
        "error",
        description="test images that cannot be read: error, or prior (class frequencies of the training rows)",
    )
    submission: str = Field("submission.csv", description="file name of the submission")
    answer: Literal["auto", "class", "number", "probability"] = Field(
        "auto", description="content of a sample submission's only column; auto: guess from its values"
    )
    positive_class: str = Field("", description="class whose probability goes into a sample submission's only column")
    label_column: str = Field("", description="column of predicted classes without a sample; empty: one per class")
    row_number_column: str = Field("", description="with label_column: first column, with row numbers; empty: none")

    @model_validator(mode="after")
    def _check(self) -> "Ensemble":
        if bool(self.weights) != (self.blend == "weighted"):
            raise ValueError(f"weights={self.weights}: blend=weighted needs weights, other blends take none")
        for name, value in self.weights.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"weights.{name}={value!r}: a finite number of at least 0 is needed")
        _check_name("submission", self.submission, needed=True)
        if self.row_number_column and self.row_number_column == self.label_column:
            raise ValueError(
                f"row_number_column and label_column are both {self.row_number_column!r}; name two columns"
            )
        if self.row_number_column and not self.label_column:
            raise ValueError(
                f"row_number_column={self.row_number_column!r} needs label_column, the column of the classes"
            )
        if self.positive_class and self.answer in ("class", "number"):
            raise ValueError(
                f"answer={self.answer} excludes positive_class={self.positive_class!r}; remove one of them"
            )
        return self


class Distill(Section):
    teacher: str = Field("oof", description="oof (leak-free), best_fold, ensemble, or the path of a model folder")
    teacher_tta: list[Spec] = Field([], description="extra views of the teacher, averaged into its targets")
    alpha: float = Field(0.7, ge=0, le=1, description="weight of the distillation loss; the label loss gets 1 - alpha")
    alpha_anneal_fraction: float = Field(
        0.0, ge=0, le=1, description="fraction of steps over which alpha falls to 0; 0: constant"
    )
    temperature: float = Field(2.0, gt=0, description="temperature of teacher and student in the distillation loss")
    temperature_decay: float = Field(1.0, gt=0, le=1, description="factor of the temperature per epoch; 1: constant")
    min_temperature: float = Field(1.0, gt=0, description="with temperature_decay: minimum temperature")
    patience: int = Field(0, ge=0, description="epochs without improvement on the holdout before stopping; 0: never")
    model: dict[str, Any] = Field({}, description="overrides of [model] for the student")
    train: dict[str, Any] = Field({}, description="overrides of [train] for the student")

    @model_validator(mode="after")
    def _check_temperature(self) -> "Distill":
        if self.temperature_decay < 1 and self.min_temperature >= self.temperature:
            raise ValueError(f"temperature={self.temperature} must be above min_temperature={self.min_temperature}")
        return self


class Export(Section):
    format: str = Field("onnx", description="onnx (a graph with all models), or pth (the state dict of one model)")
    file: str = Field("", description="file name; empty: model.onnx, model.pth")
    weights: Literal["best", "raw"] = Field("best", description="best: weights that predict (EMA); raw: not averaged")

    @model_validator(mode="after")
    def _check_file(self) -> "Export":
        _check_name("file", self.file)
        return self


class Evaluate(Section):
    bins: int = Field(15, ge=1, description="bins of the calibration error")
    top_k: int = Field(5, ge=1, description="k of the top-k accuracy")
    num_error_images: int = Field(
        48, ge=0, description="number of most confident mistakes that the report shows as images"
    )
    allow_empty: bool = Field(False, description="succeed even if no row has a ground truth")


class Serve(Section):
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 or :: (with IPv6) for all")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on (or SAGEMAKER_BIND_TO_PORT); 0: any free")
    batch_size: int = Field(32, ge=1, description="maximum images per batch, across requests")
    max_wait_ms: float = Field(5.0, ge=0, description="milliseconds that the first image of a batch waits for others")
    max_queue: int = Field(256, ge=1, description="maximum images in flight, across requests; further requests get 503")
    max_connections: int = Field(
        900, ge=2, description="maximum open connections; beyond it, the one that has been sending longest is closed"
    )
    max_body_mb: float = Field(8.0, gt=0, description="maximum request body, in MB (10^6 bytes)")
    max_total_body_mb: float = Field(
        256.0, gt=0, description="maximum bodies of all requests in memory, in MB (10^6 bytes)"
    )
    max_megapixels: float = Field(
        16.0, gt=0, description="maximum image size, in megapixels; JPEG: 4 times that, decoded at half size"
    )
    max_total_megapixels: float = Field(
        0.0, ge=0, description="maximum megapixels being decoded, across requests; 0: a quarter of free memory"
    )
    formats: list[ImageFormat] = Field(["JPEG", "PNG", "WEBP"], min_length=1, description="accepted image formats")
    timeout_s: float = Field(60.0, gt=0, description="seconds to receive and answer a request")
    drain_s: float = Field(25.0, ge=0, description="seconds to finish requests in flight after SIGTERM")


class Compare(Section):
    runs: list[str] = Field([], description="run folders, each with an ensemble's submission, models, or both")
    submissions: list[str] = Field([], description="submission files, beside those in SM_CHANNEL_SUBMISSIONS")


class SageMaker(Section):
    image: str = Field("", description="image URI in ECR; sagemaker-local: a local image; empty: fivefold:latest")
    role: str = Field("", description="ARN of the jobs' execution role, arn:aws:iam::ACCOUNT:role/NAME")
    output: str = Field("", description="s3://bucket/prefix that holds a folder per run")
    region: str = Field("", description="AWS region; empty: AWS_DEFAULT_REGION, or the profile's region")
    instance_type: str = Field("", description="instance type of each job, e.g. ml.g5.xlarge")
    instance_count: int = Field(1, ge=1, description="instances per training job")
    volume_gb: int = Field(50, ge=1, description="disk of each instance, in GB")
    max_hours: float = Field(24.0, gt=0, le=672, description="maximum runtime of a job, in hours")
    spot: bool = Field(False, description="use spot instances: cheaper; interrupted jobs resume from checkpoints")
    max_wait_hours: float = Field(0.0, ge=0, description="spot: maximum hours from request to end; 0: twice max_hours")
    keep_alive_minutes: int = Field(0, ge=0, le=360, description="warm pool: wait for the next job; not with spot")
    subnets: list[str] = Field([], description="VPC subnets of the jobs; with security_groups")
    security_groups: list[str] = Field([], description="VPC security groups of the jobs; with subnets")
    network_isolation: bool | None = Field(
        None, description="no network in containers; empty: if the job downloads nothing"
    )
    encrypt_traffic: bool = Field(False, description="encrypt the traffic between the hosts of a fold; slower")
    kms_key: str = Field("", description="KMS key that encrypts outputs in S3")
    volume_kms_key: str = Field("", description="KMS key that encrypts disks; not for instances with NVMe disks")
    tags: dict[str, Any] = Field({}, description="tags of each job")
    environment: dict[str, Any] = Field({}, description="extra environment variables of each container, shown as ***")
    input_mode: Literal["File", "FastFile"] = Field("File", description="copy channels first, or stream them")
    compress_outputs: bool = Field(
        True, description="upload outputs as model.tar.gz and output.tar.gz; false: as plain files"
    )
    hourly_price: float = Field(0.0, ge=0, description="price per instance hour that you pay; 0: unknown")
    max_cost: float = Field(0.0, ge=0, description="maximum cost of all jobs, in the currency of price; 0: no limit")
    poll_seconds: float = Field(15.0, ge=0.1, description="seconds between job status checks")
    stages: dict[str, Any] = Field(
        {}, description="per stage, e.g. sagemaker.stages.ensemble.instance_type=ml.m5.xlarge"
    )

    @model_validator(mode="after")
    def _check(self) -> "SageMaker":
        if self.spot and self.keep_alive_minutes:
            raise ValueError("spot and keep_alive_minutes exclude each other: spot instances have no warm pool")
        if self.max_wait_hours and not self.spot:
            raise ValueError(f"max_wait_hours={self.max_wait_hours:g} applies to spot instances only: set spot=true")
        if 0 < self.max_wait_hours < self.max_hours:
            raise ValueError(f"max_wait_hours={self.max_wait_hours:g} is less than max_hours={self.max_hours:g}")
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("set both subnets and security_groups, or neither: a VPC needs both")
        for key, table in (("tags", self.tags), ("environment", self.environment)):
            for name, value in table.items():
                if isinstance(value, bool) or not isinstance(value, str | int | float):
                    raise ValueError(f"{key}.{name} must be a text or a number, not a {type(value).__name__}")
        for name, table in self.stages.items():
            if name not in RUN_STAGES or not isinstance(table, dict):
                raise ValueError(f"stages.{name} must be a table of a stage; the stages: {', '.join(RUN_STAGES)}")
            unknown = sorted(set(table) - PER_STAGE_KEYS)
            if unknown:
                raise ValueError(
                    f"stages.{name}.{unknown[0]} cannot be set per stage; these can: {', '.join(sorted(PER_STAGE_KEYS))}"
                )
            try:
                self.for_stage(name)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, ("stages", name, *problem["loc"])))
                raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
        return self

    def for_stage(self, stage: str) -> "SageMaker":
        """Return these settings with the overrides of `stage`, whose name may have hyphens or underscores."""
        overrides = self.stages.get(stage.replace("-", "_"), {})
        return SageMaker.model_validate({**self.model_dump(), "stages": {}, **overrides}) if overrides else self


RUN_STAGES = ("split", "train_fold", "ensemble", "evaluate", "distill")
PER_STAGE_KEYS = frozenset(SageMaker.model_fields) - {"output", "region", "max_cost", "poll_seconds", "stages"}
"""The keys of `[sagemaker]` that a stage can override."""


QUANTITY = r"^\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?$"
"""A Kubernetes quantity of CPUs, memory or disk."""


class Kubernetes(Section):
    image: str = Field("fivefold:latest", min_length=1, description="image of every pod")
    namespace: str = Field("", description="namespace; empty: that of the kubectl context")
    context: str = Field("", description="kubectl context of the cluster; empty: the current one")
    pvc: str = Field("fivefold", min_length=1, description="PersistentVolumeClaim of data and runs; made if missing")
    runs_path: str = Field("/runs", description="location of runs: /runs on the claim, or s3://bucket/prefix")
    gpus: int = Field(1, ge=0, description="GPUs of a pod that trains or predicts; 0: none")
    cpus: int = Field(2, ge=1, description="CPU request of a pod; without a GPU also its number of threads")
    memory: str = Field("4Gi", pattern=QUANTITY, description="memory request of a pod; its limit is twice as much")
    limits: dict[str, Any] = Field({}, description='limits of a pod, beside GPUs, e.g. cpu = 4, memory = "8Gi"')
    service_account: str = Field("", description="service account of the pods, for a role with access to s3://")
    queue: str = Field("", description="Kueue LocalQueue in which the Jobs wait")
    poll_seconds: float = Field(5.0, ge=0.05, description="seconds between Job status checks")

    @model_validator(mode="after")
    def _check(self) -> "Kubernetes":
        for name, value in self.limits.items():
            if not re.fullmatch(QUANTITY, str(value)):
                raise ValueError(f"limits.{name}={value!r} is not a quantity such as 4, 500m or 8Gi")
        return self


PLATFORM_SECTIONS = ("sagemaker", "kubernetes")
"""Sections that define where stages run; they are not part of a model or of a stage's key."""


class Settings(Section):
    """All settings of a run. `contract.stage_specs` names the sections that each stage reads."""

    recipe: str = Field("", description="name of a shipped recipe, or path of a .toml or .json file")
    system: str = Field("", description="name of the models of this recipe; empty: the recipe's name")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of weights, order and augmentation")
    fold: int | None = Field(None, ge=0, description="fold to train (or to export); also FOLD or JOB_COMPLETION_INDEX")
    stage: str = Field("", description="stage to run if no argument names it")
    run: str = Field("", description="run name and report title; a stage reads and writes in the run's folder")
    runs: str = Field("runs", description="folder of all runs, or an s3://bucket/prefix")
    on_version_change: Literal["rerun", "warn", "ignore"] = Field(
        "warn", description="what to do with results of other code or package versions: rerun, warn or ignore"
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

    @model_validator(mode="after")
    def _check_names(self) -> "Settings":
        for key in ("system", "run"):
            if len(getattr(self, key).encode()) > MAX_NAME_BYTES:
                raise ValueError(f"{key} is longer than {MAX_NAME_BYTES} bytes, too long for file names")
        return self

    def student(self) -> "Settings":
        """Return the settings with `[distill.model]` and `[distill.train]` applied over `[model]` and `[train]`."""
        model = Model.model_validate({**self.model.model_dump(), **self.distill.model})
        train = Train.model_validate({**self.train.model_dump(), **self.distill.train})
        return self.model_copy(update={"model": model, "train": train})


SECTIONS = {name for name, field in Settings.model_fields.items() if isinstance(field.default, Section)}
EXECUTION_KEYS = {
    "stage",
    "run",
    "runs",
    "on_version_change",
    "data.cache",
    "data.cache_gib",
    "data.max_unpacked_gib",
} | {
    f"train.{name}"
    for name in (
        "checkpoint_minutes",
        "checkpoint_steps",
        "cache_in_memory",
        "logger_project",
        "loggers",
        "num_workers",
    )
}
"""Keys that cannot change a result; a stage's key does not contain them."""
