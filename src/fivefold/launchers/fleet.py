"""The Jobs of one plan in a cluster: which wait, which run, what their pods say, how they ended."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fivefold.errors import FivefoldError, RetryableError, SettingsError
from fivefold.launchers import endings
from fivefold.launchers.crew import Signals
from fivefold.launchers.kubectl import Kubectl
from fivefold.launchers.logs import Logs
from fivefold.launchers.manifests import CONTAINER, RUN, Object, Pods, claim, job
from fivefold.launchers.plan import Plan
from fivefold.launchers.screen import Screen
from fivefold.launchers.tasks import Task, job_name, tasks_of

LOOKS_WITHOUT_ANSWER = 10
SECONDS_BETWEEN_SIGNS = 0.05


class Fleet:
    """The Jobs of one plan; one is applied when all that it needs are done."""

    def __init__(self, plan: Plan, pods: Pods, kubectl: Kubectl, seconds: float) -> None:
        """`seconds` between two looks at the cluster."""
        self.plan, self.pods, self.kubectl, self.seconds = plan, pods, kubectl, seconds
        self.waiting = tasks_of(plan)
        self.running: dict[str, Task] = {}
        self.ended: dict[str, int] = {}
        self.there: dict[str, Object] = {}
        self.screen = Screen()
        self.logs = Logs(kubectl, self.screen)
        self._selector = f"{RUN}={plan.run}"
        self._skipped: set[str] = set()
        self._said: set[str] = set()
        self._unanswered = 0

    def work(self, signals: Signals) -> int:
        """Runs all there is to run; 130 or 143 after a signal, and the Jobs go on without this process."""
        try:
            self._work(signals)
        except FivefoldError:
            self._name_what_goes_on()
            raise
        finally:
            self.logs.stop()
        if signals.received:
            self._name_what_goes_on()
            return 128 + signals.received[0]
        self._name_what_was_not_started()
        return next((code for code in self.ended.values() if code), 0)

    def _work(self, signals: Signals) -> None:
        self.there = {one["metadata"]["name"]: one for one in self.kubectl.items("jobs", self._selector)}
        self._refuse_others()
        while (self.running or self._ready()) and not signals.received:
            for task in self._ready():
                self._start(task)
            self._look()
            self._wait(signals)

    def _refuse_others(self) -> None:
        """Raises a SettingsError where a Job of the plan runs with other arguments, before anything is applied."""
        for task in self.waiting:
            found = self.there.get(job_name(self.plan.run, task.name))
            if found and not _is_over(found) and not same(found, job(self.plan, task, self.pods)):
                name = found["metadata"]["name"]
                raise SettingsError(
                    f"the Job {name} runs with other settings: wait for it, give another run=, or kubectl delete job {name}"
                )

    def _ready(self) -> list[Task]:
        return [task for task in self.waiting if all(self.ended.get(name) == 0 for name in task.needs)]

    def _start(self, task: Task) -> None:
        """Applies a Job, or goes on with the one that is there: done, running, or failed and made anew."""
        self.waiting.remove(task)
        wanted = job(self.plan, task, self.pods)
        name = wanted["metadata"]["name"]
        found = self.there.get(name)
        if found is None:
            self._make_claim(wanted)
            self.kubectl.apply(wanted)
            self.screen.line(f"{name}: applied")
        elif not _is_over(found):
            self.screen.line(f"{name} is there and runs: it is followed")
        elif endings.condition(found, "Complete") and same(found, wanted) and self._skipped.issuperset(task.needs):
            self.screen.line(f"{name} is there and done: skipped; kubectl delete job {name} has it run again")
            self._skipped.add(task.name)
            self.ended[task.name] = 0
            return
        else:
            self.kubectl.replace(wanted)
            why = "had failed" if endings.condition(found, "Failed") else "was done with other settings or inputs"
            self.screen.line(f"{name} {why}: replaced")
        self.running[task.name] = task

    def _make_claim(self, wanted: Mapping[str, Any]) -> None:
        volumes = wanted["spec"]["template"]["spec"]["volumes"]
        if not any("persistentVolumeClaim" in volume for volume in volumes):
            return
        if not self.kubectl.has("persistentvolumeclaim", self.pods.claim):
            self.kubectl.apply(claim(self.pods))
            self.screen.line(f"claim {self.pods.claim}: applied")

    def _look(self) -> None:
        """Asks the cluster, a few times in vain, and says what is new."""
        try:
            found = self.kubectl.items("jobs,pods", self._selector)
        except RetryableError as error:
            self._unanswered += 1
            if self._unanswered == 1:
                self.screen.line(f"{error}; asking again")
            if self._unanswered >= LOOKS_WITHOUT_ANSWER:
                raise
            return
        self._unanswered = 0
        jobs = {one["metadata"]["name"]: one for one in found if one["kind"] == "Job"}
        pods = [one for one in found if one["kind"] == "Pod"]
        for task in list(self.running.values()):
            own = jobs.get(job_name(self.plan.run, task.name))
            if own is None:
                self._end(task, RetryableError.exit_code, "its Job was deleted")
            else:
                self._tell(task, own, endings.pods_of_job(pods, own))

    def _tell(self, task: Task, found: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> None:
        for pod in pods:
            step = task.steps[endings.index_of(pod) or 0]
            self.logs.follow(pod, step)
            if reason := endings.waits_for(pod):
                self._say_once(f"{step.name} waits: {reason}", reason)
            if failed := endings.ending(pod):
                self._say_once(f"{step.name}, pod {failed.pod}, failed: {failed}", failed.pod)
        if endings.condition(found, "Complete"):
            self.logs.finish(pods)
            self._end(task, 0, "done")
        elif why := endings.condition(found, "Failed"):
            self.logs.finish(pods)
            last = endings.last_endings(found, pods)
            named = [f"\n  {task.steps[each.index or 0].name}: {each}" for each in last]
            self._end(task, endings.exit_code(last), f"failed ({why.get('reason', 'unknown')}){''.join(named)}")

    def _end(self, task: Task, code: int, words: str) -> None:
        del self.running[task.name]
        self.ended[task.name] = code
        with_code = f"; exit code {code}" if code else ""
        self.screen.line(f"{job_name(self.plan.run, task.name)}: {words}{with_code}")

    def _say_once(self, text: str, key: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self.screen.line(text)

    def _wait(self, signals: Signals) -> None:
        until = time.monotonic() + self.seconds
        while self.running and not signals.received and time.monotonic() < until:
            time.sleep(min(self.seconds, SECONDS_BETWEEN_SIGNS))

    def _name_what_goes_on(self) -> None:
        """Says what the cluster goes on with alone, how to follow it again and how to end it."""
        going = ", ".join(job_name(self.plan.run, name) for name in self.running) or "no Job"
        waiting = f"; not applied yet: {', '.join(task.name for task in self.waiting)}" if self.waiting else ""
        where = " ".join(["kubectl", *self.kubectl.where])
        self.screen.line(
            f"no longer followed: {going} of {self.plan.run} in the cluster{waiting}\n"
            f"  the same command goes on; to end them: {where} delete jobs --selector {self._selector}"
        )

    def _name_what_was_not_started(self) -> None:
        for task in self.waiting:
            because = [name for name in task.needs if self.ended.get(name) != 0]
            self.screen.line(f"{task.name} was not started: it needs {', '.join(because)}")


def same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a Job in the cluster does what the plan wants: its image, arguments and variables, for as many folds."""
    return _what_it_does(found) == _what_it_does(wanted)


def _what_it_does(one: Mapping[str, Any]) -> tuple[Any, ...]:
    containers = one["spec"]["template"]["spec"]["containers"]
    container = next((each for each in containers if each["name"] == CONTAINER), {})
    values = {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
    return container.get("image"), container.get("args"), values, one["spec"].get("completions") or 1


def _is_over(one: Mapping[str, Any]) -> bool:
    return any(endings.condition(one, kind) for kind in ("Complete", "Failed"))
