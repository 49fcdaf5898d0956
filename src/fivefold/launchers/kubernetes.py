"""Runs a plan on Kubernetes by the user's kubectl: a step's Job is applied when those that it needs are done.

What is in the cluster stays there when this process ends: the same command looks at it and goes on.
"""

import io
import json
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers import kubectl as cluster
from fivefold.launchers.kubectl import AS_APPLIED, Kubectl, where
from fivefold.launchers.manifests import (
    CONTAINER,
    DATA,
    QUEUE,
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
from fivefold.launchers.screen import Screen, copy_output, lines_of
from fivefold.launchers.status import LOG, ROWS, in_columns

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
    """The scores of the run, where its files are, and how to get them."""
    section, scores = plan.settings.kubernetes, scores_of(plan)
    place = f"the run is at {section.runs.rstrip('/')}/{plan.run}"
    if section.runs == RUNS:
        copy = ["kubectl", *where(section.namespace, section.context), "cp", f"fivefold-loader:{RUNS}/{plan.run}"]
        place = (
            f"the run is in {RUNS}/{plan.run} of the claim {section.claim}; beside a pod of k8s/loader-pod.yaml:\n"
            f"{shlex.join([*copy, str(plan.folder)])}    ({DATA} and {RUNS} are there)"
        )
    return f"{scores}\n\n{place}" if scores else place


def scores_of(plan: Plan) -> str:
    """The scores that the pods of `evaluate` printed, as a table; empty where their logs were followed elsewhere."""
    table = [("", "accuracy", "logloss", "rows")]
    for step in [step for step in plan.steps if step.stage == "evaluate"]:
        printed = [line for line in lines_of(step.folder / LOG) if line.startswith('{"')]
        for rows, scores in json.loads(printed[-1]).items() if printed else ():
            models = {"oof": "folds"}.get(rows, "ensemble") if step.name == "evaluate" else "student"
            figures = ["-" if scores[key] is None else f"{scores[key]:.4f}" for key in ("accuracy", "logloss")]
            table.append((models, *figures, f"{ROWS[rows]}, {scores['n']}"))
    return in_columns(table, numbers=(1, 2)) if len(table) > 1 else ""


class KubernetesBackend:
    """Runs each Task as a Job of the cluster. What it started goes on without this process, and is found again."""

    def __init__(self, plan: Plan, parallel: int, kubectl: Kubectl, screen: Screen) -> None:
        self.plan, self.parallel, self.kubectl, self.screen = plan, parallel, kubectl, screen
        self.logs = Logs(kubectl, screen)
        self._selector = f"{RUN}={plan.run}"
        self._by_hand = shlex.join(["kubectl", *kubectl.where])
        self._before: dict[str, Object] | None = None
        self._followed: set[str] = set()
        self._skipped: set[str] = set()
        self._printed: set[str] = set()
        self._failures: dict[str, str] = {}

    def start(self, task: Task, alone: bool) -> None:
        """Leaves the Job to `poll`, which is called again where the cluster is away."""

    def poll(self, running: Sequence[Task]) -> dict[str, int]:
        if self._before is None:
            self._before = self._look()
        for task in running:
            if task.name not in self._followed | self._skipped:
                self._take_up(task, job(self.plan, task, self.parallel), self._before.get(self._job(task)))
        objects = self.kubectl.items("jobs,pods", self._selector)
        jobs = {one["metadata"]["name"]: one for one in objects if one["kind"] == "Job"}
        pods = [one for one in objects if one["kind"] == "Pod"]
        followed = [task for task in running if task.name in self._followed]
        codes = {task.name: self._poll_job(task, jobs.get(self._job(task)), pods) for task in followed}
        skipped = {task.name: 0 for task in running if task.name in self._skipped}
        return skipped | {name: code for name, code in codes.items() if code is not None}

    def stop(self, running: Sequence[Task], number: int, again: bool) -> bool:
        """Leaves the Jobs to the cluster, and prints how to follow them again and how to end them."""
        if names := ", ".join(self._job(task) for task in running if task.name in self._followed):
            self.screen.line(
                f"no longer followed: {names} of {self.plan.run} in the cluster\n"
                f"  the same command goes on; to end them: {self._by_hand} delete jobs --selector {self._selector}"
            )
        return False

    def describe(self, task: Task) -> str:
        return self._failures.get(task.name, "")

    def _job(self, task: Task) -> str:
        return job_name(self.plan.run, task.name)

    def _look(self) -> dict[str, Object]:
        """The run's Jobs, before anything is applied; a SettingsError where pods run with other settings than asked for."""
        objects = self.kubectl.items("jobs,pods", self._selector)
        found = {one["metadata"]["name"]: one for one in objects if one["kind"] == "Job"}
        pods = [one for one in objects if one["kind"] == "Pod"]
        for task in tasks_of(self.plan):
            name, wanted = self._job(task), job(self.plan, task, self.parallel)
            present = found.get(name)
            if present is None or _is_over(present) or request_of(present) == request_of(wanted):
                continue
            if any(map(cluster.has_started, cluster.pods_of_job(pods, present))):
                raise SettingsError(
                    f"the Job {name} runs with other settings or resources: wait for it, give another run=, or "
                    f"{self._by_hand} delete job {name}"
                )
        return found

    def _take_up(self, task: Task, wanted: Object, present: Object | None) -> None:
        """Applies a Job, or goes on with the one that is there: done, running, or to be made anew."""
        name = self._job(task)
        done = present is not None and cluster.condition(present, "Complete")
        if present is None:
            self._make_claim(wanted)
            self.kubectl.apply(wanted)
            self.screen.line(f"{name}: applied")
        elif not _is_over(present) and request_of(present) == request_of(wanted):
            self.screen.line(f"{name} is there and runs: it is followed")
        elif done and work_of(present) == work_of(wanted) and self._skipped.issuperset(task.needs):
            self.screen.line(f"{name} is there and done: skipped; {self._by_hand} delete job {name} has it run again")
            self._skipped.add(task.name)
            return
        else:
            self.kubectl.replace(wanted)
            failed = "had failed" if cluster.condition(present, "Failed") else "had not started, with other settings"
            self.screen.line(f"{name} {'was done with other settings or inputs' if done else failed}: replaced")
        self._followed.add(task.name)

    def _make_claim(self, wanted: Mapping[str, Any]) -> None:
        pods = self.plan.settings.kubernetes
        if has_claim(wanted) and not self.kubectl.has("persistentvolumeclaim", pods.claim):
            self.kubectl.apply(claim(pods))
            self.screen.line(f"claim {pods.claim}: applied")

    def _poll_job(self, task: Task, one: Object | None, pods: Sequence[Object]) -> int | None:
        """Prints what is new of a Job and of its pods; its exit code once it is over."""
        name = self._job(task)
        if one is None:
            self._failures[task.name] = f"the Job {name} was deleted"
            return RetryableError.exit_code
        own = cluster.pods_of_job(pods, one)
        for pod in own:
            step = task.steps[cluster.index_of(pod) or 0]
            self.logs.follow(pod, step)
            if reason := cluster.waits_for(pod):
                self._print_once(f"{step.name} waits: {reason}", reason)
            if ending := cluster.ending(pod):
                self._print_once(f"{step.name}, pod {ending.pod}, {ending.verb}: {ending}", ending.pod)
        failed = cluster.condition(one, "Failed")
        if not _is_over(one):
            if cluster.lacks_pods(one, own) and (reason := self.kubectl.why_no_pod(one["metadata"]["uid"])):
                self._print_once(f"{name} waits: {reason}", cluster.without_names(reason))
            return None
        self.logs.finish(own)
        if failed is None:
            self._print_once(f"{name}: done", one["metadata"]["uid"])
            return 0
        last = cluster.last_endings(one, own)
        named = [f"\n  {task.steps[ending.index or 0].name}: {ending}" for ending in last]
        self._failures[task.name] = f"the Job {name}, {failed.get('reason', 'unknown')}{''.join(named)}"
        return cluster.exit_code(last)

    def _print_once(self, text: str, key: str) -> None:
        if key not in self._printed:
            self._printed.add(key)
            self.screen.line(text)


def work_of(one: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a Job does: its image, arguments and variables, for so many folds."""
    container = cluster.container_of(one["spec"]["template"])
    values = {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
    return container.get("image"), container.get("args"), values, one["spec"].get("completions") or 1


def request_of(one: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a Job does, and what it asks of the cluster in the words of who applied it: resources, service account, queue."""
    text = one["metadata"].get("annotations", {}).get(AS_APPLIED)
    given = json.loads(text) if text else one  # the cluster's own has 1Gi for 1024Mi
    template, queue = given["spec"]["template"], given["metadata"].get("labels", {}).get(QUEUE)
    resources = cluster.container_of(template).get("resources")
    return *work_of(one), resources, template["spec"].get("serviceAccountName"), queue


def _is_over(one: Mapping[str, Any]) -> bool:
    return any(cluster.condition(one, kind) for kind in ("Complete", "Failed"))


class Logs:
    """Follows the log of every pod that it is shown, each by a process of kubectl and a thread that reads it."""

    def __init__(self, kubectl: Kubectl, screen: Screen) -> None:
        self.kubectl, self.screen = kubectl, screen
        self._streams: dict[str, tuple[subprocess.Popen[bytes], threading.Thread]] = {}

    def follow(self, pod: Mapping[str, Any], step: Step) -> None:
        """Follows a pod that has started, also one whose stream broke off; lines that are in the log are passed over."""
        name, log = pod["metadata"]["name"], step.folder / LOG
        earlier = self._streams.get(name)
        is_read = earlier and (earlier[0].poll() is None or (cluster.is_over(pod) and not earlier[0].returncode))
        if is_read or not cluster.has_started(pod):
            return
        if earlier:
            earlier[1].join()
        command = self.kubectl.command("logs", "--follow", name, "--container", CONTAINER)
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **quiet)
        output = io.TextIOWrapper(process.stdout, "utf-8", "replace", newline="")
        title = f"pod {name}"
        told = (output, log, title, self.screen, step.name, lines_of(log, title))
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
