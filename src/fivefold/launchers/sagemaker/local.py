"""The platform `sagemaker-local`: the same jobs on the local Docker engine, through the SDK's local mode.

No region, no credentials, no bucket: what S3 would hold lies in `<run>/sagemaker/`, `model.tar.gz` and `output.tar.gz`
of each step (or plain folders, with `sagemaker.compress=false`), and is what the next step reads. Beside it each step's
`model/` and `output/` are as on any platform, so `status`, the table and the report are, too.
"""

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fivefold.contract.s3.urls import is_url
from fivefold.contract.stages import FAILURE, STAGES
from fivefold.errors import MissingInputError, SettingsError
from fivefold.launchers import local
from fivefold.launchers.plan import Inputs, Plan, Step
from fivefold.launchers.sagemaker import requests
from fivefold.launchers.sagemaker.trainer import need_sdk, run_here
from fivefold.launchers.scheduler import Signals
from fivefold.launchers.status import LOG, failure_of, record_of, write_ended, write_started

log = logging.getLogger("fivefold")

IMAGE = "fivefold:latest"
PLACE = "sagemaker"
WORK = "work"
TARBALLS = ("model.tar.gz", "output.tar.gz")
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_STOP = 120
"""As long as SageMaker waits between SIGTERM and SIGKILL."""


def launch(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Runs the plan's steps in containers, `parallel` at a time (0: one); the exit code of the first that failed.

    A step that is done already runs again: its container starts empty.
    """
    jobs = jobs_of(plan)
    with Signals() as signals:
        return Engine(plan, jobs, bool(local.gpus(environ)), max(1, parallel)).work(signals)


def check(plan: Plan, environ: Mapping[str, str] = os.environ) -> None:
    """Raises a SettingsError where the SDK or the Docker engine is missing."""
    need_sdk("platform=sagemaker-local")
    if shutil.which("docker", path=environ.get("PATH")) is None:
        raise SettingsError("platform=sagemaker-local needs docker, which is not in PATH: install a Docker engine")
    jobs_of(plan)


def describe(plan: Plan, parallel: int = 0) -> str:
    """The jobs of all steps as JSON: image, channels, hyperparameters and variables."""
    return json.dumps({name: job.as_json() for name, job in jobs_of(plan).items()}, indent=2, ensure_ascii=False)


def check_inputs(inputs: Inputs, run_folder: Path) -> Inputs:
    """The inputs, all of them of this machine: local mode would need credentials for others."""
    for name, path in vars(inputs).items():
        if path and is_url(path):
            raise SettingsError(f"{name}={path}: platform=sagemaker-local takes folders and files of this machine")
    return local.check_inputs(inputs, run_folder)


@dataclass(frozen=True)
class LocalJob:
    """One step for the engine: its channels are folders (or files) of this machine."""

    image: str
    channels: Mapping[str, Path]
    request: Mapping[str, Mapping[str, str]]
    compress: bool

    def as_json(self) -> dict[str, Any]:
        paths = {name: str(path) for name, path in self.channels.items()}
        return {"Image": self.image, "InputDataConfig": paths, **self.request}


def jobs_of(plan: Plan) -> dict[str, LocalJob]:
    """The job of each step, by the step's name."""
    return {step.name: job_of(plan, step) for step in plan.steps}


def job_of(plan: Plan, step: Step) -> LocalJob:
    options = requests.options_of(plan.settings, step)
    options = options.model_copy(update={"image": options.image or IMAGE})
    given = requests.channels(plan, step, str(plan.folder / PLACE))
    paths = {name: Path(path).resolve() for name, path in given.items()}
    request = {
        "HyperParameters": requests.hyperparameters(plan, step),
        "Environment": requests.environment(step, options),
    }
    return LocalJob(options.image, paths, request, options.compress)


@dataclass
class Engine:
    """Runs jobs on the Docker engine as their needs are met."""

    plan: Plan
    jobs: Mapping[str, LocalJob]
    gpu: bool
    parallel: int
    ended: dict[str, int] = field(default_factory=dict)

    def work(self, signals: Signals) -> int:
        """Runs all there is to run; 128 + the signal that stopped it, which stops the containers too."""
        waiting, running, stopped = list(self.plan.steps), dict[Future[int], Step](), False
        with ThreadPoolExecutor(self.parallel) as pool:
            while True:
                ready = [step for step in waiting if all(self.ended.get(name) == 0 for name in step.needs)]
                for step in [] if signals.received else ready[: self.parallel - len(running)]:
                    waiting.remove(step)
                    running[pool.submit(self._run, step)] = step
                if not running:
                    break
                if signals.received and not stopped:
                    stopped = True
                    stop([self._root(step) for step in running.values()])
                done, _ = wait(running, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
                for future in done:
                    self._end(running.pop(future), future.result())
        if signals.received:
            return 128 + signals.received[0]
        for step in waiting:
            log.error("%s was not started: it needs a step that failed", step.name)
        return next((code for code in self.ended.values() if code), 0)

    def _root(self, step: Step) -> Path:
        """The folder of a job's container; the SDK's compose project has its name, so no two may share it."""
        return (step.folder / WORK / requests.base_name(self.plan.run, step).lower()).resolve()

    def _run(self, step: Step) -> int:
        """One job, from its channels to its results; the exit code of its container."""
        job, root = self.jobs[step.name], self._root(step)
        shutil.rmtree(root.parent, ignore_errors=True)
        root.mkdir(parents=True)
        write_started(step, os.getpid())
        channels = {name: as_folder(path, root.parent / "channels" / name) for name, path in job.channels.items()}
        told = ""
        try:
            run_here(job.image, requests.base_name(self.plan.run, step), root, channels, job.request, self.gpu)
        except (RuntimeError, ImportError, OSError) as error:  # a container that failed; no compose, no engine
            told = str(error)
        code = code_of(root, step.folder / LOG)
        keep(step, self.plan.folder / PLACE / requests.place_of(step), root, job.compress)
        shutil.rmtree(root.parent, ignore_errors=True)
        if code is None:
            (step.folder / FAILURE).write_text(f"the engine started no container: {told}")
        return 1 if code is None or (code == 0 and record_of(step) is None) else code

    def _end(self, step: Step, code: int) -> None:
        write_ended(step, code)
        self.ended[step.name] = code
        if code:
            log.error("%s failed (exit code %d): %s\n  log: %s", step.name, code, failure_of(step), step.folder / LOG)


def as_folder(path: Path, folder: Path) -> Path:
    """`path`, or where it is a file a folder that holds it alone: a channel is a folder."""
    if path.is_dir():
        return path
    if not path.is_file():
        raise MissingInputError(f"{path} is not there: run the step that makes it, too")
    folder.mkdir(parents=True)
    try:
        os.link(path, folder / path.name)
    except OSError:  # on another file system
        shutil.copy2(path, folder / path.name)
    return folder


def keep(step: Step, place: Path, root: Path, compress: bool) -> None:
    """Moves what a container left to the step's folder, and to where the next step reads it."""
    made, packed = root / "artifacts", root / "compressed_artifacts"
    moves = {made / "model": "model", made / "output" / "data": "output", made / "output" / FAILURE: FAILURE}
    for found, name in moves.items():
        shutil.rmtree(step.folder / name, ignore_errors=True)
        (step.folder / name).unlink(missing_ok=True)
        if found.is_file() or (found.is_dir() and (name != "model" or STAGES[step.stage].writes_model)):
            shutil.move(found, step.folder / name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if record_of(step) is None:
        return
    for tarball in TARBALLS if compress else ():
        shutil.move(packed / tarball, place / tarball)
    for name in () if compress else ("model", "output"):
        if (step.folder / name).is_dir():
            shutil.copytree(step.folder / name, place / name)


def code_of(root: Path, log_file: Path) -> int | None:
    """The exit code of the job's container, whose words go to `log_file`; it is removed. None where there is none."""
    found = docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={root.name}")
    code = None
    for container in found.stdout.split():
        code = int(docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout or 1)
        with open(log_file, "ab") as file:
            subprocess.run(["docker", "logs", container], stdout=file, stderr=file, check=False)
        docker("rm", "--force", "--volumes", container)
    return code


def stop(roots: Sequence[Path]) -> None:
    """Sends SIGTERM to the containers of jobs, which keep what they have."""
    for root in roots:
        found = docker("ps", "--quiet", "--filter", f"label=com.docker.compose.project={root.name}")
        for container in found.stdout.split():
            docker("stop", "--time", str(SECONDS_TO_STOP), container)


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
