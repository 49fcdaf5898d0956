"""Runs a plan on Kubernetes by the user's kubectl: a step's Job is applied when those that it needs are done.

What is in the cluster stays there when this process ends: the same command looks at it and goes on.
"""

import io
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers import kubectl as cluster
from fivefold.launchers.kubectl import Kubectl
from fivefold.launchers.manifests import (
    CONTAINER,
    DATA,
    RUN,
    RUNS,
    Object,
    Task,
    as_yaml,
    check_names,
    check_runs,
    claim,
    job,
    job_name,
    tasks_of,
)
from fivefold.launchers.plan import Plan, Step
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.screen import Screen, copy_output
from fivefold.launchers.status import LOG

SECONDS_FOR_LAST_WORDS = 20.0


def launch(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Runs the plan's Jobs in the cluster; 0, or the exit code of the first that failed: its pod's, or 75.

    130 or 143 after SIGINT or SIGTERM: the Jobs go on, and are no longer followed.
    """
    check(plan)
    section, screen = plan.settings.kubernetes, Screen()
    backend = KubernetesBackend(plan, parallel, Kubectl(section.namespace, section.context, environ), screen)
    try:
        return Scheduler(tasks_of(plan), backend, screen, seconds=section.poll_seconds).run()
    finally:
        backend.logs.stop()


def describe(plan: Plan, parallel: int = 0) -> str:
    """The Jobs in order, as they are applied. The claim is only named, so that who deletes these objects keeps the data."""
    check(plan)
    jobs = objects(plan, parallel)
    name = plan.settings.kubernetes.claim
    head = f"# The claim {name} must exist: k8s/pvc.yaml makes fivefold.\n" if any(map(has_claim, jobs)) else ""
    return head + as_yaml(jobs).rstrip("\n")


def objects(plan: Plan, parallel: int = 0) -> list[Object]:
    return [job(plan, task, parallel) for task in tasks_of(plan)]


def has_claim(one: Mapping[str, Any]) -> bool:
    return any("persistentVolumeClaim" in volume for volume in one["spec"]["template"]["spec"]["volumes"])


def check(plan: Plan) -> None:
    """Raises a SettingsError for what no cluster could run, before anything is written."""
    check_names(plan)
    check_runs(plan.settings.kubernetes.runs)


def results(plan: Plan) -> str:
    """Where the run's files are, and how to get them."""
    section = plan.settings.kubernetes
    if section.runs != RUNS:
        return f"the run is at {section.runs.rstrip('/')}/{plan.run}"
    return (
        f"the run is in {RUNS}/{plan.run} of the claim {section.claim}; beside a pod of k8s/loader-pod.yaml:\n"
        f"kubectl cp fivefold-loader:{RUNS}/{plan.run} {plan.folder}    ({DATA} and {RUNS} are there)"
    )


class KubernetesBackend:
    """Runs each Task as a Job of the cluster. What it started goes on without this process, and is found again."""

    def __init__(self, plan: Plan, parallel: int, kubectl: Kubectl, screen: Screen) -> None:
        """Raises a SettingsError where a Job of the plan runs with other arguments, before anything is applied."""
        self.plan, self.parallel, self.kubectl, self.screen = plan, parallel, kubectl, screen
        self.logs = Logs(kubectl, screen)
        self._selector = f"{RUN}={plan.run}"
        self._skipped: set[str] = set()
        self._printed: set[str] = set()
        self._failures: dict[str, str] = {}
        self._jobs = {one["metadata"]["name"]: one for one in kubectl.items("jobs", self._selector)}
        for task in tasks_of(plan):
            name = self._job(task)
            present = self._jobs.get(name)
            if present and not _is_over(present) and work_of(present) != work_of(job(plan, task, parallel)):
                raise SettingsError(
                    f"the Job {name} runs with other settings: wait for it, give another run=, or kubectl delete job {name}"
                )

    def start(self, task: Task, alone: bool) -> int | None:
        """Applies a Job, or goes on with the one that is there: done, running, or failed and made anew."""
        wanted = job(self.plan, task, self.parallel)
        name = self._job(task)
        present = self._jobs.get(name)
        if present is None:
            self._make_claim(wanted)
            self.kubectl.apply(wanted)
            self.screen.line(f"{name}: applied")
        elif not _is_over(present):
            self.screen.line(f"{name} is there and runs: it is followed")
        elif (
            cluster.condition(present, "Complete")
            and work_of(present) == work_of(wanted)
            and self._skipped.issuperset(task.needs)
        ):
            self.screen.line(f"{name} is there and done: skipped; kubectl delete job {name} has it run again")
            self._skipped.add(task.name)
            return 0
        else:
            self.kubectl.replace(wanted)
            why = "had failed" if cluster.condition(present, "Failed") else "was done with other settings or inputs"
            self.screen.line(f"{name} {why}: replaced")
        return None

    def poll(self, running: Sequence[Task]) -> dict[str, int]:
        objects = self.kubectl.items("jobs,pods", self._selector)
        jobs = {one["metadata"]["name"]: one for one in objects if one["kind"] == "Job"}
        pods = [one for one in objects if one["kind"] == "Pod"]
        codes = {task.name: self._poll_job(task, jobs.get(self._job(task)), pods) for task in running}
        return {name: code for name, code in codes.items() if code is not None}

    def stop(self, running: Sequence[Task], number: int, again: bool) -> bool:
        """Leaves the Jobs to the cluster, and prints how to follow them again and how to end them."""
        names = ", ".join(self._job(task) for task in running) or "no Job"
        where = " ".join(["kubectl", *self.kubectl.where])
        self.screen.line(
            f"no longer followed: {names} of {self.plan.run} in the cluster\n"
            f"  the same command goes on; to end them: {where} delete jobs --selector {self._selector}"
        )
        return False

    def describe(self, task: Task) -> str:
        return self._failures.get(task.name, "")

    def _job(self, task: Task) -> str:
        return job_name(self.plan.run, task.name)

    def _make_claim(self, wanted: Mapping[str, Any]) -> None:
        pods = self.plan.settings.kubernetes
        if has_claim(wanted) and not self.kubectl.has("persistentvolumeclaim", pods.claim):
            self.kubectl.apply(claim(pods))
            self.screen.line(f"claim {pods.claim}: applied")

    def _poll_job(self, task: Task, one: Object | None, pods: Sequence[Object]) -> int | None:
        """Prints what is new of a Job and of its pods; its exit code once it is over."""
        if one is None:
            self._failures[task.name] = f"the Job {self._job(task)} was deleted"
            return RetryableError.exit_code
        own = cluster.pods_of_job(pods, one)
        for pod in own:
            step = task.steps[cluster.index_of(pod) or 0]
            self.logs.follow(pod, step)
            if reason := cluster.waits_for(pod):
                self._print_once(f"{step.name} waits: {reason}", reason)
            if ending := cluster.ending(pod):
                self._print_once(f"{step.name}, pod {ending.pod}, failed: {ending}", ending.pod)
        failed = cluster.condition(one, "Failed")
        if not _is_over(one):
            return None
        self.logs.finish(own)
        if failed is None:
            self.screen.line(f"{self._job(task)}: done")
            return 0
        last = cluster.last_endings(one, own)
        named = [f"\n  {task.steps[ending.index or 0].name}: {ending}" for ending in last]
        self._failures[task.name] = f"the Job {self._job(task)}, {failed.get('reason', 'unknown')}{''.join(named)}"
        return cluster.exit_code(last)

    def _print_once(self, text: str, key: str) -> None:
        if key not in self._printed:
            self._printed.add(key)
            self.screen.line(text)


def work_of(one: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a Job does: its image, arguments and variables, for so many folds."""
    containers = one["spec"]["template"]["spec"]["containers"]
    container = next((each for each in containers if each["name"] == CONTAINER), {})
    values = {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
    return container.get("image"), container.get("args"), values, one["spec"].get("completions") or 1


def _is_over(one: Mapping[str, Any]) -> bool:
    return any(cluster.condition(one, kind) for kind in ("Complete", "Failed"))


class Logs:
    """Follows the log of every pod that it is shown, each by a process of kubectl and a thread that reads it."""

    def __init__(self, kubectl: Kubectl, screen: Screen) -> None:
        self.kubectl, self.screen = kubectl, screen
        self._streams: dict[str, tuple[subprocess.Popen[bytes], threading.Thread]] = {}

    def follow(self, pod: Mapping[str, Any], step: Step) -> None:
        """Follows a pod that has started. One whose stream broke off while it runs is taken up from there."""
        name, log = pod["metadata"]["name"], step.folder / LOG
        earlier = self._streams.get(name)
        if not cluster.has_started(pod) or (earlier and (earlier[0].poll() is None or cluster.is_over(pod))):
            return
        command = self.kubectl.command("logs", "--follow", name, "--container", CONTAINER)
        if earlier:
            last_line = datetime.fromtimestamp(log.stat().st_mtime, UTC)
            command += ["--since-time", last_line.isoformat(timespec="seconds")]
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **quiet)
        output = io.TextIOWrapper(process.stdout, "utf-8", "replace", newline="")
        told = (output, log, f"pod {name}", self.screen, step.name)
        self._streams[name] = process, threading.Thread(target=copy_output, args=told, daemon=True)
        self._streams[name][1].start()

    def finish(self, pods: Sequence[Mapping[str, Any]]) -> None:
        """Waits for the last words of pods that are over."""
        until = time.monotonic() + SECONDS_FOR_LAST_WORDS
        for pod in pods:
            if stream := self._streams.get(pod["metadata"]["name"]):
                stream[1].join(max(0.0, until - time.monotonic()))

    def stop(self) -> None:
        """Ends every process that still follows."""
        for process, reader in self._streams.values():
            process.terminate()
            reader.join(SECONDS_FOR_LAST_WORDS)
            process.wait()
