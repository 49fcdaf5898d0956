"""A plan as requests to SageMaker: of each step the CreateTrainingJob that does it, a plain dict as it goes over the wire.

What a run makes lies below `<output>/<run>/`:

    split/<job>/output/…    folds/fold-2/<job>/output/…    ensemble/<job>/output/…    checkpoints/fold-2/…

so the folder of a step is the channel of the next one, and `folds/` that of the ensemble and of the student.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold.contract.record import IMAGE_VARIABLE
from fivefold.contract.s3.urls import is_url
from fivefold.contract.stages import STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Plan, Step
from fivefold.logline import metric_patterns
from fivefold.recipe import OF_PLATFORMS, SageMaker, Settings
from fivefold.recipes import shipped_recipes
from fivefold.settings import flatten, is_of, normal_key

Request = dict[str, Any]

FOLDS_TOGETHER = "folds"
CHECKPOINTS = "checkpoints"
CHECKPOINTS_IN_CONTAINER = "/opt/ml/checkpoints"
CHANNEL = "SM_CHANNEL_"
MOST_CHARACTERS = 63
MOMENT = "%Y%m%d%H%M%S"
"""What the SDK ends the name of a job with: it tells one job of a step from the next."""
FILES = (".zip", ".csv", ".parquet")


def requests_of(plan: Plan, moment: str = "") -> dict[str, Request]:
    """The request of each step, by the step's name; `moment` ends the names of the jobs, empty: now."""
    moment = moment or time.strftime(MOMENT)
    return {step.name: request_of(plan, step, moment) for step in plan.steps}


def request_of(plan: Plan, step: Step, moment: str) -> Request:
    """The CreateTrainingJob of one step; what it asks for is not checked here."""
    return _request(plan, step, options_of(plan.settings, step), moment)


def _request(plan: Plan, step: Step, options: SageMaker, moment: str) -> Request:
    request: Request = {
        "TrainingJobName": f"{base_name(plan.run, step)}-{moment}",
        "RoleArn": options.role,
        "AlgorithmSpecification": {"TrainingImage": options.image, "TrainingInputMode": options.input_mode},
        "HyperParameters": hyperparameters(plan, step),
        "Environment": environment(step, options),
        "InputDataConfig": [channel(name, url) for name, url in channels(plan, step, root_of(plan)).items()],
        "OutputDataConfig": {
            "S3OutputPath": f"{root_of(plan)}/{place_of(step)}",
            "CompressionType": "GZIP" if options.compress else "NONE",
        },
        "ResourceConfig": {
            "InstanceType": options.instance_type,
            "InstanceCount": options.instance_count,
            "VolumeSizeInGB": options.volume_gb,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": seconds(options.max_hours)},
    }
    if STAGES[step.stage].writes_model:
        patterns = metric_patterns().items()
        request["AlgorithmSpecification"]["MetricDefinitions"] = [{"Name": n, "Regex": text} for n, text in patterns]
        url = f"{root_of(plan)}/{CHECKPOINTS}/{step.name}"
        request["CheckpointConfig"] = {"S3Uri": url, "LocalPath": CHECKPOINTS_IN_CONTAINER}
    _add_what_is_asked_for(request, options)
    return request


def _add_what_is_asked_for(request: Request, options: SageMaker) -> None:
    """Spot, warm pool, VPC, keys and tags, where they are set."""
    resources = request["ResourceConfig"]
    if options.spot:
        request["EnableManagedSpotTraining"] = True
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = seconds(options.max_wait_hours or 2 * options.max_hours)
    if options.keep_alive_minutes:
        resources["KeepAlivePeriodInSeconds"] = 60 * options.keep_alive_minutes
    if options.volume_kms_key:
        resources["VolumeKmsKeyId"] = options.volume_kms_key
    if options.kms_key:
        request["OutputDataConfig"]["KmsKeyId"] = options.kms_key
    if options.subnets or options.security_groups:
        request["VpcConfig"] = {"SecurityGroupIds": options.security_groups, "Subnets": options.subnets}
    if options.isolate:
        request["EnableNetworkIsolation"] = True
    if options.tags:
        request["Tags"] = [{"Key": key, "Value": str(value)} for key, value in options.tags.items()]


def options_of(settings: Settings, step: Step) -> SageMaker:
    """The `[sagemaker]` of a step's stage."""
    common = settings.sagemaker
    return common.of_stage(step.stage) if common.stages else common


def base_name(run: str, step: Step) -> str:
    """`fivefold-<run>-<step>`, short enough for the moment after it; a long run is cut, and told apart by a digest."""
    tail = f"-{plain(step.name)}"
    room = MOST_CHARACTERS - len(f"fivefold-{tail}-{time.strftime(MOMENT)}")
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
    """The settings of a step, all texts; a recipe that the image does not hold is written out, key by key.

    Names have `__` for a dot, since others than [a-z0-9_] are changed on the way.
    """
    given = dict(text.split("=", 1) for text in step.arguments)
    recipe = given.get("recipe", "")
    found = {normal_key(name): value for name, value in given.items()}
    if recipe and recipe.partition(":")[0] not in shipped_recipes():
        del found["recipe"]
        found = written_out(plan.settings, STAGES[step.stage].sections) | found
    return {name.replace(".", "__"): value for name, value in found.items()}


def written_out(settings: Settings, sections: tuple[str, ...]) -> dict[str, str]:
    """What was set of `sections`, with `system` and `seed` where they are read, as JSON texts."""
    tree = settings.model_dump(
        mode="json", exclude_unset=True, exclude={"recipe", "run", "runs", "stage", *OF_PLATFORMS}
    )
    keys = {key: tree_at(tree, key) for key in flatten(settings) if tree_at(tree, key) is not None}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in keys.items()
        if is_of(key, sections)
    }


def tree_at(tree: Mapping[str, Any], key: str) -> Any:
    """What a dotted key leads to, None where it leads nowhere."""
    found: Any = tree
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def environment(step: Step, options: SageMaker) -> dict[str, str]:
    """The variables of a step's container: its stage, its fold, its image for the record, and what the user adds."""
    fold = {} if step.fold is None else {"FOLD": str(step.fold)}
    own = {"STAGE": step.stage, **fold, IMAGE_VARIABLE: options.image}
    taken = sorted({"STAGE", "FOLD"} & {name.upper() for name in options.environment})
    if taken:
        raise SettingsError(
            f"sagemaker.environment sets {taken[0]}, which each step of a run sets itself; leave it out"
        )
    return {name: value for name, value in own.items() if value} | {n: str(v) for n, v in options.environment.items()}


def seconds(hours: float) -> int:
    """Whole seconds, at least one."""
    return max(1, round(3600 * hours))
