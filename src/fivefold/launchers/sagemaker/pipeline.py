"""The plan as the definition of a SageMaker Pipeline: the same requests, each a step of type Training.

Each execution writes below `<output>/<run>/<id of the execution>/`, so no execution reads what another left.
"""

import json
from collections.abc import Mapping
from typing import Any

from fivefold.errors import SettingsError
from fivefold.launchers.plan import Plan
from fivefold.launchers.sagemaker.checks import check_request, checked_requests
from fivefold.launchers.sagemaker.requests import Request, plain, root_of
from fivefold.launchers.sagemaker.service import Service

VERSION = "2020-12-01"
EXECUTION = {"Get": "Execution.PipelineExecutionId"}


def definition_of(plan: Plan) -> dict[str, Any]:
    """The definition, all of whose jobs the service's model accepts."""
    root = root_of(plan)
    steps = [_step(plan, name, request, root) for name, request in checked_requests(plan).items()]
    return {"Version": VERSION, "Metadata": {}, "Parameters": [], "Steps": steps}


def pipeline_request(plan: Plan, parallel: int = 0) -> Request:
    """What CreatePipeline and UpdatePipeline are asked for."""
    request: Request = {
        "PipelineName": name_of(plan),
        "PipelineDefinition": json.dumps(definition_of(plan)),
        "RoleArn": plan.settings.sagemaker.role,
    }
    if parallel:
        request["ParallelismConfiguration"] = {"MaxParallelExecutionSteps": parallel}
    if not request["RoleArn"]:
        raise SettingsError("sagemaker.role is not given: a pipeline itself has a role too, beside those of its steps")
    check_request(request["PipelineName"], request, "UpdatePipeline")
    return request


def name_of(plan: Plan) -> str:
    return f"fivefold-{plain(plan.run)}"


def upsert(request: Request, service: Service) -> str:
    """Creates the pipeline, or updates the one of its name; its ARN."""
    name = request["PipelineName"]
    found = service.call(
        f"ListPipelines {name}", "sagemaker", "list_pipelines", PipelineNamePrefix=name, MaxResults=100
    )
    if name in [each["PipelineName"] for each in found["PipelineSummaries"]]:
        return str(service.call(f"UpdatePipeline {name}", "sagemaker", "update_pipeline", **request)["PipelineArn"])
    token = f"{name}-{'0' * 32}"[:128]  # the same each time: of two that create it at once one does
    given = {**request, "ClientRequestToken": token}
    return str(service.call(f"CreatePipeline {name}", "sagemaker", "create_pipeline", **given)["PipelineArn"])


def _step(plan: Plan, name: str, request: Request, root: str) -> dict[str, Any]:
    arguments = {key: value for key, value in request.items() if key != "TrainingJobName"}
    step = {"Name": name, "Type": "Training", "Arguments": below_execution(arguments, root)}
    needs = plan.step(name).needs
    return {**step, "DependsOn": list(needs)} if needs else step


def below_execution(value: Any, root: str) -> Any:
    """`value` with each URL below `root` as an expression that puts the execution's id behind it."""
    if isinstance(value, Mapping):
        return {key: below_execution(part, root) for key, part in value.items()}
    if isinstance(value, list):
        return [below_execution(part, root) for part in value]
    if isinstance(value, str) and value.startswith(f"{root}/"):
        return {"Std:Join": {"On": "/", "Values": [root, EXECUTION, value.removeprefix(f"{root}/")]}}
    return value
