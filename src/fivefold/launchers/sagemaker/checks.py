"""What SageMaker would refuse, told before anything is asked of it: no region and no credentials are needed.

The limits are those of the service's own model, as botocore ships it: types, required and unknown names by its
validator; lengths, patterns, ranges and names of instances by a walk over its shapes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from fivefold.choose import did_you_mean
from fivefold.contract.s3.urls import is_url, parse
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, Plan
from fivefold.launchers.sagemaker.requests import FILES, Request, channels, options_of, requests_of, root_of

NEEDED = {
    "image": "the image's URI in ECR (docs/sagemaker.md says how it gets there)",
    "role": "the ARN of the role that the jobs have",
    "instance_type": "as in sagemaker.instance_type=ml.g5.xlarge",
}
MENDS = {
    "RoleArn": "sagemaker.role is arn:aws:iam::ACCOUNT:role/NAME",
    "TrainingJobName": "give a shorter run=, of letters, digits and hyphens",
    "HyperParameters": "put settings into a recipe that the image holds, and give recipe=NAME",
    "InstanceType": "sagemaker.instance_type is one that trains, with ml. before it",
    "S3OutputPath": "sagemaker.output is s3://bucket/prefix",
    "Tags": "see sagemaker.tags",
    "Environment": "see sagemaker.environment",
}
"""What to do about what is wrong at a place of a request."""


def checked_requests(plan: Plan) -> dict[str, Request]:
    """The requests of a plan, all of which the service's model accepts; a SettingsError for what it would not."""
    check_settings(plan)
    requests = requests_of(plan)
    for name, request in requests.items():
        check_request(name, request)
    return requests


def check_inputs(inputs: Inputs) -> Inputs:
    """The inputs, all of them in S3; nothing is looked up there, so ground truth counts only where it is given."""
    for name, path in vars(inputs).items():
        if path and not is_url(path):
            raise SettingsError(
                f"{name}={path} is of this machine, and a job reads S3: aws s3 sync {path} s3://BUCKET/{name}, then give "
                f"{name}=s3://BUCKET/{name} (or take platform=sagemaker-local)"
            )
        if path:
            parse(path, name)
    return inputs


def check_settings(plan: Plan) -> None:
    """Raises a SettingsError for what a plan lacks on SageMaker, in the words of `[sagemaker]`."""
    output = plan.settings.sagemaker.output
    if not output:
        raise SettingsError("sagemaker.output is not given: s3://bucket/prefix, below which the run lies")
    if not is_url(output):
        raise SettingsError(f"sagemaker.output={output} is no URL: give s3://bucket/prefix, below which the run lies")
    parse(output, "sagemaker.output")
    for step in plan.steps:
        options = options_of(plan.settings, step)
        for key, meaning in NEEDED.items():
            if not getattr(options, key):
                raise SettingsError(f"sagemaker.{key} is not given for {step.stage}: {meaning}")
        if options.instance_count > 1 and step.stage not in ("train-fold", "distill"):
            raise SettingsError(
                f"{step.stage} runs on one instance, and sagemaker.instance_count={options.instance_count}; give it to "
                f"the stages that train: sagemaker.stages.train_fold.instance_count={options.instance_count}"
            )
    _check_channels(plan)


def _check_channels(plan: Plan) -> None:
    for step in plan.steps:
        for name, source in channels(plan, step, root_of(plan)).items():
            if not is_url(source):
                raise SettingsError(f"{step.name} reads {name} from {source}, which is of this machine; give it in S3")
            if source.lower().endswith(FILES) and options_of(plan.settings, step).input_mode == "FastFile":
                raise SettingsError(
                    f"{name}={source} is one file, read here and there, which FastFile is slow at: "
                    "give sagemaker.input_mode=File, or a folder"
                )


def check_request(name: str, request: Request, operation: str = "CreateTrainingJob") -> None:
    """Raises a SettingsError for a request that the service's model does not accept; `name` is the step's."""
    problems = _unlike_its_shape(request, operation) or list(_contradictions(request))
    if problems:
        raise SettingsError(f"{operation} of {name}: {'; '.join(problems)}")


def _unlike_its_shape(request: Request, operation: str) -> list[str]:
    from botocore.validate import ParamValidator

    shape = _model().operation_model(operation).input_shape
    report = ParamValidator().validate(request, shape)
    if report.has_errors():
        lines = [" ".join(line.split()) for line in report.generate_report().splitlines()]
        return [f"{line}{_mend(re.findall(r'[A-Za-z0-9]+', line))}" for line in lines]
    return [f"{problem}{_mend(where)}" for where, problem in _beyond(shape, request, ())]


def _contradictions(request: Request) -> Iterator[str]:
    """What the service refuses though each part is as its shape says."""
    spot = request.get("EnableManagedSpotTraining", False)
    limits = request.get("StoppingCondition", {})
    runtime, wait = limits.get("MaxRuntimeInSeconds", 0), limits.get("MaxWaitTimeInSeconds")
    if spot and request.get("ResourceConfig", {}).get("KeepAlivePeriodInSeconds"):
        yield "spot instances have no warm pool: leave out sagemaker.spot or sagemaker.keep_alive_minutes"
    if spot and (wait is None or wait < runtime):
        yield f"MaxWaitTimeInSeconds={wait} of spot instances contains MaxRuntimeInSeconds={runtime}; raise it"
    if not spot and wait is not None:
        yield f"MaxWaitTimeInSeconds={wait} is of spot instances alone"
    names = [channel.get("ChannelName") for channel in request.get("InputDataConfig", [])]
    yield from (f"two channels are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1}))


@cache
def _model() -> Any:
    """The service's model. Found in botocore's own files: no region, no credentials, no request."""
    import botocore.session

    return botocore.session.Session().get_service_model("sagemaker")


def _beyond(shape: Any, value: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a value is longer, larger or otherwise than its shape allows, and how; types are checked already."""
    path, bounds = ".".join(where), shape.metadata
    if shape.type_name == "structure":
        for name, part in value.items():
            yield from _beyond(shape.members[name], part, (*where, name))
    elif shape.type_name in ("list", "map"):
        if len(value) > bounds.get("max", len(value)):
            yield where, f"{path} has {len(value)} entries, and at most {bounds['max']} are allowed"
        yield from _parts_beyond(shape, value, where)
    elif shape.type_name == "string":
        yield from ((where, f"{path}={value!r}{problem}") for problem in _text_beyond(shape, value))
    elif shape.type_name in ("integer", "long") and not (bounds.get("min", value) <= value <= bounds.get("max", value)):
        yield where, f"{path}={value} is not from {bounds.get('min', 0)} to {bounds.get('max', 'any number')}"


def _parts_beyond(shape: Any, value: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if shape.type_name == "list":
        for number, part in enumerate(value):
            yield from _beyond(shape.member, part, (*where, str(number)))
        return
    for name, part in value.items():
        yield from _beyond(shape.key, name, (*where, name))
        yield from _beyond(shape.value, part, (*where, name))


def _text_beyond(shape: Any, text: str) -> Iterator[str]:
    bounds = shape.metadata
    if len(text) > bounds.get("max", len(text)):
        yield f" has {len(text)} characters, and at most {bounds['max']} are allowed"
    elif len(text) < bounds.get("min", 0):
        yield f" has {len(text)} characters, and at least {bounds['min']} are needed"
    elif shape.enum and text not in shape.enum:
        yield f" is none that is known here{did_you_mean(text, shape.enum)}"
    elif "pattern" in bounds and not _fits(bounds["pattern"], text):
        yield f" is not of the form {bounds['pattern']}"


def _fits(pattern: str, text: str) -> bool:
    """Whether the whole text is as a pattern of the service's, written for Java, says."""
    for java, python in ((r"\p{L}", r"\w"), (r"\p{N}", r"\d"), (r"\p{Z}", r"\s")):
        pattern = pattern.replace(java, python)
    return re.fullmatch(pattern, text) is not None


def _mend(where: Sequence[str]) -> str:
    found = next((MENDS[name] for name in reversed(where) if name in MENDS), "")
    return f" ({found})" if found else ""


def region_of(plan: Plan, environ: Mapping[str, str]) -> str:
    """The region that the jobs run in; a SettingsError where none is named."""
    import boto3
    from botocore.exceptions import BotoCoreError

    named = plan.settings.sagemaker.region or environ.get("AWS_REGION", "")
    try:
        region = named or boto3.session.Session().region_name
    except BotoCoreError as error:
        raise SettingsError(f"no region for SageMaker: {error}; check AWS_PROFILE") from error
    if not region:
        raise SettingsError("no region for SageMaker: give sagemaker.region=eu-central-1, or set AWS_DEFAULT_REGION")
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z]+)+-\d", region):
        raise SettingsError(f"{region!r} is no region: they are called as eu-central-1; see sagemaker.region")
    return region
