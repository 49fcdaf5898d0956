"""A plan for engines on a cluster: Argo's Workflow of all its steps, and Kubeflow Trainer's TrainJob of one fold on several machines."""

from fivefold.launchers.manifests import (
    NAME,
    PERMANENT,
    RETRIES,
    RUN,
    SECONDS_KEPT,
    SECONDS_OF_GRACE,
    TASK,
    Object,
    Pods,
    environment,
    pod,
)
from fivefold.launchers.plan import Plan
from fivefold.launchers.tasks import Task, job_name, tasks_of

COMMAND = ["python", "-m", "jobs"]
ACCOUNT = "fivefold-workflow"
RUNTIME = "fivefold"
NODE = "node"
"""What Kubeflow Trainer calls the pods that train, and their container."""
NODES = 2


def workflow(plan: Plan, pods: Pods, recipe: str) -> list[Object]:
    """The whole graph as a Workflow with the parameters `image`, `run`, `recipe` and `folds`; the account that it runs as.

    Argo's own container in each pod writes what became of the step, so these pods are given the account's token.
    """
    tasks = tasks_of(plan)
    folds = next((len(task.steps) for task in tasks if task.indexed), 1)
    values = {"image": pods.image, "run": plan.run, "recipe": recipe, "folds": str(folds)}
    whole = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"name": f"fivefold-{plan.run}", "labels": {NAME: "fivefold", RUN: plan.run}},
        "spec": {
            "entrypoint": "run",
            "serviceAccountName": ACCOUNT,
            "arguments": {"parameters": [{"name": name, "value": value} for name, value in values.items()]},
            "securityContext": pod(tasks[0], pods)["securityContext"],
            "podSpecPatch": f"enableServiceLinks: false\nterminationGracePeriodSeconds: {SECONDS_OF_GRACE}\n",
            "ttlStrategy": {"secondsAfterCompletion": SECONDS_KEPT},
            "volumes": pod(tasks[0], pods)["volumes"],
            "templates": [_graph(tasks), *(_template(task, pods) for task in tasks)],
        },
    }
    return [*_account(), whole]


def _graph(tasks: list[Task]) -> Object:
    """The steps with what each needs; a fold that failed stops no other."""
    return {"name": "run", "dag": {"failFast": False, "tasks": [_node(task) for task in tasks]}}


def _node(task: Task) -> Object:
    each_fold = {
        "arguments": {"parameters": [{"name": "fold", "value": "{{item}}"}]},
        "withSequence": {"count": _parameter("folds")},
    }
    needs = {"dependencies": list(task.needs)} if task.needs else {}
    return {"name": task.name, "template": task.name, **needs, **(each_fold if task.indexed else {})}


def _template(task: Task, pods: Pods) -> Object:
    """A step's container, tried again unless its exit code would come again."""
    own = pod(task, pods)
    container = {key: value for key, value in own["containers"][0].items() if key != "name"}
    asked = [text if not text.startswith("recipe=") else f"recipe={_parameter('recipe')}" for text in container["args"]]
    # the number of folds stands in one place: what split makes is what is trained
    asked += [f"split.folds={_parameter('folds')}"] if task.stage == "split" else []
    each = {"FOLD": "{{inputs.parameters.fold}}"} if task.indexed else {}
    variables = each | {entry["name"]: entry.get("value", "") for entry in container.pop("env")} | each
    env = [{"name": name, "value": value} for name, value in (variables | {"RUN": _parameter("run")}).items()]
    named = {"image": _parameter("image"), "command": COMMAND, "args": asked, "env": env}
    fold = {"inputs": {"parameters": [{"name": "fold"}]}} if task.indexed else {}
    return {
        "name": task.name,
        **fold,
        "metadata": {"labels": {NAME: "fivefold", RUN: _parameter("run"), TASK: task.name}},
        **({"tolerations": own["tolerations"]} if "tolerations" in own else {}),
        "retryStrategy": {
            "limit": RETRIES,
            "retryPolicy": "Always",
            "expression": f"!(asInt(lastRetry.exitCode) in {PERMANENT})",
        },
        "container": container | named,
    }


def _parameter(name: str) -> str:
    return f"{{{{workflow.parameters.{name}}}}}"


def _account() -> list[Object]:
    """The account of the workflow's pods, which may write down what became of their steps and nothing else."""
    metadata = {"name": ACCOUNT, "labels": {NAME: "fivefold"}}
    rule = {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}
    rbac = "rbac.authorization.k8s.io"
    role = {"apiGroup": rbac, "kind": "Role", "name": ACCOUNT}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": metadata, "rules": [rule]},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT}],
        },
    ]


def train_job(plan: Plan, pods: Pods, fold: int) -> list[Object]:
    """One fold as a TrainJob on NODES machines, and the TrainingRuntime whose pods these are."""
    step = next(step for step in plan.steps if step.fold == fold)
    task = Task(step.name, (step,), ())
    container = pod(task, pods)["containers"][0]
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job_name(plan.run, task.name), "labels": {NAME: "fivefold", RUN: plan.run}},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {
                "numNodes": NODES,
                "image": pods.image,
                "command": COMMAND,
                "args": container["args"],
                "env": environment(task, pods),
                "resourcesPerNode": container["resources"],
            },
        },
    }
    return [_runtime(task, pods), job]


def _runtime(task: Task, pods: Pods) -> Object:
    """Pods as a fold's Job has them. When one is lost all start again, and go on from the checkpoint."""
    own = pod(task, pods)
    container = {key: value for key, value in own["containers"][0].items() if key not in ("args", "env", "resources")}
    permanent = {"containerName": NODE, "operator": "In", "values": PERMANENT}
    node_job = {
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": permanent}]},
        "template": {"spec": {**own, "containers": [{**container, "name": NODE}]}},
    }
    trainer = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    at_once = {"name": "permanent", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": RUNTIME, "labels": {NAME: "fivefold", "trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": NODES, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": {"maxRestarts": RETRIES, "rules": [at_once]},
                    "replicatedJobs": [{"name": NODE, "template": {"metadata": {"labels": trainer}, "spec": node_job}}],
                }
            },
        },
    }
