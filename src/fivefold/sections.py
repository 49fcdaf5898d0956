"""What every section of a recipe is, and those that speak of what is trained already: `[ensemble]`, `[export]`,
`[serve]`, `[evaluate]`, `[compare]`.

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
