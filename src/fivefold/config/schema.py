"""The schema of all settings: one frozen model per section, with the type, default and description of every key.

A recipe is a TOML or JSON file with these sections. `loading.py` overrides its values by hyperparameters,
environment variables and command-line arguments. Functions below `build.py` take plain arguments, not settings.
"""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

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


SECONDS = {"s": 1, "m": 60, "h": 3600}
DURATION = r"\d+(\.\d+)?[smh]"
"""A time: a number and its unit, a key of SECONDS."""
EXPECTED = "; with pretrained: what the weights expect"
"""Ends the description of a key whose default depends on the pretrained weights; see `build.resolve_inputs`."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_all(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Raise a ValueError for values that are invalid together."""


def setting(default: Any, description: str, **constraints: Any) -> Any:
    """Return a field with its default, its description and its bounds."""
    return Field(default, description=description, **constraints)


def reject_if(condition: object, message: str) -> None:
    """Raise a ValueError with the message if the condition is true."""
    if condition:
        raise ValueError(message)


def _check_name(name: str) -> str:
    leads_out = set(name) & set("/\\") or name in (".", "..")
    reject_if(leads_out, f"{name!r} must be a plain name inside the output folder, without / and \\")
    return name


FileName = Annotated[str, AfterValidator(_check_name)]


class Data(Section):
    layout: Literal["auto", "csv", "folders", "mask_profiles", "products"] = setting("auto", "layout of the images")
    table: str = setting("", "CSV file inside the channel; empty: train.csv, or the only CSV")
    id_column: str = setting("", "CSV column of row ids; empty: id if it exists, else the image path")
    path_column: str = setting("", "CSV column of image paths; empty: image_path, img_path, path or similar")
    label_column: str = setting("", "CSV column of classes; empty: target, label, class_name or similar")
    group_column: str = setting("", "CSV column of groups (people, products) that folds must not split")
    labels: str = setting("", "CSV of corrected labels: a file in the train channel, or a path; see docs/data.md")
    groups: str = setting("", "CSV of rows that folds must not divide: a file in the train channel, or a path")
    image_root: str = setting("", "folder that relative CSV paths start from; empty: where they exist")
    category_column: str = setting("", "products: column of categories; empty: category_name or category")
    image_types: dict[str, str] = setting(IMAGE_TYPES, "products: class of the images in each column")
    age_bins: list[float] = setting([30, 60], "mask_profiles: ages at which the next age class begins")
    class_aliases: list[list[str]] = setting([], 'synonymous class names, e.g. [["A", "B"], ["C", "D"]]')
    alias_policy: Literal["none", "merge", "sum"] = setting("none", "merge before training, or sum probabilities")
    resize_shorter_side: int = setting(0, "first shrink images to this shorter side, in pixels; 0: keep size", ge=0)
    jpeg_draft: bool = setting(False, "decode JPEGs at 1/2, 1/4 or 1/8, never below resize_shorter_side; faster")
    cache: str = setting("auto", "folder of decoded images for all stages; auto: .cache beside the runs; off")
    cache_gib: float = setting(64.0, "maximum size of an image cache in GiB; larger ones are not built", gt=0)
    max_unpacked_gib: float = setting(200.0, "maximum unpacked size of a .zip, in GiB", gt=0)
    max_megapixels: float = setting(100.0, "maximum image size, in megapixels", gt=0)

    def check(self) -> None:
        ages, names = self.age_bins, [name for group in self.class_aliases for name in group]
        ascending = ages and sorted(set(ages)) == ages and ages[0] > 0
        reject_if(not ascending, f"age_bins={ages} must be ages above 0 in ascending order")
        reject_if(
            len(set(names)) < len(names) or any(len(group) < 2 for group in self.class_aliases),
            f"class_aliases={self.class_aliases}: a group needs two names or more, and a name can be in one group only",
        )
        reject_if(self.alias_policy != "none" and not names, f"alias_policy={self.alias_policy} needs class_aliases")
        reject_if(self.jpeg_draft and not self.resize_shorter_side, "jpeg_draft=true needs resize_shorter_side")


class Split(Section):
    folds: int = setting(5, "number of folds", ge=2)
    stratify: bool = setting(True, "give every fold the same class proportions")
    holdout: float = setting(0.0, "fraction of rows that no model trains on or selects epochs on", ge=0, lt=1)
    ratios: list[float] = setting([], "instead of folds: fractions of train, valid and test, e.g. [.8,.1,.1]")
    seed: int = setting(42, "seed of the shuffle", ge=0, le=2**32 - 1)
    verify_images: bool = setting(True, "open images to find unreadable and duplicate ones; false: trust CSV")
    write_csv: bool = setting(False, "also write train, validation and test as CSVs; products always do")
    skip_unreadable: bool = setting(False, "leave out unreadable images instead of stopping")

    def check(self) -> None:
        if parts := self.ratios:
            reject_if(
                len(parts) != 3 or min(parts) < 0 or parts[1] == 0 or abs(sum(parts) - 1) > 1e-6,
                "ratios must be three fractions (train, valid, test) that sum to 1, with valid above 0",
            )
            reject_if(self.holdout, "ratios and holdout exclude each other: the test part is the holdout")


class Model(Section):
    backbone: str = setting("timm/resnet18", "timm/, torchvision/, efficientnet_pytorch/ or fivefold/NAME")
    backbone_kwargs: dict[str, Any] = setting({}, "backbone arguments; torchvision: bare=true ends at the pooling")
    pretrained: bool | Literal["auto"] = setting(
        False, "start from the hub's weights; auto: the first of weights channel, caches, a package, the hub"
    )
    weights: str = setting("", "initial weights or checkpoint file: a path, or a name in SM_CHANNEL_WEIGHTS")
    label_factors: list[str] = setting([], "label factors to predict, e.g. mask,gender; empty: the classes")
    drop_path: float | None = setting(None, "stochastic depth rate; none: the backbone's default", ge=0, lt=1)
    head: Spec = setting("linear", "linear, mlp or convnext, or a table with parameters")
    dropout: float = setting(0.0, "dropout rate before the last layer", ge=0, lt=1)
    image_stats: list[str] = setting([], "image statistics appended to the features: aspect, color_mean")
    image_size: int | list[int] = setting(224, f"input size in pixels: one number, or [height, width]{EXPECTED}")
    mean: list[float] = setting([0.485, 0.456, 0.406], f"mean per channel, for images in 0..1{EXPECTED}")
    std: list[float] = setting([0.229, 0.224, 0.225], f"standard deviation per channel, for images in 0..1{EXPECTED}")
    interpolation: Literal["bilinear", "bicubic"] = setting("bilinear", f"filter that resizes images{EXPECTED}")

    def check(self) -> None:
        valid_size = len(self.size) == 2 and min(self.size) > 0
        reject_if(not valid_size, "image_size must be one positive number, or [height, width]")
        reject_if(
            len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0,
            "mean and std must be three numbers each, and every std is positive",
        )
        reject_if(len(set(self.image_stats)) < len(self.image_stats), "image_stats names a feature twice")
        for option in self.backbone_kwargs:  # Fivefold checks the files of `weights` and `pretrained` only
            loads = option.startswith(("pretrained", "weights", "checkpoint", "cache_dir"))
            reject_if(loads, f"backbone_kwargs.{option} cannot load weights; set pretrained=true or weights=PATH")

    @property
    def size(self) -> tuple[int, ...]:
        """Return (height, width) in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)


class Augment(Section):
    train: list[Spec] = setting(
        [{"name": "random_resized_crop", "scale": [0.7, 1.0]}, "horizontal_flip"],
        "transforms of a training image, in order",
    )
    eval: list[Spec] = setting(["resize"], "transforms of an image for evaluation and prediction, in order")
    image_size: int = setting(0, "input size in training, in pixels; 0: model.image_size", ge=0)
    batch_mix: str = setting("none", "mixing of the images of a batch: none, mixup or cutmix")
    mix_alpha: float = setting(1.0, "alpha of the mixing ratio lambda ~ Beta(alpha, alpha)", gt=0)
    mix_prob: float = setting(1.0, "fraction of batches that are mixed", ge=0, le=1)
    mixup_off_epochs: int = setting(0, "disable mixup/cutmix for the last N epochs", ge=0)


class Train(Section):
    method: Literal["fine_tune", "linear_probe", "lp_ft"] = setting(
        "fine_tune", "linear_probe: a linear head on frozen features; lp_ft: that head, then fine-tuning"
    )
    linear_first: bool = setting(False, "submit on this machine: also fit linear probes, a system that is ready early")
    epochs: int = setting(30, "passes over the training rows", ge=1)
    batch_size: int = setting(32, "images per batch", ge=1)
    grad_accum_steps: int = setting(1, "batches per optimiser step (gradient accumulation)", ge=1)
    drop_last: bool = setting(False, "drop a partial last batch; false: only below 1/8, or with 1 row")
    loss: Spec = setting("cross_entropy", "cross_entropy, label_smoothing, focal, binary_focal, bce or f1")
    class_weights: Literal["none", "balanced"] = setting("none", "balanced: weight by inverse frequency")
    sampler: str = setting("shuffle", "shuffle: every row once per epoch; balanced: classes equally often")
    label_smoothing: float = setting(0.0, "fraction of a target that is spread over all classes", ge=0, lt=1)
    rdrop_alpha: float = setting(0.0, "R-Drop weight: half the paper's α, which adds two losses; 0: off", ge=0)
    sam_rho: float = setting(0.0, "radius ρ of SAM (sharpness-aware steps, two gradients each); 0: off", ge=0)
    optimizer: str = setting("adamw", "adamw, adam, sgd (Nesterov), or muon (AdamW where it does not apply)")
    lr: float = setting(1e-3, "peak learning rate", gt=0)
    backbone_lr_scale: float = setting(1.0, "learning rate of the backbone, as a fraction of lr", gt=0, le=1)
    layer_decay: float = setting(1.0, "learning rate factor per layer, from the last; below 1: timm/ only", gt=0, le=1)
    freeze_epochs: int = setting(0, "first N epochs with a frozen backbone, BatchNorm included", ge=0)
    freeze_norms: bool = setting(False, "keep the statistics of BatchNorm: those of the initial weights")
    weight_decay: float = setting(1e-4, "not applied to norms, biases, scales and timm's exemptions", ge=0)
    momentum: float = setting(0.9, "momentum of sgd and muon", ge=0, lt=1)
    schedule: str = setting("cosine", "learning rate schedule: constant, cosine or step")
    warmup_epochs: float = setting(0.0, "epochs of linear learning rate warm-up", ge=0)
    lr_step_epochs: int = setting(10, "schedule=step: epochs between two drops", ge=1)
    lr_gamma: float = setting(0.5, "schedule=step: factor of each drop", gt=0, lt=1)
    max_grad_norm: float = setting(0.0, "maximum gradient norm; 0: no clipping", ge=0)
    ema_decay: float = setting(0.0, "decay of the averaged weights (EMA); 0: no averaging", ge=0, lt=1)
    patience: int = setting(0, "epochs without improvement before stopping; 0: never", ge=0)
    validate_every: int = setting(1, "epochs between validations; the last epoch is always validated", ge=1)
    monitor: str = setting("logloss", "metric that selects the best epoch: logloss, loss, acc or f1_macro")
    precision: str = setting("auto", "fp32, bf16, bf16_grouped_fp32, fp16, or auto: the fastest in a probe")
    channels_last: bool = setting(True, "NHWC memory layout, faster on most machines")
    cpu_convs: bool = setting(True, "CPU: convolutions with faster gradients than PyTorch's")
    compile: bool = setting(False, "CUDA: torch.compile the backbone; slower start, faster steps")
    save_raw_weights: bool = setting(False, "with ema_decay: also save the best raw weights; validates twice")
    deterministic: bool = setting(True, "CUDA: bitwise repeatable where kernels allow it; false: fastest")
    device: str = setting("auto", "auto (CUDA, else MPS, else CPU), cuda, mps or cpu")
    num_workers: int = setting(-1, "loader processes; -1: choose for this machine", ge=-1)
    cache_in_memory: bool = setting(True, "keep decoded images in memory if they fit in 1 GiB")
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints within an epoch; 0: none", ge=0)
    checkpoint_steps: int = setting(0, "steps between checkpoints within an epoch; 0: by time only", ge=0)
    loggers: list[str] = setting(["tensorboard"], "experiment trackers: tensorboard, wandb, mlflow")
    logger_project: str = setting("fivefold", "wandb project and mlflow experiment", min_length=1)


class Predict(Section):
    batch_size: int = setting(0, "images per batch; 0: twice train.batch_size", ge=0)
    device: str = setting("auto", "auto (CUDA, else MPS, else CPU), cuda, mps or cpu")
    file: FileName = setting("predictions.csv", "predict: name of the table of images and classes", min_length=1)
    folder: FileName = setting("", "predict: output subfolder in which each run creates run_…; empty: none")
    subsets: list[Literal["train", "valid", "test"]] = setting(
        ["train", "valid", "test"], "predict with SM_CHANNEL_FOLDS: rows to predict", min_length=1
    )
    tta: list[Spec] = setting(["plain"], "averaged views: plain, flip, rotate, shift, scale, five_crops", min_length=1)


class Ensemble(Section):
    blend: Blend = setting("fitted", "how to blend systems; fitted: weights by out-of-fold logloss")
    weights: dict[str, Annotated[float, Field(ge=0)]] = setting({}, "blend=weighted: weight of each system, by name")
    seed_blend: Literal["mean", "geometric", "rank", "vote"] = setting("mean", "blend of one system's models")
    submissions: list[str] = setting([], "submission files to blend as systems, like SM_CHANNEL_SUBMISSIONS")
    calibrate_on: Literal["none", "holdout"] = setting("holdout", "holdout: fit on the holdout, if any")
    unreadable: Literal["error", "prior"] = setting("error", "unreadable test images: error, or prior (class shares)")
    submission: FileName = setting("submission.csv", "file name of the submission", min_length=1)
    answer: Literal["auto", "class", "number", "probability"] = setting(
        "auto", "content of a sample submission's only column; auto: guess from its values"
    )
    positive_class: str = setting("", "class whose probability goes into a sample submission's only column")
    label_column: str = setting("", "column of predicted classes without a sample; empty: one per class")
    row_number_column: str = setting("", "with label_column: first column, with row numbers; empty: none")

    def check(self) -> None:
        reject_if(
            bool(self.weights) != (self.blend == "weighted"),
            f"weights={self.weights}: blend=weighted needs weights, other blends take none",
        )
        reject_if(
            self.row_number_column and self.label_column in ("", self.row_number_column),
            f"row_number_column={self.row_number_column!r} needs another column, label_column, for the classes",
        )
        reject_if(
            self.positive_class and self.answer in ("class", "number"),
            f"answer={self.answer} excludes positive_class={self.positive_class!r}; remove one of them",
        )


class Distill(Section):
    teacher: str = setting("oof", "oof (leak-free), best_fold, ensemble, or the path of a model folder")
    teacher_tta: list[Spec] = setting([], "extra views of the teacher, averaged into its targets")
    alpha: float = setting(0.7, "weight of the distillation loss; the label loss gets 1 - alpha", ge=0, le=1)
    alpha_anneal_fraction: float = setting(0.0, "fraction of steps until alpha is 0; 0: constant", ge=0, le=1)
    temperature: float = setting(2.0, "temperature of teacher and student in the distillation loss", gt=0)
    temperature_decay: float = setting(1.0, "factor of the temperature per epoch; 1: constant", gt=0, le=1)
    min_temperature: float = setting(1.0, "with temperature_decay: minimum temperature", gt=0)
    patience: int = setting(0, "epochs without improvement on the holdout before stopping; 0: never", ge=0)
    model: dict[str, Any] = setting({}, "overrides of [model] for the student")
    train: dict[str, Any] = setting({}, "overrides of [train] for the student")

    def check(self) -> None:
        cannot_decay = self.temperature_decay < 1 and self.min_temperature >= self.temperature
        reject_if(cannot_decay, f"temperature={self.temperature} must be above min_temperature={self.min_temperature}")


class Export(Section):
    format: str = setting("onnx", "onnx (a graph with all models), or pth (the state dict of one model)")
    file: FileName = setting("", "file name; empty: model.onnx, model.pth")
    weights: Literal["best", "raw"] = setting("best", "best: weights that predict (EMA); raw: not averaged")


class Evaluate(Section):
    bins: int = setting(15, "bins of the calibration error", ge=1)
    top_k: int = setting(5, "k of the top-k accuracy", ge=1)
    num_error_images: int = setting(48, "number of most confident mistakes that the report shows as images", ge=0)
    allow_empty: bool = setting(False, "succeed even if no row has a ground truth")


class Audit(Section):
    features: Literal["auto", "off"] = setting(
        "auto", "features of the pretrained backbone, if its weights are at hand"
    )
    images: bool = setting(True, "measure every image to find dark, blurred, tiny and other odd ones")
    max_suspects: int = setting(5000, "maximum number of suspicious labels to list", ge=1)


class Serve(Section):
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 or :: (with IPv6) for all", min_length=1)
    port: int = setting(8080, "port to listen on (or SAGEMAKER_BIND_TO_PORT); 0: any free", ge=0, le=65535)
    batch_size: int = setting(32, "maximum images per batch, across requests", ge=1)
    max_wait_ms: float = setting(5.0, "milliseconds that the first image of a batch waits for others", ge=0)
    max_queue: int = setting(256, "maximum images in flight, across requests; further requests get 503", ge=1)
    max_connections: int = setting(900, "maximum open connections; above it, the one sending longest is closed", ge=2)
    max_body_mb: float = setting(8.0, "maximum request body, in MB (10^6 bytes)", gt=0)
    max_total_body_mb: float = setting(256.0, "maximum bodies of all requests in memory, in MB (10^6 bytes)", gt=0)
    max_megapixels: float = setting(16.0, "maximum megapixels; JPEG: 4 times that, decoded at half size", gt=0)
    max_total_megapixels: float = setting(0.0, "maximum megapixels decoded at once; 0: a quarter of free memory", ge=0)
    formats: list[ImageFormat] = setting(["JPEG", "PNG", "WEBP"], "accepted image formats", min_length=1)
    timeout_s: float = setting(60.0, "seconds to receive and answer a request", gt=0)
    drain_s: float = setting(25.0, "seconds to finish requests in flight after SIGTERM", ge=0)


class Compare(Section):
    runs: list[str] = setting([], "run folders, each with an ensemble's submission, models, or both")
    submissions: list[str] = setting([], "submission files, beside those in SM_CHANNEL_SUBMISSIONS")


class SageMaker(Section):
    image: str = setting("", "image URI in ECR; sagemaker-local: a local image; empty: fivefold:latest")
    role: str = setting("", "ARN of the jobs' execution role, arn:aws:iam::ACCOUNT:role/NAME")
    output: str = setting("", "s3://bucket/prefix that holds a folder per run")
    region: str = setting("", "AWS region; empty: AWS_DEFAULT_REGION, or the profile's region")
    instance_type: str = setting("", "instance type of each job, e.g. ml.g5.xlarge")
    instance_count: int = setting(1, "instances per training job", ge=1)
    volume_gb: int = setting(50, "disk of each instance, in GB", ge=1)
    max_hours: float = setting(24.0, "maximum runtime of a job, in hours", gt=0, le=672)
    spot: bool = setting(False, "use spot instances: cheaper; interrupted jobs resume from checkpoints")
    max_wait_hours: float = setting(0.0, "spot: maximum hours from request to end; 0: twice max_hours", ge=0)
    keep_alive_minutes: int = setting(0, "warm pool: wait for the next job; not with spot", ge=0, le=360)
    subnets: list[str] = setting([], "VPC subnets of the jobs; with security_groups")
    security_groups: list[str] = setting([], "VPC security groups of the jobs; with subnets")
    network_isolation: bool | None = setting(None, "no network in containers; empty: if the job downloads nothing")
    encrypt_traffic: bool = setting(False, "encrypt the traffic between the hosts of a fold; slower")
    kms_key: str = setting("", "KMS key that encrypts outputs in S3")
    volume_kms_key: str = setting("", "KMS key that encrypts disks; not for instances with NVMe disks")
    tags: dict[str, str | int | float] = setting({}, "tags of each job")
    environment: dict[str, str | int | float] = setting({}, "extra variables of each container, shown as ***")
    input_mode: Literal["File", "FastFile"] = setting("File", "copy channels first, or stream them")
    compress_outputs: bool = setting(True, "upload outputs as model.tar.gz and output.tar.gz; false: as plain files")
    hourly_price: float = setting(0.0, "price per instance hour that you pay; 0: unknown", ge=0)
    max_cost: float = setting(0.0, "maximum cost of all jobs, in the currency of price; 0: no limit", ge=0)
    poll_seconds: float = setting(15.0, "seconds between job status checks", ge=0.1)
    stages: dict[str, Any] = setting({}, "per stage, e.g. sagemaker.stages.ensemble.instance_type=ml.m5.xlarge")

    def check(self) -> None:
        reject_if(self.spot and self.keep_alive_minutes, "spot and keep_alive_minutes exclude each other")
        reject_if(
            self.max_wait_hours and not (self.spot and self.max_wait_hours >= self.max_hours),
            f"max_wait_hours={self.max_wait_hours:g} needs spot=true and at least max_hours={self.max_hours:g}",
        )
        reject_if(bool(self.subnets) != bool(self.security_groups), "set both subnets and security_groups, or neither")
        for name, table in self.stages.items():
            reject_if(
                name not in RUN_STAGES or not isinstance(table, dict),
                f"stages.{name} must be a table of a stage; the stages: {', '.join(RUN_STAGES)}",
            )
            for key in set(table) - PER_STAGE_KEYS:
                raise ValueError(f"stages.{name}.{key} cannot be set per stage; these can: {sorted(PER_STAGE_KEYS)}")
            try:
                self.for_stage(name)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, ("stages", name, *problem["loc"])))
                raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None

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
    image: str = setting("fivefold:latest", "image of every pod", min_length=1)
    namespace: str = setting("", "namespace; empty: that of the kubectl context")
    context: str = setting("", "kubectl context of the cluster; empty: the current one")
    pvc: str = setting("fivefold", "PersistentVolumeClaim of data and runs; made if missing", min_length=1)
    runs_path: str = setting("/runs", "location of runs: /runs on the claim, or s3://bucket/prefix")
    gpus: int = setting(1, "GPUs of a pod that trains or predicts; 0: none", ge=0)
    cpus: int = setting(2, "CPU request of a pod; without a GPU also its number of threads", ge=1)
    memory: str = setting("4Gi", "memory request of a pod; its limit is twice as much", pattern=QUANTITY)
    limits: dict[str, Any] = setting({}, 'limits of a pod, beside GPUs, e.g. cpu = 4, memory = "8Gi"')
    service_account: str = setting("", "service account of the pods, for a role with access to s3://")
    queue: str = setting("", "Kueue LocalQueue in which the Jobs wait")
    poll_seconds: float = setting(5.0, "seconds between Job status checks", ge=0.05)

    def check(self) -> None:
        for name, value in self.limits.items():
            valid = re.fullmatch(QUANTITY, str(value))
            reject_if(not valid, f"limits.{name}={value!r} is not a quantity such as 4 or 8Gi")


PLATFORM_SECTIONS = ("sagemaker", "kubernetes")
"""Sections that define where stages run; they are not part of a model or of a stage's key."""


class Settings(Section):
    """All settings of a run. `contract.stage_specs` names the sections that each stage reads."""

    recipe: str = setting("", "name of a shipped recipe, or path of a .toml or .json file")
    system: str = setting("", "name of the models of this recipe; empty: the recipe's name")
    offline: bool = setting(False, "open no connection for pretrained weights")
    seed: int = setting(42, "seed of weights, order and augmentation", ge=0, le=2**32 - 1)
    fold: int | None = setting(None, "fold to train (or to export); also FOLD or JOB_COMPLETION_INDEX", ge=0)
    stage: str = setting("", "stage to run if no argument names it")
    run: str = setting("", "run name and report title; a stage reads and writes in the run's folder")
    runs: str = setting("runs", "folder of all runs, or an s3://bucket/prefix")
    time: str = setting("", "limit of a run on this machine, e.g. 90s, 30m or 2h; empty: none")
    hourly_price: float = setting(0.0, "price of an hour of this machine; 0: unknown", ge=0)
    budget: float = setting(0.0, "limit of a run's price on this machine, with hourly_price; 0: none", ge=0)
    on_version_change: Literal["rerun", "warn", "ignore"] = setting(
        "warn", "what to do with results of other code or package versions: rerun, warn or ignore"
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
    audit: Audit = Audit()
    serve: Serve = Serve()
    sagemaker: SageMaker = SageMaker()
    kubernetes: Kubernetes = Kubernetes()

    def check(self) -> None:
        for key in ("system", "run"):
            reject_if(len(getattr(self, key).encode()) > MAX_NAME_BYTES, f"{key} is longer than {MAX_NAME_BYTES} bytes")
        valid = not self.time or re.fullmatch(DURATION, self.time)
        reject_if(not valid, f"time={self.time!r} is not a time such as 90s, 30m or 2h")
        reject_if(self.budget and not self.hourly_price, f"budget={self.budget:g} needs hourly_price")

    @property
    def time_limit(self) -> float:
        """Return the seconds that `time` and `budget` allow, infinity if neither is set."""
        seconds = float(self.time[:-1]) * SECONDS[self.time[-1]] if self.time else math.inf
        return min(seconds, self.budget / self.hourly_price * SECONDS["h"]) if self.budget else seconds

    @property
    def limit_words(self) -> str:
        """Return the limit of the run's time as it was set, empty if there is none."""
        keys = {"time": self.time, "budget": f"{self.budget:g}" if self.budget else ""}
        return " ".join(f"{key}={value}" for key, value in keys.items() if value)

    def student(self) -> "Settings":
        """Return the settings with `[distill.model]` and `[distill.train]` applied over `[model]` and `[train]`."""
        # Only keys that were set: others may depend on the student's own weights.
        model = Model.model_validate({**self.model.model_dump(exclude_unset=True), **self.distill.model})
        train = Train.model_validate({**self.train.model_dump(), **self.distill.train})
        return self.model_copy(update={"model": model, "train": train})

    def of_stage(self, stage: str) -> "Settings":
        """Return the settings of a stage that trains: for `distill` those of the student."""
        return self.student() if stage == "distill" else self


SECTIONS = {name for name, field in Settings.model_fields.items() if isinstance(field.default, Section)}
EXECUTION_KEYS = {
    "stage",
    "run",
    "runs",
    "on_version_change",
    "offline",
    "train.linear_first",
    "data.cache",
    "data.cache_gib",
    "data.max_unpacked_gib",
}
EXECUTION_KEYS |= {"train.cache_in_memory", "train.num_workers", "train.loggers", "train.logger_project"}
EXECUTION_KEYS |= {"train.checkpoint_minutes", "train.checkpoint_steps"}
"""Keys that cannot change a result; a stage's key does not contain them."""
