"""Convert a plan to requests to SageMaker: one CreateTrainingJob per step, as a plain dict.

The outputs of a run are below `<output>/<run>/`:

    split/<job>/output/…    folds/fold-2/<job>/output/…    ensemble/<job>/output/…    checkpoints/fold-2/…

The folder of a step is the channel of the next step; `folds/` is the channel of the ensemble and of the student.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

from fivefold.config.loading import in_sections, normalize_key
from fivefold.config.recipes import shipped_recipes
from fivefold.config.schema import SECTIONS, SageMaker, Settings
from fivefold.contract.record import IMAGE_VARIABLE
from fivefold.contract.s3.urls import is_url
from fivefold.contract.stage_specs import LOGGED_METRICS, STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Plan, Step

Request = dict[str, Any]

FOLDS_PREFIX = "folds"
CHECKPOINTS = "checkpoints"
CHECKPOINTS_IN_CONTAINER = "/opt/ml/checkpoints"
CHANNEL_PREFIX = "SM_CHANNEL_"
MAX_NAME_LENGTH = 63
TIME_FORMAT = "%Y%m%d%H%M%S"
"""The time at the end of a job's name distinguishes the jobs of a step."""
FILE_SUFFIXES = (".zip", ".csv", ".parquet")
METRIC_PATTERN = r"metric fold=.* {}=([-+.0-9a-z]+)"
"""A regular expression for a metric of the training log, in basic syntax. Its only group is the value."""
STEP_VARIABLES = ("STAGE", "FOLD", IMAGE_VARIABLE)
"""The variables that Fivefold sets. All others are the user's, and may contain secrets."""
HIDDEN = "***"


def build_requests(plan: Plan) -> dict[str, Request]:
    """Return the CreateTrainingJob of each step by the step's name, not validated."""
    return {step.name: _build_request(plan, step) for step in plan.steps}


def _build_request(plan: Plan, step: Step) -> Request:
    options, root = stage_options(plan.settings, step), run_url(plan)
    trains = STAGES[step.stage].writes_model
    metrics = [{"Name": name, "Regex": METRIC_PATTERN.format(name)} for name in LOGGED_METRICS] if trains else []
    algorithm = {"TrainingImage": options.image, "TrainingInputMode": options.input_mode, "MetricDefinitions": metrics}
    checkpoints = {"S3Uri": f"{root}/{CHECKPOINTS}/{step.name}", "LocalPath": CHECKPOINTS_IN_CONTAINER}
    output = {
        "S3OutputPath": f"{root}/{output_prefix(step)}",
        "CompressionType": "GZIP" if options.compress_outputs else "NONE",
        "KmsKeyId": options.kms_key,
    }
    resources = {
        "InstanceCount": options.instance_count,
        "VolumeSizeInGB": options.volume_gb,
        "VolumeKmsKeyId": options.volume_kms_key,
        "KeepAlivePeriodInSeconds": 60 * options.keep_alive_minutes,
    }
    limits = {"MaxRuntimeInSeconds": max(1, round(3600 * options.max_hours))}
    if options.spot:
        limits["MaxWaitTimeInSeconds"] = max(1, round(3600 * (options.max_wait_hours or 2 * options.max_hours)))
    vpc = {"SecurityGroupIds": options.security_groups, "Subnets": options.subnets}
    isolation = options.network_isolation
    optional = {
        "CheckpointConfig": checkpoints if trains else None,
        "EnableManagedSpotTraining": options.spot,
        "VpcConfig": vpc if options.subnets else None,
        "EnableInterContainerTrafficEncryption": options.encrypt_traffic and options.instance_count > 1,
        "EnableNetworkIsolation": needs_no_network(plan, step) if isolation is None else isolation,
        "Tags": [{"Key": key, "Value": str(value)} for key, value in options.tags.items()],
    }
    return {
        "TrainingJobName": f"{base_name(plan.run, step)}-{time.strftime(TIME_FORMAT)}",
        "RoleArn": options.role,
        "AlgorithmSpecification": _present(algorithm),
        "HyperParameters": hyperparameters(plan, step),
        "Environment": environment(step, options),
        "InputDataConfig": [channel(name, url) for name, url in channels(plan, step, root).items()],
        "OutputDataConfig": _present(output),
        "ResourceConfig": {"InstanceType": options.instance_type, **_present(resources)},
        "StoppingCondition": limits,
        **_present(optional),
    }


def _present(parts: Request) -> Request:
    """Return the parts that are set, i.e. not empty, 0 or False."""
    return {name: part for name, part in parts.items() if part}


def stage_options(settings: Settings, step: Step) -> SageMaker:
    """Return the `[sagemaker]` settings of a step's stage."""
    return settings.sagemaker.for_stage(step.stage)


def needs_no_network(plan: Plan, step: Step) -> bool:
    """Return whether a step's container needs no network: it does not train, or trains without pretrained weights and online trackers."""
    if not STAGES[step.stage].writes_model:
        return True
    settings = plan.settings.of_stage(step.stage)
    downloads = settings.model.pretrained and not settings.model.weights and not settings.offline
    return not downloads and set(settings.train.loggers) <= {"tensorboard"}


def base_name(run: str, step: Step) -> str:
    """Return `fivefold-<run>-<step>`, short enough for an appended time. Cut a long run name and append a digest."""
    tail = f"-{slug(step.name)}"
    room = MAX_NAME_LENGTH - len(f"fivefold-{tail}-{time.strftime(TIME_FORMAT)}")
    name = slug(run)
    if len(name) > room:
        name = f"{name[: room - 7].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"
    return f"fivefold-{name}{tail}"


def slug(text: str) -> str:
    """Return the text with only letters, digits and single hyphens, as names of jobs require."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def run_url(plan: Plan) -> str:
    """Return the URL of the run."""
    return f"{plan.settings.sagemaker.output.rstrip('/')}/{plan.run}"


def output_prefix(step: Step) -> str:
    """Return the path of a step's outputs below the run's URL."""
    return f"{FOLDS_PREFIX}/{step.name}" if step.stage == "train-fold" else step.name


def channels(plan: Plan, step: Step, root: str) -> dict[str, str]:
    """Return the location of each channel of a step: an input as the user wrote it, an output of this run below `root`."""
    paths = {}
    for name, path in step.environment.items():
        if name.startswith(CHANNEL_PREFIX):
            if not is_url(path) and Path(path).is_relative_to(plan.folder):
                parts = Path(path).relative_to(plan.folder).parts  # empty, `<step>/output`, `<step>/model`, or a file
                path = path if len(parts) == 1 else f"{root}/{parts[0] if parts else FOLDS_PREFIX}/"
            paths[name.removeprefix(CHANNEL_PREFIX).lower()] = path
    return paths


def channel(name: str, url: str) -> Request:
    """Return a channel of a request. SageMaker takes URLs as key prefixes, so a folder's URL must end with a slash."""
    url = url if url.endswith("/") or url.lower().endswith(FILE_SUFFIXES) else f"{url}/"
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def hyperparameters(plan: Plan, step: Step) -> dict[str, str]:
    """Return the settings of a step as texts. Replace a recipe that the image does not contain by its keys.

    Names have `__` for a dot, because SageMaker allows only [a-z0-9_].
    """
    pairs = (text.split("=", 1) for text in step.arguments)
    values = {normalize_key(name): value for name, value in pairs}
    if "recipe" in values and values["recipe"].partition(":")[0] not in shipped_recipes():
        del values["recipe"]
        values = set_values(plan.settings, STAGES[step.stage].sections) | values
    return {name.replace(".", "__"): value for name, value in values.items()}


def set_values(settings: Settings, sections: tuple[str, ...]) -> dict[str, str]:
    """Return the set keys of `sections`, by `section.key`, as JSON texts."""
    values = {}
    for name, value in settings.model_dump(mode="json", exclude_unset=True).items():
        for key, leaf in value.items() if name in SECTIONS else [("", value)]:
            path = f"{name}.{key}".rstrip(".")
            if in_sections(path, sections) and leaf is not None:
                values[path] = leaf if isinstance(leaf, str) else json.dumps(leaf, ensure_ascii=False)
    return values


def environment(step: Step, options: SageMaker) -> dict[str, str]:
    """Return the variables of a step's container: stage, fold, the image for the record, and the user's variables."""
    if {"STAGE", "FOLD"} & {name.upper() for name in options.environment}:
        raise SettingsError("sagemaker.environment sets STAGE or FOLD, which Fivefold sets for each step; remove it")
    fold = {} if step.fold is None else {"FOLD": str(step.fold)}
    image = {IMAGE_VARIABLE: options.image} if options.image else {}
    user_variables = {name: str(value) for name, value in options.environment.items()}
    return {"STAGE": step.stage, **fold, **image, **user_variables}


def find_secrets(request: Request) -> dict[str, str]:
    """Return the variables of a request (or of a job of local mode) whose values may be secret, by name."""
    return {name: value for name, value in request.get("Environment", {}).items() if name not in STEP_VARIABLES}


def redact(request: Request) -> Request:
    """Return the request for printing, with `***` for the values of the user's variables."""
    return {**request, "Environment": {**request["Environment"], **dict.fromkeys(find_secrets(request), HIDDEN)}}
