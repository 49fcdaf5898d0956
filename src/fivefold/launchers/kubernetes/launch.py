"""Run a plan on Kubernetes with the user's kubectl: apply a step's Job when the Jobs that it needs are done.

The Jobs stay in the cluster when this process ends. The same command finds them and continues.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fivefold.errors import RetryableError, SettingsError
from fivefold.launchers.kubernetes import cluster
from fivefold.launchers.kubernetes.cluster import LAST_APPLIED, Kubectl, kubectl_options
from fivefold.launchers.kubernetes.manifests import (
    CONTAINER,
    QUEUE,
    RUN,
    RUNS,
    Object,
    Task,
    check_inputs,  # noqa: F401
    check_names,
    check_runs,
    claim_manifest,
    job_manifest,
    job_name,
    plan_tasks,
    to_yaml,
)
from fivefold.launchers.plan import Plan, Step
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.status import LOG, ROWS, format_table
from fivefold.launchers.terminal import append_lines, find_new_lines, read_lines, write_line, write_output


def launch(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Run the plan's Jobs in the cluster. Return 0, or the exit code of the first failed Job: its pod's, or 75.

    Return 130 or 143 after SIGINT or SIGTERM: the Jobs continue, and this process no longer follows them.
    """
    backend = KubernetesBackend(plan, parallel, find_kubectl(plan, environ))
    return Scheduler(plan_tasks(plan), backend, poll_interval=plan.settings.kubernetes.poll_seconds).run()


def find_kubectl(plan: Plan, environ: Mapping[str, str] = os.environ) -> Kubectl:
    """Return kubectl for the plan's cluster. Raise a SettingsError if it is not installed."""
    return Kubectl(plan.settings.kubernetes.namespace, plan.settings.kubernetes.context, environ)


check_machine = find_kubectl


def describe(plan: Plan, parallel: int = 0) -> str:
    """Return the Jobs in order, as they are applied. The claim is not included, so that deleting these objects keeps the data.

    Raise a SettingsError for a plan that no cluster can run.
    """
    check_names(plan)
    check_runs(plan.settings.kubernetes.runs_path)
    return to_yaml(objects(plan, parallel)).rstrip("\n")


def objects(plan: Plan, parallel: int = 0) -> list[Object]:
    return [job_manifest(plan, task, parallel) for task in plan_tasks(plan)]


def results(plan: Plan) -> str:
    """Return the scores of the run, the location of its files, and the command that copies them."""
    section, scores = plan.settings.kubernetes, read_pod_scores(plan)
    place = f"the run is at {section.runs_path.rstrip('/')}/{plan.run}"
    if section.runs_path == RUNS:
        options = kubectl_options(section.namespace, section.context)
        copy = shlex.join(["kubectl", *options, "cp", f"fivefold-loader:{RUNS}/{plan.run}", str(plan.folder)])
        place = (
            f"the run is in {RUNS}/{plan.run} of the claim {section.pvc}; "
            f"to copy it, start the pod of k8s/loader-pod.yaml and run:\n{copy}"
        )
    return f"{scores}\n\n{place}" if scores else place


def read_pod_scores(plan: Plan) -> str:
    """Return the scores that the pods of `evaluate` printed, as a table, or an empty text if another process followed their logs."""
    table = [("", "accuracy", "logloss", "rows")]
    for step in [step for step in plan.steps if step.stage == "evaluate"]:
        printed = [line for line in read_lines(step.folder / LOG) if line.startswith('{"')]
        for rows, scores in json.loads(printed[-1]).items() if printed else ():
            models = {"oof": "folds"}.get(rows, "ensemble") if step.name == "evaluate" else "student"
            cells = ["-" if scores[key] is None else f"{scores[key]:.4f}" for key in ("accuracy", "logloss")]
            table.append((models, *cells, f"{ROWS[rows]}, {scores['n']}"))
    return format_table(table, numbers=(1, 2)) if len(table) > 1 else ""


class KubernetesBackend:
    """Run each Task as a Job of the cluster. Jobs continue without this process, and a later process finds them."""

    def __init__(self, plan: Plan, parallel: int, kubectl: Kubectl) -> None:
        self.plan, self.parallel, self.kubectl = plan, parallel, kubectl
        self._selector = f"{RUN}={plan.run}"
        self._command_prefix = shlex.join(["kubectl", *kubectl.where])
        self._initial: dict[str, Object] | None = None
        self._followed: set[str] = set()
        self._skipped: set[str] = set()
        self._printed: set[str] = set()
        self._failures: dict[str, str] = {}
        self._lines: dict[str, list[str]] = {}
        self._copied: set[str] = set()

    def start(self, task: Task) -> None:
        """Do nothing: `poll` applies the Job, because the Scheduler retries `poll` if the cluster is unavailable."""

    def poll(self, running: Sequence[Task]) -> dict[str, int]:
        if self._initial is None:
            self._initial = self._find_jobs()
        for task in running:
            if task.name not in self._followed | self._skipped:
                self._apply_or_follow(task, self._initial.get(self._job_name(task)))
        jobs, pods = self._list_objects()
        followed = [task for task in running if task.name in self._followed]
        codes = {task.name: self._poll_job(task, jobs.get(self._job_name(task)), pods) for task in followed}
        skipped = {task.name: 0 for task in running if task.name in self._skipped}
        return skipped | {name: code for name, code in codes.items() if code is not None}

    def stop(self, running: Sequence[Task], number: int, again: bool) -> bool:
        """Leave the Jobs in the cluster, and print how to follow and how to delete them."""
        if names := ", ".join(self._job_name(task) for task in running if task.name in self._followed):
            write_line(
                f"no longer following {names} of {self.plan.run} in the cluster\n  the same command follows them again; "
                f"to delete them: {self._command_prefix} delete jobs --selector {self._selector}"
            )
        return False

    def describe(self, task: Task) -> str:
        return self._failures.get(task.name, "")

    def _job_name(self, task: Task) -> str:
        return job_name(self.plan.run, task.name)

    def _list_objects(self) -> tuple[dict[str, Object], list[Object]]:
        """Return the run's Jobs by name, and its pods."""
        objects = self.kubectl.items("jobs,pods", self._selector)
        jobs = {item["metadata"]["name"]: item for item in objects if item["kind"] == "Job"}
        return jobs, [item for item in objects if item["kind"] == "Pod"]

    def _has_same_request(self, task: Task, present: Object) -> bool:
        return extract_request(present) == extract_request(job_manifest(self.plan, task, self.parallel))

    def _find_jobs(self) -> dict[str, Object]:
        """Return the run's existing Jobs before anything is applied. Raise a SettingsError if pods run with other settings."""
        jobs, pods = self._list_objects()
        for task in plan_tasks(self.plan):
            name, present = self._job_name(task), jobs.get(self._job_name(task))
            if present is None or _is_over(present) or self._has_same_request(task, present):
                continue
            if any(map(cluster.has_started, cluster.pods_of_job(pods, present))):
                raise SettingsError(
                    f"the Job {name} runs with other settings or resources: wait for it, use another run=, or "
                    f"{self._command_prefix} delete job {name}"
                )
        return jobs

    def _apply_or_follow(self, task: Task, present: Object | None) -> None:
        """Apply a Job, or handle the existing one: skip it if done, follow it if it runs, else replace it."""
        name, manifest = self._job_name(task), job_manifest(self.plan, task, self.parallel)
        done = present is not None and cluster.condition(present, "Complete")
        if present is None:
            self._apply_claim(manifest)
            self.kubectl.apply(manifest)
            write_line(f"{name}: applied")
        elif not _is_over(present) and self._has_same_request(task, present):
            write_line(f"{name} exists and runs: following it")
        elif done and extract_work(present) == extract_work(manifest) and self._skipped.issuperset(task.needs):
            write_line(
                f"{name} exists and is done: skipped; {self._command_prefix} delete job {name} lets it run again"
            )
            self._skipped.add(task.name)
            return
        else:
            self.kubectl.replace(manifest)
            failed = "had failed" if cluster.condition(present, "Failed") else "had not started and had other settings"
            write_line(f"{name} {'was done with other settings or inputs' if done else failed}: replaced")
        self._followed.add(task.name)

    def _apply_claim(self, manifest: Mapping[str, Any]) -> None:
        pods, volumes = self.plan.settings.kubernetes, manifest["spec"]["template"]["spec"]["volumes"]
        needs_claim = any("persistentVolumeClaim" in volume for volume in volumes)
        if needs_claim and not self.kubectl.has("persistentvolumeclaim", pods.pvc):
            self.kubectl.apply(claim_manifest(pods))
            write_line(f"claim {pods.pvc}: applied")

    def _poll_job(self, task: Task, job: Object | None, pods: Sequence[Object]) -> int | None:
        """Print new events of a Job and of its pods. Return its exit code if it has ended, else None."""
        name = self._job_name(task)
        if job is None:
            self._failures[task.name] = f"the Job {name} was deleted"
            return RetryableError.exit_code
        own_pods = cluster.pods_of_job(pods, job)
        for pod in own_pods:
            step = task.steps[cluster.read_pod_index(pod) or 0]
            self._copy_log(pod, step)
            if reason := cluster.pending_reason(pod):
                self._print_once(f"{step.name} waits: {reason}", reason)
            if ending := cluster.pod_exit(pod):
                self._print_once(f"{step.name}, pod {ending.pod}, {ending.verb}: {ending}", ending.pod)
        failed = cluster.condition(job, "Failed")
        if not _is_over(job):
            if cluster.lacks_pods(job, own_pods) and (reason := self.kubectl.why_no_pod(job["metadata"]["uid"])):
                self._print_once(f"{name} waits: {reason}", cluster.normalize_event(reason))
            return None
        if failed is None:
            self._print_once(f"{name}: done", job["metadata"]["uid"])
            return 0
        last = cluster.final_exits(own_pods)
        reasons = [f"\n  {task.steps[ending.index or 0].name}: {ending}" for ending in last]
        self._failures[task.name] = f"the Job {name}, {failed.get('reason', 'unknown')}{''.join(reasons)}"
        return cluster.exit_code(last)

    def _copy_log(self, pod: Mapping[str, Any], step: Step) -> None:
        """Copy the new lines of a pod's log to the terminal and to the step's log, which may have lines of an earlier command."""
        name, log = pod["metadata"]["name"], step.folder / LOG
        if name in self._copied or not cluster.has_started(pod):
            return
        try:
            text = self.kubectl.run("logs", name, "--container", CONTAINER).rstrip("\n")
        except RetryableError:  # the next poll reads the log again
            return
        except SettingsError as error:
            self._print_once(f"cannot read the log of {step.name}: {error}", "logs")
            return
        lines, title = text.split("\n") if text else [], f"pod {name}"
        if new := find_new_lines(lines, self._lines.get(name) or read_lines(log, title)):
            append_lines(log, title, new)
            write_output(step.name, new)
            self._lines[name] = lines
        if cluster.has_ended(pod):
            self._copied.add(name)

    def _print_once(self, text: str, key: str) -> None:
        if key not in self._printed:
            self._printed.add(key)
            write_line(text)


def extract_work(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the work of a Job: its image, arguments, variables and number of folds."""
    container = cluster.find_container(manifest["spec"]["template"])
    values = {variable["name"]: variable["value"] for variable in container.get("env", []) if "value" in variable}
    return container.get("image"), container.get("args"), values, manifest["spec"].get("completions") or 1


def extract_request(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the work of a Job, and its resources, service account and queue as they were applied."""
    text = manifest["metadata"].get("annotations", {}).get(LAST_APPLIED)
    applied = json.loads(text) if text else manifest  # the cluster's own has 1Gi for 1024Mi
    template, queue = applied["spec"]["template"], applied["metadata"].get("labels", {}).get(QUEUE)
    resources = cluster.find_container(template).get("resources")
    return *extract_work(manifest), resources, template["spec"].get("serviceAccountName"), queue


def _is_over(job: Mapping[str, Any]) -> bool:
    return any(cluster.condition(job, kind) for kind in ("Complete", "Failed"))
