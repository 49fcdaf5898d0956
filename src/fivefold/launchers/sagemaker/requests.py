"""A plan as requests to SageMaker: of each step the CreateTrainingJob that does it, a plain dict as it goes over the wire.

What a run makes lies below `<output>/<run>/`:

    split/<job>/output/…    folds/fold-2/<job>/output/…    ensemble/<job>/output/…    checkpoints/fold-2/…

so the folder of a step is the channel of the next one, and `folds/` that of the ensemble and of the student.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

from fivefold.contract.record import IMAGE_VARIABLE
from fivefold.contract.s3.urls import is_url
from fivefold.contract.stages import STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Plan, Step
from fivefold.logline import metric_patterns
from fivefold.recipe import SECTIONS, SageMaker, Settings
from fivefold.recipes import shipped_recipes
from fivefold.settings import is_of, normal_key

Request = dict[str, Any]

FOLDS_TOGETHER = "folds"
CHECKPOINTS = "checkpoints"
CHECKPOINTS_IN_CONTAINER = "/opt/ml/checkpoints"
CHANNEL = "SM_CHANNEL_"
MOST_CHARACTERS = 63
TIME_FORMAT = "%Y%m%d%H%M%S"
"""The end of a job's name, which tells one job of a step from the next."""
FILES = (".zip", ".csv", ".parquet")
OF_A_STEP = ("STAGE", "FOLD", IMAGE_VARIABLE)
"""The variables of a container that are ours. All others are the user's, and may hold secrets."""
HIDDEN = "***"


def requests_of(plan: Plan) -> dict[str, Request]:
    """Returns the CreateTrainingJob of each step by the step's name, unchecked; the jobs' names end with the time."""
    time_stamp = time.strftime(TIME_FORMAT)
    return {step.name: _request_of(plan, step, time_stamp) for step in plan.steps}


def _request_of(plan: Plan, step: Step, time_stamp: str) -> Request:
    options, root = options_of(plan.settings, step), root_of(plan)
    trains = STAGES[step.stage].writes_model
    metrics = [{"Name": name, "Regex": pattern} for name, pattern in metric_patterns().items()] if trains else []
    algorithm = {"TrainingImage": options.image, "TrainingInputMode": options.input_mode, "MetricDefinitions": metrics}
    checkpoints = {"S3Uri": f"{root}/{CHECKPOINTS}/{step.name}", "LocalPath": CHECKPOINTS_IN_CONTAINER}
    output = {
        "S3OutputPath": f"{root}/{place_of(step)}",
        "CompressionType": "GZIP" if options.compress else "NONE",
        "KmsKeyId": options.kms_key,
    }
    resources = {
        "InstanceCount": options.instance_count,
        "VolumeSizeInGB": options.volume_gb,
        "VolumeKmsKeyId": options.volume_kms_key,
        "KeepAlivePeriodInSeconds": 60 * options.keep_alive_minutes,
    }
    limits = {"MaxRuntimeInSeconds": seconds(options.max_hours)}
    if options.spot:
        limits["MaxWaitTimeInSeconds"] = seconds(options.max_wait_hours or 2 * options.max_hours)
    vpc = {"SecurityGroupIds": options.security_groups, "Subnets": options.subnets}
    optional = {
        "CheckpointConfig": checkpoints if trains else None,
        "EnableManagedSpotTraining": options.spot,
        "VpcConfig": vpc if options.subnets else None,
        "EnableInterContainerTrafficEncryption": options.encrypt_traffic and options.instance_count > 1,
        "EnableNetworkIsolation": fetches_nothing(plan, step) if options.isolate is None else options.isolate,
        "Tags": [{"Key": key, "Value": str(value)} for key, value in options.tags.items()],
    }
    return {
        "TrainingJobName": f"{base_name(plan.run, step)}-{time_stamp}",
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
    """Returns the parts that are set: not empty, 0 or False."""
    return {name: part for name, part in parts.items() if part}


def options_of(settings: Settings, step: Step) -> SageMaker:
    """The `[sagemaker]` of a step's stage."""
    return settings.sagemaker.of_stage(step.stage)


def fetches_nothing(plan: Plan, step: Step) -> bool:
    """Whether a step's container needs no network: it trains nothing, or with no weights of a hub and no tracker's service."""
    if not STAGES[step.stage].writes_model:
        return True
    settings = plan.settings.student() if step.stage == "distill" else plan.settings
    return not settings.model.pretrained and set(settings.train.trackers) <= {"tensorboard"}


def base_name(run: str, step: Step) -> str:
    """Returns `fivefold-<run>-<step>`, short enough for a time after it; a long run is cut, with a digest at its end."""
    tail = f"-{plain(step.name)}"
    room = MOST_CHARACTERS - len(f"fivefold-{tail}-{time.strftime(TIME_FORMAT)}")
    name = plain(run)
    if len(name) > room:
        digest = hashlib.sha256(run.encode()).hexdigest()[:6]
        name = f"{name[: room - 7].rstrip('-')}-{digest}"
    return f"fivefold-{name}{tail}"


def plain(text: str) -> str:
    """Letters, digits and single hyphens, as names of jobs are."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def root_of(plan: Plan) -> str:
    """The URL below which the run lies."""
    return f"{plan.settings.sagemaker.output.rstrip('/')}/{plan.run}"


def place_of(step: Step) -> str:
    """Where below the run the outputs of a step's jobs lie."""
    return f"{FOLDS_TOGETHER}/{step.name}" if step.stage == "train-fold" else step.name


def channels(plan: Plan, step: Step, root: str) -> dict[str, str]:
    """Where each channel of a step lies: an input as the user wrote it, what a step of this run makes below `root`."""
    given = {name: path for name, path in step.environment.items() if name.startswith(CHANNEL)}
    return {name.removeprefix(CHANNEL).lower(): _source(plan, path, root) for name, path in given.items()}


def _source(plan: Plan, path: str, root: str) -> str:
    if is_url(path) or not Path(path).is_relative_to(plan.folder):
        return path
    inside = Path(path).relative_to(plan.folder).parts  # nothing, `<step>/output`, `<step>/model`, or a file
    if not inside:
        return f"{root}/{FOLDS_TOGETHER}/"
    return f"{root}/{inside[0]}/" if len(inside) > 1 else path


def channel(name: str, url: str) -> Request:
    """A channel of SageMaker's; a URL is a prefix of keys there, so that of a folder ends with a slash."""
    url = url if url.endswith("/") or url.lower().endswith(FILES) else f"{url}/"
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def hyperparameters(plan: Plan, step: Step) -> dict[str, str]:
    """Returns the settings of a step, all texts; a recipe that the image does not hold is written out, key by key.

    Names have `__` for a dot, since SageMaker keeps [a-z0-9_] alone.
    """
    pairs = (text.split("=", 1) for text in step.arguments)
    values = {normal_key(name): value for name, value in pairs}
    if "recipe" in values and values["recipe"].partition(":")[0] not in shipped_recipes():
        del values["recipe"]
        values = set_values(plan.settings, STAGES[step.stage].sections) | values
    return {name.replace(".", "__"): value for name, value in values.items()}


def set_values(settings: Settings, sections: tuple[str, ...]) -> dict[str, str]:
    """Returns what was set of `sections`, by `section.key`, as JSON texts."""
    leaves = {}
    for name, value in settings.model_dump(mode="json", exclude_unset=True).items():
        leaves |= {f"{name}.{key}": leaf for key, leaf in value.items()} if name in SECTIONS else {name: value}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in leaves.items()
        if is_of(key, sections) and value is not None
    }


def environment(step: Step, options: SageMaker) -> dict[str, str]:
    """Returns the variables of a step's container: stage, fold, the image for the record, and the user's own."""
    reserved = sorted({"STAGE", "FOLD"} & {name.upper() for name in options.environment})
    if reserved:
        raise SettingsError(
            f"sagemaker.environment sets {reserved[0]}, which each step of a run sets itself; leave it out"
        )
    fold = {} if step.fold is None else {"FOLD": str(step.fold)}
    image = {IMAGE_VARIABLE: options.image} if options.image else {}
    own = {name: str(value) for name, value in options.environment.items()}
    return {"STAGE": step.stage, **fold, **image, **own}


def secrets_of(request: Request) -> dict[str, str]:
    """Returns the variables of a request (or of a job of local mode) whose values may be secret, by name."""
    return {name: value for name, value in request.get("Environment", {}).items() if name not in OF_A_STEP}


def without_secrets(request: Request) -> Request:
    """Returns the request as it may be shown: with `***` for the values of the user's own variables."""
    return {**request, "Environment": {**request["Environment"], **dict.fromkeys(secrets_of(request), HIDDEN)}}


def seconds(hours: float) -> int:
    """Whole seconds, at least one."""
    return max(1, round(3600 * hours))
