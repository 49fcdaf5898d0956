"""The platform `sagemaker`: run a plan's steps as training jobs, chained by their outputs in S3, or print them as a Pipeline.

The requests and their maximum cost are checked offline before anything starts. Each step's `sagemaker.json` in the
run's folder names its job. So the same command waits for running jobs, skips completed jobs, and restarts failed
jobs, which resume from their checkpoints.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivefold.contract.files import read_json, write_json
from fivefold.contract.s3.urls import is_url
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, Plan, Step
from fivefold.launchers.sagemaker.requests import Request, find_secrets, redact, run_url
from fivefold.launchers.sagemaker.training_jobs import Client, JobStatus, delete_outputs
from fivefold.launchers.sagemaker.validation import check_cost, validate_requests
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.status import LOG
from fivefold.launchers.terminal import append_lines, write_line, write_output
from fivefold.log import log

JOB = "sagemaker.json"
PRIVATE_MODE = 0o600
RESULT_PARTS = ("HyperParameters", "Environment", "InputDataConfig", "OutputDataConfig")
"""The parts of a request that determine the result. Price, instances and limits do not change a result."""
PIPELINE_VERSION = "2020-12-01"
EXECUTION_ID = {"Get": "Execution.PipelineExecutionId"}


def launch(plan: Plan, parallel: int = 0) -> int:
    """Run the plan's steps as training jobs, folds in parallel, at most `parallel` at a time (0: all).

    Return the exit code of the first failed job, or 130 or 143 after SIGINT or SIGTERM; the jobs then continue.
    """
    options = plan.settings.sagemaker
    jobs = TrainingJobs(plan, validate_requests(plan), Client.for_region(options.region))
    return Scheduler(plan.steps, jobs, parallel, options.poll_seconds).run()


def check_machine(plan: Plan) -> None:
    """Raise a SettingsError if no region is set. Make no request to the service."""
    Client.for_region(plan.settings.sagemaker.region)


def check_inputs(inputs: Inputs, _: Path) -> Inputs:
    """Return the inputs, which must be in S3. S3 is not searched, so ground truth counts only if it is set."""
    for name, path in inputs.paths():
        if not is_url(path):
            raise SettingsError(
                f"{name}={path} is on this machine, and jobs read S3: aws s3 sync {path} s3://BUCKET/{name}, then set "
                f"{name}=s3://BUCKET/{name} (or use platform=sagemaker-local)"
            )
    return inputs


def describe(plan: Plan, parallel: int = 0) -> str:
    """Return the requests of all steps as JSON, without secrets.

    Raise a SettingsError if the service would reject a request, or if the plan may cost too much.
    """
    requests = {name: redact(request) for name, request in validate_requests(plan).items()}
    log.info("%s", check_cost(plan))
    return json.dumps(requests, indent=2, ensure_ascii=False)


def results(plan: Plan) -> str:
    """Return the location of the results, and the command that copies them."""
    root = run_url(plan)
    return f"results: {root}/\nto copy them: aws s3 cp --recursive {root}/ {plan.folder}/ --exclude 'checkpoints/*'"


def describe_pipeline(plan: Plan) -> str:
    """Return the requests as the JSON of a Pipeline. Each is a step of type Training, without the job's name.

    Everyone who may describe a Pipeline can read its definition. So the values of the user's own variables are parameters
    without a default; the start of an execution sets them.
    """
    steps, values = [], {}
    for name, request in validate_requests(plan).items():
        secrets = find_secrets(request)
        for variable, value in secrets.items():
            if values.setdefault(variable, value) != value:
                raise SettingsError(
                    f"sagemaker.environment sets {variable} to different values in different stages, but in a Pipeline it is "
                    "one parameter: use different names"
                )
        arguments = {key: value for key, value in request.items() if key != "TrainingJobName"}
        arguments["Environment"] |= {variable: {"Get": f"Parameters.{variable}"} for variable in secrets}
        step = {"Name": name, "Type": "Training", "Arguments": with_execution_id(arguments, run_url(plan))}
        needs = plan.step(name).needs
        steps.append({**step, "DependsOn": list(needs)} if needs else step)
    log.info("%s", check_cost(plan))
    parameters = [{"Name": name, "Type": "String"} for name in values]
    definition = {"Version": PIPELINE_VERSION, "Metadata": {}, "Parameters": parameters, "Steps": steps}
    return json.dumps(definition, indent=2, ensure_ascii=False)


def with_execution_id(value: Any, root: str) -> Any:
    """Return `value` with the execution's id after `root` in each URL, so that no execution reads another one's outputs."""
    if isinstance(value, dict):
        return {key: with_execution_id(part, root) for key, part in value.items()}
    if isinstance(value, list):
        return [with_execution_id(part, root) for part in value]
    if isinstance(value, str) and value.startswith(f"{root}/"):
        return {"Std:Join": {"On": "/", "Values": [root, EXECUTION_ID, value.removeprefix(f"{root}/")]}}
    return value


def variables_digest(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the recorded form of a job's variables: their names, and a digest of names and values."""
    text = json.dumps(dict(variables), sort_keys=True)
    return {"names": sorted(variables), "sha256": hashlib.sha256(text.encode()).hexdigest()}


@dataclass
class TrainingJobs:
    """Training jobs as the backend of a Scheduler. They continue without this process."""

    plan: Plan
    requests: Mapping[str, Request]
    client: Client
    jobs: dict[str, str] = field(default_factory=dict)
    """The job of each started or existing step."""
    statuses: dict[str, JobStatus] = field(default_factory=dict)

    def start(self, step: Step) -> int | None:
        """Start a step's job, or use that of an earlier command. Return 0 if it is completed, None if it runs.

        Raise a SettingsError if an earlier job, running or completed, had a different request.
        """
        request, path, job, status = self.requests[step.name], step.folder / JOB, "", None
        identity, output = self._identity(request), request["OutputDataConfig"]["S3OutputPath"]
        if path.is_file():
            job, recorded = read_json(path)["job"], read_json(path)["asked"]
            status = self.client.describe(job)
            if recorded != identity and not status.exit_code:
                parts = sorted(part for part in identity if identity[part] != recorded.get(part))
                raise SettingsError(
                    f"{step.name} of this run has a job with another request (job {job}, {status.status}; {', '.join(parts)} "
                    f"differ): use another run=, or remove {output} and {path}"
                )
        if status is None or status.exit_code:
            delete_outputs(output, job)
            self.client.start(request)
            job = request["TrainingJobName"]
            write_json(path, {"job": job, "asked": identity}, PRIVATE_MODE)
            write_line(f"{step.name}: job {job}")
        elif status.exit_code == 0:
            write_line(f"{step.name}: nothing to do, job {job} is completed")
            return 0
        else:
            write_line(f"{step.name}: waiting for job {job}, which is already running")
        self.jobs[step.name] = job
        return None

    def _identity(self, request: Request) -> dict[str, Any]:
        """Return what determines a step's result: parts of its request, and the jobs of this run whose outputs it reads.

        Variables enter as a digest, since their values may be secret.
        """
        urls = tuple(channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in request["InputDataConfig"])
        records = {path.parent.name: read_json(path) for path in sorted(self.plan.folder.glob(f"*/{JOB}"))}
        sources = {
            name: record["job"]
            for name, record in records.items()  # also of earlier commands
            if f"{record['asked']['OutputDataConfig']['S3OutputPath']}/".startswith(urls)
        }
        image = request["AlgorithmSpecification"]["TrainingImage"]
        parts = {part: request[part] for part in RESULT_PARTS}
        return {"image": image, "after": sources, **parts, "Environment": variables_digest(request["Environment"])}

    def poll(self, running: Sequence[Step]) -> dict[str, int]:
        """Print new log lines and changes of status. Return the exit codes of the jobs that ended."""
        codes = {}
        for step in running:
            job = self.jobs[step.name]
            status = self.client.describe(job)
            if lines := self.client.read_new_lines(job):
                append_lines(step.folder / LOG, f"job {job}", lines)
                write_output(step.name, lines)
            if self.statuses.get(step.name) != status:
                write_line(f"{step.name}: {status.status}, {status.detail}")
            self.statuses[step.name] = status
            if status.exit_code is not None:
                codes[step.name] = status.exit_code
        return codes

    def stop(self, running: Sequence[Step], number: int, again: bool) -> bool:
        """Leave the jobs running, and print the commands that wait for them and stop them."""
        if running:
            stops = [
                f"  aws sagemaker stop-training-job --training-job-name {self.jobs[step.name]}" for step in running
            ]
            message = "jobs continue at SageMaker; the same command waits for them again. To stop them:"
            write_line("\n".join([f"{len(running)} {message}", *stops]))
        return False

    def describe(self, step: Step) -> str:
        status = self.statuses.get(step.name)
        return f"job {self.jobs[step.name]}: {status.reason or status.detail}" if status else ""
