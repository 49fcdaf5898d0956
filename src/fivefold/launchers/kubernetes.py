"""Runs a plan on Kubernetes by the user's kubectl: a step's Job is applied when those that it needs are done.

What is in the cluster stays there when this process ends: the same command looks at it and goes on.
"""

import logging
import os
from collections.abc import Mapping

from fivefold.launchers.crew import Signals
from fivefold.launchers.fleet import Fleet
from fivefold.launchers.kubectl import Kubectl
from fivefold.launchers.manifests import Object, Pods, claim, job
from fivefold.launchers.plan import Plan
from fivefold.launchers.tasks import DATA, RUNS, check_names, check_runs, tasks_of
from fivefold.launchers.yaml_text import as_yaml

log = logging.getLogger("fivefold")


def launch(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Runs the plan's Jobs in the cluster; 0, or the exit code of the first that failed: its pod's, or 75.

    130 or 143 after SIGINT or SIGTERM: the Jobs go on, and are no longer followed.
    """
    check(plan)
    pods, section = pods_of(plan, parallel), plan.settings.kubernetes
    kubectl = Kubectl(section.namespace, section.context, environ)
    with Signals() as signals:
        return Fleet(plan, pods, kubectl, section.poll_seconds).work(signals)


def describe(plan: Plan, parallel: int = 0) -> str:
    """The plan as what is applied: the claim, if pods need it, and the Jobs in order."""
    check(plan)
    return as_yaml(objects(plan, pods_of(plan, parallel))).rstrip("\n")


def objects(plan: Plan, pods: Pods) -> list[Object]:
    jobs = [job(plan, task, pods) for task in tasks_of(plan)]
    return [*([claim(pods)] if any(has_claim(one) for one in jobs) else []), *jobs]


def has_claim(one: Object) -> bool:
    return any("persistentVolumeClaim" in volume for volume in one["spec"]["template"]["spec"]["volumes"])


def check(plan: Plan) -> None:
    """Raises a SettingsError for what no cluster could run, before anything is written."""
    check_names(plan)
    check_runs(plan.settings.kubernetes.runs)


def pods_of(plan: Plan, parallel: int = 0) -> Pods:
    section = plan.settings.kubernetes
    return Pods(
        image=section.image,
        claim=section.claim,
        runs=section.runs,
        gpus=section.gpus,
        cpus=section.cpus,
        memory=section.memory,
        service_account=section.service_account,
        queue=section.queue,
        parallel=parallel,
    )


def results(plan: Plan) -> str:
    """Where the run's files are, and how to get them."""
    section = plan.settings.kubernetes
    if section.runs != RUNS:
        return f"the run is at {section.runs.rstrip('/')}/{plan.run}"
    return (
        f"the run is in {RUNS}/{plan.run} of the claim {section.claim}; beside a pod of k8s/loader-pod.yaml:\n"
        f"kubectl cp fivefold-loader:{RUNS}/{plan.run} {plan.folder}    ({DATA} and {RUNS} are there)"
    )
