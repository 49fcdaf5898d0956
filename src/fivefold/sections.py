"""What every section of a recipe is, and those that speak of what is trained already: `[ensemble]`, `[export]`,
`[evaluate]`, `[compare]`; and of where it is trained: `[kubernetes]`.

The others stand in `recipe.py`, which is the door to all of them.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Spec = str | dict[str, Any]
"""A thing with parameters, by name: `"horizontal_flip"` or `{ name = "rotation", degrees = 15 }`."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


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


class Compare(Section):
    runs: list[str] = Field([], description="folders of runs, each with its ensemble's submission, its models, or both")
    files: list[str] = Field([], description="submission files, beside those of SM_CHANNEL_SUBMISSIONS")


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


OF_PLATFORMS = ("kubernetes",)
"""Sections that say where stages run: they are no part of a model, and of no stage's key."""
