"""Validate a plan for SageMaker offline: its settings, its requests against the service's model, and its maximum cost."""

import re
from collections.abc import Iterator
from functools import cache, reduce
from typing import Any

from fivefold.contract.s3.urls import is_url, parse
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Plan
from fivefold.launchers.sagemaker.requests import (
    FILE_SUFFIXES,
    Request,
    build_requests,
    channels,
    run_url,
    stage_options,
)
from fivefold.lookup import did_you_mean

HINTS = {
    "RoleArn": "sagemaker.role must be arn:aws:iam::ACCOUNT:role/NAME",
    "TrainingJobName": "use a shorter run=, of letters, digits and hyphens",
    "HyperParameters": "put settings into a recipe in the image, and set recipe=NAME",
    "InstanceType": "sagemaker.instance_type must be a training instance, such as ml.g5.xlarge",
    "S3OutputPath": "sagemaker.output must be s3://bucket/prefix",
    "Tags": "see sagemaker.tags",
    "Environment": "see sagemaker.environment",
}
"""The remedy for an error in a part of a request."""
JAVA_PATTERNS = ((r"\p{L}", r"\w"), (r"\p{N}", r"\d"), (r"\p{Z}", r"\s"))
"""Java syntax in the service's patterns, and Python's equivalents."""


def validate_requests(plan: Plan) -> dict[str, Request]:
    """Return the request of each step. Raise a SettingsError for missing settings and for requests that the service would reject."""
    output = plan.settings.sagemaker.output
    if not is_url(output):
        raise SettingsError(f"sagemaker.output={output} is not a URL: set it to s3://bucket/prefix")
    parse(output, "sagemaker.output")
    for step in plan.steps:
        options = stage_options(plan.settings, step)
        if not options.image:
            raise SettingsError(
                "sagemaker.image is not set: set its URI in ECR (docs/sagemaker.md describes how to push it)"
            )
        if options.instance_count > 1 and step.stage not in ("train-fold", "distill"):
            raise SettingsError(
                f"{step.stage} runs on one instance, but sagemaker.instance_count={options.instance_count}; set it only for "
                f"training stages: sagemaker.stages.train_fold.instance_count={options.instance_count}"
            )
        for name, source in channels(plan, step, run_url(plan)).items():
            if source.lower().endswith(FILE_SUFFIXES) and options.input_mode == "FastFile":
                raise SettingsError(
                    f"{name}={source} is one file with random access, which is slow with FastFile: "
                    "set sagemaker.input_mode=File, or use a folder"
                )
    requests = build_requests(plan)
    for name, request in requests.items():
        check_request(name, request)
    return requests


def check_request(name: str, request: Request) -> None:
    """Raise a SettingsError if the service's model does not accept the request of the step `name`."""
    from botocore.validate import ParamValidator

    shape = _input_shape()
    report = ParamValidator().validate(request, shape).generate_report()
    problems = report.splitlines() or list(_limit_errors(shape, request, ""))
    hinted = [problem + next((f" ({HINTS[part]})" for part in HINTS if part in problem), "") for problem in problems]
    if hinted:
        raise SettingsError(f"CreateTrainingJob of {name}: {'; '.join(hinted)}")


@cache
def _input_shape() -> Any:
    """Return the service's model of a request from botocore's files, without region, credentials and network."""
    from botocore.session import Session

    return Session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape


def _limit_errors(shape: Any, value: Any, path: str) -> Iterator[str]:
    """Yield the violations of limits that ParamValidator does not check. The types in `value` must be valid."""
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if shape.type_name == "map":
            yield from _limit_errors(shape.key, name, f"{path}.{name}")
            part_shape = shape.value
        else:
            part_shape = shape.members[name] if shape.type_name == "structure" else shape.member
        yield from _limit_errors(part_shape, part, f"{path}.{name}".lstrip("."))
    size = len(value) if isinstance(value, str | list | dict) else value
    if "max" in shape.metadata and size > shape.metadata["max"]:
        yield f"{path}: {size} is above the maximum {shape.metadata['max']} of a {shape.type_name}"
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{path}={value!r} is unknown{did_you_mean(value, shape.enum)}"
    elif "pattern" in shape.metadata:
        pattern = reduce(lambda text, pair: text.replace(*pair), JAVA_PATTERNS, shape.metadata["pattern"])
        if not re.fullmatch(pattern, value):
            yield f"{path}={value!r} is not of the form {shape.metadata['pattern']}"


def check_cost(plan: Plan) -> str:
    """Describe the plan's maximum cost. Raise a SettingsError if it exceeds `sagemaker.max_cost`, or if that is set but a price is not.

    The idle time of a warm pool counts, a spot discount does not.
    """
    costs, limit = {}, plan.settings.sagemaker.max_cost
    for step in plan.steps:
        options = stage_options(plan.settings, step)
        hours = options.max_hours + options.keep_alive_minutes / 60
        costs[step.name] = options.hourly_price * options.instance_count * hours
    total, unpriced = sum(costs.values()), [name for name, cost in costs.items() if not cost]
    if limit and unpriced:
        raise SettingsError(
            f"sagemaker.max_cost={limit:g} needs sagemaker.hourly_price, the price of an instance, of {unpriced[0]}"
        )
    if limit and total > limit:
        most_expensive = max(costs, key=lambda name: costs[name])
        raise SettingsError(
            f"the plan may cost up to {total:.2f}, above sagemaker.max_cost={limit:g}; the most expensive of its {len(costs)} "
            f"steps: {most_expensive}, up to {costs[most_expensive]:.2f}. Lower sagemaker.max_hours, or raise sagemaker.max_cost"
        )
    if unpriced:
        return f"the cost of {len(unpriced)} of {len(costs)} jobs is unknown: set sagemaker.hourly_price and sagemaker.max_cost"
    return f"{len(costs)} jobs may cost up to {total:.2f} (price × longest runtime); sagemaker.max_cost={limit:g}"
