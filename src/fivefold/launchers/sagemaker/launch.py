"""The platform `sagemaker`: a plan's steps as training jobs, or as a Pipeline of them, chained by their places in S3.

All is checked before anything starts, offline: the requests, and what they may cost. Each step's `sagemaker.json` in the
run's folder names its job, so the same command waits for jobs that still run, takes those that are done, and starts anew
those that failed, which go on from their checkpoints.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivefold.contract.files import read_json, write_json
from fivefold.contract.s3.urls import is_url, parse
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, Plan, Step
from fivefold.launchers.sagemaker.client import Client, JobStatus, delete_outputs
from fivefold.launchers.sagemaker.requests import Request, plain, root_of
from fivefold.launchers.sagemaker.validation import check_cost, check_request, validated_requests
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.screen import Screen
from fivefold.launchers.status import LOG

log = logging.getLogger("fivefold")

JOB = "sagemaker.json"
RESULT_PARTS = ("HyperParameters", "Environment", "InputDataConfig", "OutputDataConfig")
"""The parts of a request that make the result; price, instances and limits may change and a result stays."""
PIPELINE_VERSION = "2020-12-01"
EXECUTION_ID = {"Get": "Execution.PipelineExecutionId"}


def launch(plan: Plan, parallel: int = 0) -> int:
    """Runs the plan's steps as training jobs, folds side by side, at most `parallel` at a time (0: all).

    Returns the exit code of the first that failed; 130 or 143 after SIGINT or SIGTERM, which leave the jobs as they are.
    """
    options, screen = plan.settings.sagemaker, Screen()
    jobs = TrainingJobs(plan, validated_requests(plan), Client.of_region(options.region), screen)
    return Scheduler(plan.steps, jobs, screen, parallel, options.poll_seconds).run()


def check(plan: Plan) -> None:
    """Raises a SettingsError for a plan that cannot run, or may cost too much; nothing is asked of the service."""
    describe(plan)
    Client.of_region(plan.settings.sagemaker.region)


def check_inputs(inputs: Inputs, _: Path) -> Inputs:
    """Returns the inputs, all of them in S3; nothing is looked up there, so ground truth counts only where it is given."""
    for name, path in vars(inputs).items():
        if path and not is_url(path):
            raise SettingsError(
                f"{name}={path} is of this machine, and a job reads S3: aws s3 sync {path} s3://BUCKET/{name}, then give "
                f"{name}=s3://BUCKET/{name} (or take platform=sagemaker-local)"
            )
        if path:
            parse(path, name)
    return inputs


def describe(plan: Plan, parallel: int = 0) -> str:
    """Returns the requests of all steps as JSON, checked as they are before they are sent."""
    requests = validated_requests(plan)
    log.info("%s", check_cost(plan))
    return json.dumps(requests, indent=2, ensure_ascii=False)


def results(plan: Plan) -> str:
    """Returns where what the jobs made lies, and how it comes here."""
    root = root_of(plan)
    return (
        f"results: {root}/\nto have them here: aws s3 cp --recursive {root}/ {plan.folder}/ --exclude 'checkpoints/*'"
    )


def describe_pipeline(plan: Plan) -> str:
    """Returns the requests as the JSON of a Pipeline: each a step of type Training, without the job's name."""
    steps = []
    for name, request in validated_requests(plan).items():
        arguments = {key: value for key, value in request.items() if key != "TrainingJobName"}
        step = {"Name": name, "Type": "Training", "Arguments": with_execution_id(arguments, root_of(plan))}
        needs = plan.step(name).needs
        steps.append({**step, "DependsOn": list(needs)} if needs else step)
    log.info("%s", check_cost(plan))
    definition = {"Version": PIPELINE_VERSION, "Metadata": {}, "Parameters": [], "Steps": steps}
    return json.dumps(definition, indent=2, ensure_ascii=False)


def upsert_pipeline(plan: Plan, parallel: int = 0) -> int:
    """Creates the plan's Pipeline, or updates it, and prints its ARN; no execution is started."""
    name, options = f"fivefold-{plain(plan.run)}", plan.settings.sagemaker
    request = {"PipelineName": name, "PipelineDefinition": describe_pipeline(plan), "RoleArn": options.role}
    if parallel:
        request["ParallelismConfiguration"] = {"MaxParallelExecutionSteps": parallel}
    check_request(name, request, "UpdatePipeline")
    print(Client.of_region(options.region).upsert_pipeline(request))
    log.info("to run it: aws sagemaker start-pipeline-execution --pipeline-name %s", name)
    return 0


def with_execution_id(value: Any, root: str) -> Any:
    """Returns `value` with the execution's id after `root` in each URL, so no execution reads what another left."""
    if isinstance(value, dict):
        return {key: with_execution_id(part, root) for key, part in value.items()}
    if isinstance(value, list):
        return [with_execution_id(part, root) for part in value]
    if isinstance(value, str) and value.startswith(f"{root}/"):
        return {"Std:Join": {"On": "/", "Values": [root, EXECUTION_ID, value.removeprefix(f"{root}/")]}}
    return value


@dataclass
class TrainingJobs:
    """Training jobs as the backend of a Scheduler; they go on without this process."""

    plan: Plan
    requests: Mapping[str, Request]
    client: Client
    screen: Screen
    jobs: dict[str, str] = field(default_factory=dict)
    """The job of each step that was started or found."""
    statuses: dict[str, JobStatus] = field(default_factory=dict)

    def start(self, step: Step, alone: bool) -> int | None:
        """Starts a step's job, or finds that of an earlier command: 0 where it is completed, None where it runs.

        Raises a SettingsError where an earlier job that is completed, or runs, was asked for something else.
        """
        request, path, job, status = self.requests[step.name], step.folder / JOB, "", None
        identity, output = self._identity(request), request["OutputDataConfig"]["S3OutputPath"]
        if path.is_file():
            earlier = read_json(path)
            job, status = earlier["job"], self.client.describe(earlier["job"])
            if earlier["asked"] != identity and not status.exit_code:
                parts = sorted(part for part in identity if identity[part] != earlier["asked"].get(part))
                raise SettingsError(
                    f"{step.name} of this run was asked for otherwise (job {job}, {status.status}; {', '.join(parts)} "
                    f"differ): choose another run=, or remove {output} and {path}"
                )
        if status is None or status.exit_code:
            delete_outputs(output, job)
            self.client.start(request)
            job = request["TrainingJobName"]
            write_json(path, {"job": job, "asked": identity})
            self.screen.line(f"{step.name}: job {job}")
        elif status.exit_code == 0:
            self.screen.line(f"{step.name}: nothing to do, job {job} is completed")
            return 0
        else:
            self.screen.line(f"{step.name}: waits for job {job}, which runs already")
        self.jobs[step.name] = job
        return None

    def _identity(self, request: Request) -> dict[str, Any]:
        """Returns what makes a step's result: parts of its request, and the jobs of this run whose outputs it reads."""
        urls = tuple(channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in request["InputDataConfig"])
        sources = {}
        for path in sorted(self.plan.folder.glob(f"*/{JOB}")):  # of earlier commands too
            earlier = read_json(path)
            if f"{earlier['asked']['OutputDataConfig']['S3OutputPath']}/".startswith(urls):
                sources[path.parent.name] = earlier["job"]
        image = request["AlgorithmSpecification"]["TrainingImage"]
        return {"image": image, "after": sources, **{part: request[part] for part in RESULT_PARTS}}

    def poll(self, running: Sequence[Step]) -> dict[str, int]:
        """Prints what the jobs have logged, and where their status has changed; returns the codes of those that ended."""
        codes = {}
        for step in running:
            status = self.client.describe(self.jobs[step.name])
            lines = self.client.new_lines(self.jobs[step.name])
            if lines:
                with open(step.folder / LOG, "a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            for line in lines:
                self.screen.line(f"[{step.name}] {line}")
            if self.statuses.get(step.name) != status:
                self.screen.line(f"{step.name}: {status.status}, {status.detail}")
            self.statuses[step.name] = status
            if status.exit_code is not None:
                codes[step.name] = status.exit_code
        return codes

    def stop(self, running: Sequence[Step], number: int, again: bool) -> bool:
        """Leaves the jobs as they are, and prints how they are waited for again, and stopped."""
        if running:
            stops = [
                f"  aws sagemaker stop-training-job --training-job-name {self.jobs[step.name]}" for step in running
            ]
            words = "jobs go on at SageMaker; the same command waits for them again. To stop them:"
            self.screen.line("\n".join([f"{len(running)} {words}", *stops]))
        return False

    def describe(self, step: Step) -> str:
        status = self.statuses.get(step.name)
        return f"job {self.jobs[step.name]}: {status.reason or status.detail}" if status else ""
