"""The jobs of one plan at SageMaker: which wait, which run, what they say, how they ended.

Each step's `sagemaker.json` in the run's folder names its job, so the same command waits for jobs that still run, takes
those that are done, and starts anew those that failed, which go on from their checkpoints.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fivefold.contract.files import read_json, write_json
from fivefold.contract.s3.urls import parse
from fivefold.contract.storage import Remote
from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers.plan import Plan, Step
from fivefold.launchers.sagemaker.requests import Request
from fivefold.launchers.sagemaker.service import Look, Service
from fivefold.launchers.scheduler import Signals
from fivefold.launchers.screen import Screen
from fivefold.launchers.status import LOG

JOB = "sagemaker.json"
OF_THE_RESULT = ("HyperParameters", "Environment", "InputDataConfig", "OutputDataConfig")
"""The parts of a request that make the result; price, instances and limits may change and a result stays."""
SECONDS_BETWEEN_SIGNALS = 0.1
LOOKS_IN_VAIN = 20
"""How often in a row the service may be away before it is given up; the jobs go on all the same."""


@dataclass
class Fleet:
    """Starts jobs as their needs are met, `parallel` at a time (0: all), and waits for them."""

    plan: Plan
    requests: Mapping[str, Request]
    service: Service
    parallel: int
    screen: Screen = field(default_factory=Screen)
    remote: Remote | None = None
    jobs: dict[str, str] = field(default_factory=dict)
    """The job of each step that was started or found."""
    running: list[Step] = field(default_factory=list)
    waiting: list[Step] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    in_vain: int = 0

    def __post_init__(self) -> None:
        self.waiting = list(self.plan.steps)

    def work(self, signals: Signals) -> int:
        """Runs all there is to run; the exit code of the first step that failed, 128 + the signal that it was left by."""
        try:
            while not signals.received:
                self._start_ready()
                if not self.running:
                    break
                self._look_at_all()
                self._wait(signals)
        finally:
            self._say_what_goes_on()
        if signals.received:
            return 128 + signals.received[0]
        for step in self.waiting:
            because = [name for name in step.needs if self.ended.get(name) != 0]
            self.screen.line(f"{step.name} was not started: it needs {', '.join(because)}")
        return next((code for code in self.ended.values() if code), 0)

    def _start_ready(self) -> None:
        """Starts what can start; a step that is done already lets others start at once."""
        while not self.parallel or len(self.running) < self.parallel:
            ready = (step for step in self.waiting if all(self.ended.get(name) == 0 for name in step.needs))
            step = next(ready, None)
            if step is None:
                return
            try:
                self._begin(step)
            except RetryableError as error:
                if not self.running:
                    raise
                # a quota of the account: there is room when one of those that run has ended
                self._say_once(step.name, f"{step.name} waits: {error}")
                return
            self.waiting.remove(step)

    def _begin(self, step: Step) -> None:
        request = self.requests[step.name]
        asked = self._asked(request)
        job, look = self._found(step, asked)
        if look is None or (look.over and look.exit_code):
            self._clear_the_way(step, request, job)
            job = self.service.start(request)
            write_json(step.folder / JOB, {"job": job, "asked": asked})
            self.screen.line(f"{step.name}: job {job}")
        elif look.over:
            self.jobs[step.name], self.ended[step.name] = job, 0
            self.screen.line(f"{step.name}: nothing to do, job {job} is completed")
            return
        else:
            self.screen.line(f"{step.name}: waits for job {job}, which runs already")
        self.jobs[step.name] = job
        self.running.append(step)

    def _asked(self, request: Request) -> dict[str, Any]:
        """What makes a step's result: the parts of its request, and the jobs that it goes on from."""
        image = request["AlgorithmSpecification"]["TrainingImage"]
        return {"image": image, "after": self._sources(request), **{part: request[part] for part in OF_THE_RESULT}}

    def _sources(self, request: Request) -> dict[str, str]:
        """The jobs of this run, by their steps, whose outputs a request reads; also those of earlier commands."""
        urls = [each["DataSource"]["S3DataSource"]["S3Uri"] for each in request["InputDataConfig"]]
        known = {path.parent.name: read_json(path) for path in sorted(self.plan.folder.glob(f"*/{JOB}"))}
        places = {name: f"{each['asked']['OutputDataConfig']['S3OutputPath']}/" for name, each in known.items()}
        return {name: known[name]["job"] for name, place in places.items() if place.startswith(tuple(urls))}

    def _found(self, step: Step, asked: Mapping[str, Any]) -> tuple[str, Look | None]:
        """The job of an earlier command and how it stands; no name where there is none.

        A SettingsError where one that is done, or runs, was asked for something else.
        """
        path = step.folder / JOB
        if not path.is_file():
            return "", None
        earlier = read_json(path)
        job, look = earlier["job"], self.service.look(earlier["job"])
        if earlier["asked"] != asked and not look.exit_code:
            parts = sorted(part for part in asked if asked[part] != earlier["asked"].get(part))
            raise SettingsError(
                f"{step.name} of this run was asked for otherwise (job {job}, {look.status}; {', '.join(parts)} differ): "
                f"choose another run=, or remove {self.requests[step.name]['OutputDataConfig']['S3OutputPath']} and {path}"
            )
        return job, look

    def _clear_the_way(self, step: Step, request: Request, failed: str) -> None:
        """Removes what the job `failed` has left where the next one writes; a SettingsError for what another left."""
        self.remote = self.remote or Remote(step.folder)
        url = parse(request["OutputDataConfig"]["S3OutputPath"], "sagemaker.output")
        found = [each.url for each in self.remote.store.below(url)]
        own = [each for each in found if failed and each.below(url).startswith(f"{failed}/")]
        if strangers := [each for each in found if each not in own]:
            raise SettingsError(
                f"{strangers[0]} is there already, of a job that this folder of runs does not know: choose another run=, "
                f"or remove {url}"
            )
        self.remote.store.delete(own)

    def _look_at_all(self) -> None:
        for step in list(self.running):
            job = self.jobs[step.name]
            try:
                look = self.service.look(job)
                self.in_vain = 0
            except RetryableError:
                self.in_vain += 1
                if self.in_vain >= LOOKS_IN_VAIN:
                    raise
                continue
            self._say(step, self.service.new_lines(job))
            self._say_once(job, f"{step.name}: {look.status}, {look.detail}")
            if look.over:
                self._end(step, look)

    def _end(self, step: Step, look: Look) -> None:
        self.running.remove(step)
        self.ended[step.name] = look.exit_code
        if look.exit_code:
            reason = look.reason or look.detail
            self.screen.line(f"{step.name} failed (exit code {look.exit_code}), job {self.jobs[step.name]}: {reason}")

    def _say(self, step: Step, lines: list[str]) -> None:
        if lines:
            with open(step.folder / LOG, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        for line in lines:
            self.screen.line(f"[{step.name}] {line}")

    def _say_once(self, of: str, line: str) -> None:
        if self.shown.get(of) != line:
            self.shown[of] = line
            self.screen.line(line)

    def _wait(self, signals: Signals) -> None:
        until = time.monotonic() + self.plan.settings.sagemaker.poll_seconds
        while self.running and not signals.received and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_SIGNALS)

    def _say_what_goes_on(self) -> None:
        """Says how to go on with the jobs that still run, and how to stop them."""
        names = [self.jobs[step.name] for step in self.running]
        if names:
            told = "jobs go on at SageMaker; the same command waits for them again. To stop them:"
            stops = [f"  aws sagemaker stop-training-job --training-job-name {name}" for name in names]
            self.screen.line("\n".join([f"{len(names)} {told}", *stops]))
