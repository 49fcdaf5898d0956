"""Checks a plan for SageMaker offline: its settings, its requests against the service's model, and its highest cost."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from fivefold.choose import did_you_mean
from fivefold.contract.s3.urls import is_url, parse
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Plan
from fivefold.launchers.sagemaker.requests import FILES, Request, channels, options_of, requests_of, root_of

HINTS = {
    "RoleArn": "sagemaker.role is arn:aws:iam::ACCOUNT:role/NAME",
    "TrainingJobName": "give a shorter run=, of letters, digits and hyphens",
    "HyperParameters": "put settings into a recipe that the image holds, and give recipe=NAME",
    "InstanceType": "sagemaker.instance_type is one that trains, as ml.g5.xlarge",
    "S3OutputPath": "sagemaker.output is s3://bucket/prefix",
    "Tags": "see sagemaker.tags",
    "Environment": "see sagemaker.environment",
}
"""What to do about an error at a part of a request."""
UNITS = {"string": " characters", "list": " entries", "map": " entries"}
JAVA_PATTERNS = {r"\p{L}": r"\w", r"\p{N}": r"\d", r"\p{Z}": r"\s"}
"""Parts of the service's patterns that Python spells otherwise."""


def validated_requests(plan: Plan) -> dict[str, Request]:
    """Returns the request of each step; raises a SettingsError for settings that lack and for what the service refuses."""
    output = plan.settings.sagemaker.output
    if not is_url(output):
        raise SettingsError(f"sagemaker.output={output} is no URL: give s3://bucket/prefix, below which the run lies")
    parse(output, "sagemaker.output")
    for step in plan.steps:
        options = options_of(plan.settings, step)
        if not options.image:
            raise SettingsError(
                "sagemaker.image is not given: its URI in ECR (docs/sagemaker.md says how it gets there)"
            )
        if options.instance_count > 1 and step.stage not in ("train-fold", "distill"):
            raise SettingsError(
                f"{step.stage} runs on one instance, and sagemaker.instance_count={options.instance_count}; give it to "
                f"the stages that train: sagemaker.stages.train_fold.instance_count={options.instance_count}"
            )
        for name, source in channels(plan, step, root_of(plan)).items():
            if source.lower().endswith(FILES) and options.input_mode == "FastFile":
                raise SettingsError(
                    f"{name}={source} is one file, read here and there, which FastFile is slow at: "
                    "give sagemaker.input_mode=File, or a folder"
                )
    requests = requests_of(plan)
    for name, request in requests.items():
        check_request(name, request)
    return requests


def check_request(name: str, request: Request, operation: str = "CreateTrainingJob") -> None:
    """Raises a SettingsError for a request of the step `name` that the service's model does not accept."""
    from botocore.validate import ParamValidator

    shape = _input_shape(operation)
    report = ParamValidator().validate(request, shape).generate_report()
    problems = report.splitlines() or list(_limit_errors(shape, request, ""))
    hinted = [problem + next((f" ({HINTS[part]})" for part in HINTS if part in problem), "") for problem in problems]
    if hinted:
        raise SettingsError(f"{operation} of {name}: {'; '.join(hinted)}")


@cache
def _input_shape(operation: str) -> Any:
    """The service's model of a request, from botocore's own files: no region, no credentials, no network."""
    from botocore.session import Session

    return Session().get_service_model("sagemaker").operation_model(operation).input_shape


def _limit_errors(shape: Any, value: Any, path: str) -> Iterator[str]:
    """Yields where `value`, of the right types, breaks a limit that ParamValidator leaves to the service to check."""
    parts: list[tuple[Any, Any, str]] = []
    if shape.type_name == "structure":
        parts = [(shape.members[name], part, f"{path}.{name}") for name, part in value.items()]
    elif shape.type_name == "list":
        parts = [(shape.member, part, f"{path}[{index}]") for index, part in enumerate(value)]
    elif shape.type_name == "map":
        parts = [(shape.key, name, f"{path}.{name}") for name in value]
        parts += [(shape.value, part, f"{path}.{name}") for name, part in value.items()]
    for part_shape, part, name in parts:
        yield from _limit_errors(part_shape, part, name.removeprefix("."))
    size, unit = len(value) if shape.type_name in UNITS else value, UNITS.get(shape.type_name, "")
    if "max" in shape.metadata and size > shape.metadata["max"]:
        yield f"{path} is {size}{unit}, and at most {shape.metadata['max']} are allowed"
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{path}={value!r} is none that is known here{did_you_mean(value, shape.enum)}"
    elif "pattern" in shape.metadata:
        pattern = shape.metadata["pattern"]
        for java, python in JAVA_PATTERNS.items():
            pattern = pattern.replace(java, python)
        if not re.fullmatch(pattern, value):
            yield f"{path}={value!r} is not of the form {shape.metadata['pattern']}"


def max_costs(plan: Plan) -> dict[str, float]:
    """Returns the most that each step may cost; a warm pool's wait counts, a spot's discount does not; 0: no price."""
    options = {step.name: options_of(plan.settings, step) for step in plan.steps}
    return {
        name: one.price * one.instance_count * (one.max_hours + one.keep_alive_minutes / 60)
        for name, one in options.items()
    }


def check_cost(plan: Plan) -> str:
    """Returns in words what the plan may cost; raises a SettingsError above `sagemaker.max_cost`, or without a price."""
    costs, limit = max_costs(plan), plan.settings.sagemaker.max_cost
    unpriced = [name for name, cost in costs.items() if not cost]
    if unpriced and limit:
        raise SettingsError(
            f"sagemaker.max_cost={limit:g} needs the price of {unpriced[0]}'s instance for an hour: sagemaker.price=, or "
            "sagemaker.stages.STAGE.price="
        )
    if unpriced:
        return f"what {len(unpriced)} of {len(costs)} jobs may cost is not known: give sagemaker.price and sagemaker.max_cost"
    total, dearest = sum(costs.values()), max(costs, key=lambda name: costs[name])
    if limit and total > limit:
        raise SettingsError(
            f"the plan may cost up to {total:.2f}, above sagemaker.max_cost={limit:g}; the dearest of its {len(costs)} "
            f"steps: {dearest}, up to {costs[dearest]:.2f}. Lower sagemaker.max_hours, take a cheaper instance, or raise "
            "sagemaker.max_cost"
        )
    words = f", of {limit:g} allowed" if limit else ", no sagemaker.max_cost is set"
    return f"{len(costs)} jobs may cost up to {total:.2f} (price × longest runtime){words}"
