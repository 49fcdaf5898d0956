"""A request as the SDK's ModelTrainer: for the service, and for the local Docker engine.

The SDK is loaded here alone, and only when something is started: it takes seconds, and many machines lack it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fivefold.errors import SettingsError
from fivefold.extras import need
from fivefold.launchers.sagemaker.requests import Request

EXTRA = "launch"


def need_sdk(wanted: str) -> None:
    """Raises a SettingsError where the SDK is not installed; `wanted` is the setting that asked for it."""
    need(("sagemaker",), EXTRA, wanted)


def start(request: Request, session: Any) -> str:
    """Starts the job of `request` at the service, through `session` (of boto3); the job's name.

    The SDK ends the name with the moment at which it sends it, as `requests` does.
    """
    # The SDK would simulate the role's policies at each job, which few callers may, and ask for more than a role needs.
    os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")
    from botocore.exceptions import BotoCoreError, ClientError
    from sagemaker.core.helper.session_helper import Session

    try:
        trainer = trainer_of(request, Session(boto_session=session))
        trainer.train(wait=False, logs=False)
    except (BotoCoreError, ClientError):
        raise
    except Exception as error:  # the SDK has errors of many kinds, of roles and of values
        words = " ".join(str(error).split())[:1000]
        raise SettingsError(f"{request['TrainingJobName']}: refused by the SDK: {words}") from error
    return str(trainer._latest_training_job.training_job_name)


def trainer_of(request: Request, session: Any) -> Any:
    """The ModelTrainer that sends `request`."""
    from sagemaker.core.training.configs import (
        Channel,
        CheckpointConfig,
        Compute,
        MetricDefinition,
        Networking,
        OutputDataConfig,
        StoppingCondition,
        Tag,
    )
    from sagemaker.train import ModelTrainer

    algorithm, resources = request["AlgorithmSpecification"], dict(request["ResourceConfig"])
    if request.get("EnableManagedSpotTraining"):
        resources["EnableManagedSpotTraining"] = True
    network = dict(request.get("VpcConfig", {}))
    if request.get("EnableNetworkIsolation"):
        network["EnableNetworkIsolation"] = True
    checkpoints = request.get("CheckpointConfig")
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=request["RoleArn"],
        base_job_name=request["TrainingJobName"].rpartition("-")[0],
        training_image=algorithm["TrainingImage"],
        training_input_mode=algorithm["TrainingInputMode"],
        compute=Compute(**snake(resources)),
        stopping_condition=StoppingCondition(**snake(request["StoppingCondition"])),
        output_data_config=OutputDataConfig(**snake(request["OutputDataConfig"])),
        checkpoint_config=CheckpointConfig(**snake(checkpoints)) if checkpoints else None,
        networking=Networking(**snake(network)) if network else None,
        environment=dict(request["Environment"]),
        hyperparameters=dict(request["HyperParameters"]),
        input_data_config=[Channel(**snake(channel)) for channel in request["InputDataConfig"]],
        tags=[Tag(**snake(tag)) for tag in request.get("Tags", [])] or None,
    )
    metrics = [MetricDefinition(**snake(each)) for each in algorithm.get("MetricDefinitions", [])]
    return trainer.with_metric_definitions(metrics) if metrics else trainer


def run_here(
    image: str, name: str, root: Path, channels: Mapping[str, Path], request: Mapping[str, Mapping[str, str]], gpu: bool
) -> None:
    """Runs a job on the local Docker engine, with no region and no credentials, and waits for it.

    `root` is a folder of its own, which gets `artifacts/` and `compressed_artifacts/`; the request's `HyperParameters`
    and `Environment` count. Raises RuntimeError where the container ended badly.
    """
    from sagemaker.core.training.configs import Compute, InputData
    from sagemaker.train import ModelTrainer
    from sagemaker.train.model_trainer import Mode

    trainer = ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER,
        training_image=image,
        base_job_name=name,
        compute=Compute(instance_type="local_gpu" if gpu else "local_cpu", instance_count=1),
        environment=dict(request["Environment"]),
        hyperparameters=dict(request["HyperParameters"]),
        input_data_config=[InputData(channel_name=each, data_source=str(path)) for each, path in channels.items()],
        local_container_root=str(root),
    )
    trainer.train(wait=True)


def snake(value: Any) -> Any:
    """The SDK's spelling of what goes over the wire: `S3Uri` as `s3_uri`."""
    if isinstance(value, Mapping):
        return {_snake(name): snake(part) for name, part in value.items()}
    return [snake(part) for part in value] if isinstance(value, list) else value


def _snake(name: str) -> str:
    if name in SPELLED:
        return SPELLED[name]
    return "".join(
        f"_{letter.lower()}" if letter.isupper() and at else letter.lower() for at, letter in enumerate(name)
    )


SPELLED = {
    "S3Uri": "s3_uri",
    "S3DataSource": "s3_data_source",
    "S3DataType": "s3_data_type",
    "S3DataDistributionType": "s3_data_distribution_type",
    "S3OutputPath": "s3_output_path",
    "VolumeSizeInGB": "volume_size_in_gb",
}
