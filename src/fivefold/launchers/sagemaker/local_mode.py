"""The platform `sagemaker-local`: run the same jobs on the local Docker engine, through the SDK's local mode.

It needs no region, no credentials and no bucket. `<run>/sagemaker/` replaces S3: it has `model.tar.gz` and `output.tar.gz`
of each step, which the next step reads. Each step also has `model/` and `output/` as on any platform.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivefold.contract.record import IMAGE_VARIABLE
from fivefold.contract.s3.urls import is_url
from fivefold.contract.stage_specs import FAILURE, STAGES
from fivefold.errors import MissingInputError, SettingsError
from fivefold.launchers import local
from fivefold.launchers.plan import Inputs, Plan, Step
from fivefold.launchers.sagemaker.requests import (
    base_name,
    channels,
    environment,
    hyperparameters,
    output_prefix,
    redact,
    stage_options,
)
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.status import LOG, describe_failure, read_results, read_step_record, record_end, record_start
from fivefold.launchers.terminal import write_line
from fivefold.lookup import require_packages

results = read_results
DEFAULT_IMAGE = "fivefold:latest"
S3_FOLDER = "sagemaker"
WORK_FOLDER = "work"
POLL_INTERVAL_S = 0.2


def launch(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Run the plan's steps in containers, `parallel` at a time (0: one). Return the exit code of the first failed step."""
    with ThreadPoolExecutor(parallel := parallel or 1) as pool:
        containers = Containers(plan, local_jobs(plan), bool(local.list_gpus(environ)), pool)
        return Scheduler(plan.steps, containers, parallel, POLL_INTERVAL_S).run()


def check_machine(plan: Plan) -> None:
    """Raise a SettingsError if the SDK or the Docker engine is missing."""
    require_packages(("sagemaker",), "launch", "platform=sagemaker-local")
    if shutil.which("docker") is None:
        raise SettingsError("platform=sagemaker-local needs docker, which is not in PATH: install a Docker engine")


def describe(plan: Plan, parallel: int = 0) -> str:
    """Return the jobs of all steps as JSON: image, channels, hyperparameters and variables, without secrets."""
    jobs = {name: redact(job) for name, job in local_jobs(plan).items()}
    return json.dumps(jobs, indent=2, ensure_ascii=False)


def check_inputs(inputs: Inputs, run_folder: Path) -> Inputs:
    """Return the inputs, which must be on this machine, because local mode has no credentials for S3."""
    for name, path in inputs.paths():
        if is_url(path):
            raise SettingsError(f"{name}={path}: platform=sagemaker-local reads only folders and files of this machine")
    return local.check_inputs(inputs, run_folder)


def local_jobs(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the job of each step by the step's name. Channels are folders or files of this machine."""
    jobs = {}
    for step in plan.steps:
        options = stage_options(plan.settings, step)
        image = options.image or DEFAULT_IMAGE
        paths = channels(plan, step, str(plan.folder / S3_FOLDER))
        jobs[step.name] = {
            "Image": image,
            "InputDataConfig": {name: str(Path(path).resolve()) for name, path in paths.items()},
            "HyperParameters": hyperparameters(plan, step),
            "Environment": {IMAGE_VARIABLE: image, **environment(step, options)},
        }
    return jobs


@dataclass
class Containers:
    """Containers of the SDK's local mode as the backend of a Scheduler. A thread of `pool` waits for each."""

    plan: Plan
    jobs: Mapping[str, Mapping[str, Any]]
    gpu: bool
    pool: ThreadPoolExecutor
    futures: dict[str, Future[int]] = field(default_factory=dict)

    def start(self, step: Step) -> None:
        self.futures[step.name] = self.pool.submit(self._run, step)

    def poll(self, running: Sequence[Step]) -> dict[str, int]:
        return {step.name: future.result() for step in running if (future := self.futures[step.name]).done()}

    def stop(self, running: Sequence[Step], number: int, again: bool) -> bool:
        """Send SIGTERM to the containers, which then save their state; the second time SIGKILL."""
        write_line(
            f"{signal.Signals(number).name}: {'killing' if again else 'stopping'} containers (send again to kill)"
        )
        for step in running:
            for container in list_containers(self._root(step)):
                docker("kill", "--signal", "KILL" if again else "TERM", container)
        return True

    describe = staticmethod(describe_failure)

    def _root(self, step: Step) -> Path:
        """Return the folder of a job's container. Its name must be unique, because the SDK's compose project has the same name."""
        return (step.folder / WORK_FOLDER / base_name(self.plan.run, step).lower()).resolve()

    def _run(self, step: Step) -> int:
        """Run one job and collect its results. Return the exit code of its container, 1 without a container."""
        root, problem = self._root(step), ""
        shutil.rmtree(root.parent, ignore_errors=True)
        root.parent.mkdir(mode=0o700, parents=True)  # the SDK's compose file contains the variables
        root.mkdir()
        record_start(step, os.getpid())
        try:
            run_container(self.jobs[step.name], root, self.gpu)
        except (RuntimeError, ImportError, OSError) as error:  # a container that failed; no compose, no engine
            problem = str(error)
        code = collect_container(root, step.folder / LOG)
        collect_outputs(step, root, self.plan.folder / S3_FOLDER / output_prefix(step))
        shutil.rmtree(root.parent, ignore_errors=True)
        if code is None:
            (step.folder / FAILURE).write_text(f"Docker started no container: {problem}")
        code = 1 if code is None or (code == 0 and read_step_record(step) is None) else code
        record_end(step, code)
        return code


def run_container(job: Mapping[str, Any], root: Path, gpu: bool) -> None:
    """Run a job on the local Docker engine, without region and credentials, and wait for it.

    `root` is an empty folder, which gets `artifacts/` and `compressed_artifacts/`. Raise a RuntimeError if the
    container failed.
    """
    # import late: the SDK takes seconds to load, and many machines do not have it
    from sagemaker.core.training.configs import Compute, InputData
    from sagemaker.train import ModelTrainer
    from sagemaker.train.model_trainer import Mode

    folders = {
        name: ensure_folder(Path(path), root.parent / "channels" / name)
        for name, path in job["InputDataConfig"].items()
    }
    trainer = ModelTrainer(
        training_mode=Mode.LOCAL_CONTAINER,
        training_image=job["Image"],
        base_job_name=root.name,
        compute=Compute(instance_type="local_gpu" if gpu else "local_cpu", instance_count=1),
        environment=dict(job["Environment"]),
        hyperparameters=dict(job["HyperParameters"]),
        input_data_config=[InputData(channel_name=name, data_source=str(path)) for name, path in folders.items()],
        local_container_root=str(root),
    )
    trainer.train(wait=True)


def ensure_folder(path: Path, folder: Path) -> Path:
    """Return `path`, or `folder` with only this file if it is a file, because a channel must be a folder."""
    if path.is_dir():
        return path
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist: run the step that writes it, too")
    folder.mkdir(parents=True)
    try:
        os.link(path, folder / path.name)
    except OSError:  # on another file system
        shutil.copy2(path, folder / path.name)
    return folder


def collect_outputs(step: Step, root: Path, destination: Path) -> None:
    """Move a container's outputs to the step's folder, and if it succeeded its tarballs to `destination`."""
    artifacts = root / "artifacts"
    outputs = {
        "model": artifacts / "model",
        "output": artifacts / "output/data",
        FAILURE: artifacts / "output" / FAILURE,
    }
    for name, path in outputs.items():
        shutil.rmtree(step.folder / name, ignore_errors=True)
        (step.folder / name).unlink(missing_ok=True)
        if path.exists() and (name != "model" or STAGES[step.stage].writes_model):
            shutil.move(path, step.folder / name)
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    for name in ("model", "output") if read_step_record(step) is not None else ():
        shutil.move(root / "compressed_artifacts" / f"{name}.tar.gz", destination)


def collect_container(root: Path, log_file: Path) -> int | None:
    """Append the log of a job's container to `log_file`, remove the container, and return its exit code, or None without one."""
    code = None
    for container in list_containers(root):
        code = int(docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout or 1)
        with open(log_file, "ab") as file:
            subprocess.run(["docker", "logs", container], stdout=file, stderr=file, check=False)
        docker("rm", "--force", "--volumes", container)
    return code


def list_containers(root: Path) -> list[str]:
    label = f"label=com.docker.compose.project={root.name}"
    return docker("ps", "--all", "--quiet", "--filter", label).stdout.split()


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
