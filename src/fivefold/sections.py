"""What every section of a recipe is; `[data]`, those that speak of what is trained already: `[ensemble]`, `[export]`,
`[serve]`, `[evaluate]`, `[compare]`; and of where it is trained: `[sagemaker]`, `[kubernetes]`.

The others stand in `recipe.py`, which is the door to all of them.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Spec = str | dict[str, Any]
"""A thing with parameters, by name: `"horizontal_flip"` or `{ name = "rotation", degrees = 15 }`."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class Data(Section):
    layout: str = Field(
        "auto",
        description="auto, folders (a folder a class), mask_profiles (one a person), csv, or products (a row a product)",
    )
    table: str = Field("", description="the CSV below the channel; empty: train.csv, or the only one")
    id_column: str = Field("", description="CSV column of row ids; empty: id if there is one, else the path")
    path_column: str = Field("", description="CSV column of image paths; empty: image_path, img_path, path or the like")
    label_column: str = Field("", description="CSV column of classes; empty: target, label, class_name or the like")
    group_column: str = Field("", description="CSV column of groups that no fold may part (people, products)")
    base_path: str = Field(
        "", description="folder that a CSV's paths count from; empty: the one below which they exist"
    )
    category_column: str = Field("", description="products: column of categories; empty: category_name or category")
    image_types: dict[str, str] = Field(
        {
            "main_image": "full_shot",
            "back_image": "full_shot",
            "text_tag_image": "care_label",
            "neck_tag_image": "neck_label",
            "other": "detail_shot",
        },
        description="products: the class of the images in each column",
    )
    age_cuts: list[float] = Field([30, 60], description="mask_profiles: ages at which the next class of age begins")
    same_classes: list[list[str]] = Field([], description='names that mean the same class, as [["A", "B"], ["C", "D"]]')
    same_class: Literal["none", "merge", "sum"] = Field(
        "none",
        description="what becomes of same_classes: nothing; merge: one class in training, parted equally in a "
        "submission; sum: in a submission each gets the sum of their probabilities",
    )
    store_size: int = Field(
        0, ge=0, description="an image's shorter side is shrunk to so many pixels before anything else; 0: as decoded"
    )
    scaled_decoding: bool = Field(
        False, description="decode JPEGs at 1/2, 1/4 or 1/8 where that is not below store_size: faster, other pixels"
    )
    cache: str = Field(
        "auto",
        description="folder of images that are decoded once for all stages; auto: .cache beside the runs, inside a run; off",
    )
    cache_gib: float = Field(64.0, gt=0, description="largest size of an image cache; one that is larger is not made")

    @model_validator(mode="after")
    def _ages_rise(self) -> "Data":
        if not self.age_cuts or sorted(set(self.age_cuts)) != self.age_cuts or self.age_cuts[0] <= 0:
            raise ValueError(f"age_cuts={self.age_cuts} are ages above 0, each larger than the one before")
        return self

    @model_validator(mode="after")
    def _each_name_once(self) -> "Data":
        names = [name for group in self.same_classes for name in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if any(len(group) < 2 for group in self.same_classes):
            raise ValueError("same_classes are groups of two names or more")
        if twice:
            raise ValueError(f"same_classes name {twice[0]!r} twice; a name is in one group, once")
        if self.same_class != "none" and not names:
            raise ValueError(f"same_class={self.same_class} needs same_classes, the groups of names")
        return self

    @model_validator(mode="after")
    def _scaled_to_a_size(self) -> "Data":
        if self.scaled_decoding and not self.store_size:
            raise ValueError("scaled_decoding=true needs store_size, below which nothing is scaled")
        return self


class Ensemble(Section):
    blend: Literal[
        "mean", "weighted", "fitted", "geometric", "rank", "vote", "product", "greedy", "greedy_accuracy"
    ] = Field(
        "fitted",
        description="between systems: equal mean, given weights, weights by out-of-fold logloss, geometric mean, "
        "mean of ranks, vote, product of systems that know different factors of the classes, or greedy selection "
        "out-of-fold by logloss or by accuracy",
    )
    weights: dict[str, Any] = Field({}, description="of blend weighted: a number for each system, by its name")
    within: Literal["mean", "geometric", "rank", "vote"] = Field(
        "mean", description="between the models of one system, which have an equal say"
    )
    submissions: list[str] = Field(
        [], description="submission files of any origin that are systems too, beside those of SM_CHANNEL_SUBMISSIONS"
    )
    temperature: Literal["none", "holdout"] = Field(
        "holdout", description="fitted on the holdout where there is one, or none"
    )
    submission: str = Field("submission.csv", description="file name of the submission")
    answer_column: str = Field(
        "", description="column of predicted classes, where no sample submission names one; empty: a column a class"
    )
    number_column: str = Field("", description="with answer_column: first column, of the rows' numbers; empty: none")

    @model_validator(mode="after")
    def _weights_are_used(self) -> "Ensemble":
        if bool(self.weights) != (self.blend == "weighted"):
            raise ValueError(
                f"blend={self.blend} and weights={self.weights}: blend weighted has weights, others have none"
            )
        for name, value in self.weights.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"weights.{name}={value!r}: a number from 0 on is needed")
        return self

    @model_validator(mode="after")
    def _a_name_alone(self) -> "Ensemble":
        if not self.submission or set(self.submission) & set("/\\"):
            raise ValueError(f"submission={self.submission!r} is not the name of a file in the output's folder")
        return self

    @model_validator(mode="after")
    def _numbers_beside_answers(self) -> "Ensemble":
        if self.number_column and self.number_column == self.answer_column:
            raise ValueError(f"number_column and answer_column are both {self.number_column!r}; name two columns")
        if self.number_column and not self.answer_column:
            raise ValueError(f"number_column={self.number_column!r} needs answer_column, the column of the classes")
        return self


class Export(Section):
    format: str = Field("onnx", description="onnx (a graph with all its members), or pth (the state dict of one)")
    file: str = Field("", description="file name; empty: model.onnx, model.pth")
    weights: Literal["best", "raw"] = Field(
        "best", description="best: those that predict (averaged, where train.ema_decay is on); raw: the others"
    )

    @model_validator(mode="after")
    def _a_name_alone(self) -> "Export":
        if set(self.file) & set("/\\") or self.file.startswith("."):
            raise ValueError(f"file={self.file!r} is not the name of a file in the output's folder")
        return self


class Evaluate(Section):
    bins: int = Field(15, ge=1, description="bins of the calibration error")
    top_k: int = Field(5, ge=1, description="k of the top-k accuracy")
    gallery: int = Field(48, ge=0, description="most confident mistakes that the report shows as images")


class Serve(Section):
    host: str = Field("0.0.0.0", min_length=1, description="address to listen at; :: for IPv6 too")
    port: int = Field(8080, ge=0, le=65535, description="port to listen at (or SAGEMAKER_BIND_TO_PORT); 0: a free one")
    batch_size: int = Field(32, ge=1, description="images of all requests that the model takes in one step at most")
    max_wait_ms: float = Field(5.0, ge=0, description="how long the first image of a batch waits for others")
    queue: int = Field(
        256, ge=1, description="images of all requests under way at most; what is more is told to come later"
    )
    max_body_mb: float = Field(8.0, gt=0, description="largest body of a request, in millions of bytes")
    max_megapixels: float = Field(50.0, gt=0, description="largest image, in millions of pixels")
    timeout_s: float = Field(60.0, gt=0, description="seconds for a request to be received and answered")
    drain_s: float = Field(25.0, ge=0, description="seconds that requests under way have to be answered after SIGTERM")


class Compare(Section):
    runs: list[str] = Field([], description="folders of runs, each with its ensemble's submission, its models, or both")
    files: list[str] = Field([], description="submission files, beside those of SM_CHANNEL_SUBMISSIONS")


class SageMaker(Section):
    image: str = Field(
        "", description="the image: its URI in ECR; sagemaker-local: a local one, empty: fivefold:latest"
    )
    role: str = Field("", description="ARN of the role that the jobs have, arn:aws:iam::ACCOUNT:role/NAME")
    output: str = Field("", description="s3://bucket/prefix below which each run has a folder of its name")
    region: str = Field("", description="empty: that of AWS_DEFAULT_REGION or of the profile")
    instance_type: str = Field("", description="of each job, as ml.g5.xlarge")
    instance_count: int = Field(1, ge=1, description="instances of a job that trains")
    volume_gb: int = Field(50, ge=1, description="disk of an instance")
    max_hours: float = Field(24.0, gt=0, le=672, description="longest runtime of a job")
    spot: bool = Field(False, description="spare capacity, cheaper and sometimes taken back; goes on from checkpoints")
    max_wait_hours: float = Field(
        0.0, ge=0, description="spot: longest time from request to end, waiting included; 0: twice max_hours"
    )
    keep_alive_minutes: int = Field(
        0, ge=0, le=360, description="warm pool: minutes that an instance waits for the next job; not with spot"
    )
    subnets: list[str] = Field([], description="of the VPC that jobs run in; with security_groups")
    security_groups: list[str] = Field([], description="of the VPC that jobs run in; with subnets")
    isolate: bool = Field(
        False, description="no network in the container; needs nothing that is fetched, as pretrained"
    )
    kms_key: str = Field("", description="KMS key that encrypts outputs in S3")
    volume_kms_key: str = Field("", description="KMS key that encrypts disks; not for instances with NVMe disks")
    tags: dict[str, Any] = Field({}, description="of each job: texts by name")
    environment: dict[str, Any] = Field({}, description="further variables of each container: texts by name")
    input_mode: Literal["File", "FastFile"] = Field(
        "File", description="channels are copied first, or read as asked for"
    )
    compress: bool = Field(True, description="outputs as model.tar.gz and output.tar.gz; false: as plain files")
    price: float = Field(0.0, ge=0, description="of an instance for an hour, as you pay it; 0: not given")
    max_cost: float = Field(
        0.0,
        ge=0,
        description="most that all jobs together may cost, in the unit of price; more is refused; 0: no limit",
    )
    poll_seconds: float = Field(15.0, ge=0.1, description="seconds between two looks at a job")
    stages: dict[str, Any] = Field(
        {}, description="what a stage has otherwise: sagemaker.stages.ensemble.instance_type=ml.c6i.xlarge"
    )

    @model_validator(mode="after")
    def _can_work(self) -> "SageMaker":
        if self.spot and self.keep_alive_minutes:
            raise ValueError("spot and keep_alive_minutes exclude each other: spot instances have no warm pool")
        if self.max_wait_hours and not self.spot:
            raise ValueError(
                f"max_wait_hours={self.max_wait_hours:g} is of spot instances; set spot=true, or leave it out"
            )
        if 0 < self.max_wait_hours < self.max_hours:
            raise ValueError(
                f"max_wait_hours={self.max_wait_hours:g} is less than max_hours={self.max_hours:g}, which it contains"
            )
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("subnets and security_groups go together: a VPC needs both")
        return self

    @model_validator(mode="after")
    def _texts_by_name(self) -> "SageMaker":
        for key, table in (("tags", self.tags), ("environment", self.environment)):
            for name, value in table.items():
                if isinstance(value, bool) or not isinstance(value, str | int | float):
                    raise ValueError(f"{key}.{name}={value!r} is no text")
        return self

    @model_validator(mode="after")
    def _stages_can_work(self) -> "SageMaker":
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


class Kubernetes(Section):
    image: str = Field("fivefold:latest", min_length=1, description="the image of every pod")
    namespace: str = Field("", description="empty: that of kubectl's context")
    context: str = Field("", description="the cluster, as kubectl config names it; empty: the current one")
    claim: str = Field("fivefold", min_length=1, description="the claim with data and runs; made where it is not there")
    runs: str = Field("/runs", description="where runs lie: /runs of the claim, or s3://bucket/prefix")
    gpus: int = Field(1, ge=0, description="GPUs of a pod that trains or predicts; 0: none")
    cpus: int = Field(2, ge=1, description="CPUs that a pod asks for; without a GPU also the threads of its process")
    memory: str = Field("4Gi", pattern=r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?", description="memory that a pod asks for")
    service_account: str = Field("", description="the pods' service account, for a role that may use s3://")
    queue: str = Field("", description="the LocalQueue of Kueue that Jobs wait in")
    poll_seconds: float = Field(5.0, ge=0.05, description="seconds between two looks at the Jobs")


OF_PLATFORMS = ("sagemaker", "kubernetes")
"""Sections that say where stages run: they are no part of a model, and of no stage's key."""
