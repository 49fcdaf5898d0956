"""The files of `k8s/` and what `submit platform=kubernetes` renders: the same, what a cluster takes, what the plan says."""

import copy
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

import kubernetes_schemas as rules
from fivefold.contract.run_layout import env_for_run
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.kubernetes import launch as kubernetes
from fivefold.launchers.kubernetes.manifests import (
    INDEX,
    NON_RETRYABLE_CODES,
    check_inputs,
    check_names,
    check_runs,
    job_manifest,
    job_name,
    plan_tasks,
    render_files,
    to_yaml,
)
from fivefold.launchers.plan import Inputs, Plan, Step, make_plan, select

K8S = Path(__file__).parents[3] / "k8s"
FILES = sorted(path.relative_to(K8S).as_posix() for path in K8S.rglob("*.yaml"))
OBJECTS = [name for name in FILES if not name.endswith("kustomization.yaml")]
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None and not os.environ.get("CI"), reason="kubectl is not here; CI has it by .ci/kubectl"
)


def plan_of(*overrides: str, inputs: Inputs | None = None, run: str = "first", **more: Any) -> Plan:
    inputs = inputs or Inputs("/data/train", "/data/eval", truth_unknown=True)
    return make_plan(inputs, overrides, run=run, recipe="small_images", **more)


def expanded(one: dict[str, Any], index: int | None = None, **given: str) -> dict[str, str]:
    """A container's variables as Kubernetes gives them: each may be made of those before it."""
    found = dict(given)
    for entry in one["spec"]["template"]["spec"]["containers"][0]["env"]:
        value = entry.get("value")
        if value is None:
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": INDEX}}
            value = str(index)
        found[entry["name"]] = rules.expand(value, found)
    return found


# what is shipped


def test_rendered_files_are_up_to_date_and_those_that_submit_renders() -> None:
    assert {name: (K8S / name).read_text("utf-8") for name in render_files()} == render_files(), (
        "make manifests writes them anew"
    )
    names = [f"{task.name}-job.yaml" for task in plan_tasks(plan_of())]
    assert {*names, "pvc.yaml"} == set(render_files())
    shipped = [one for name in names for one in rules.read(K8S / name)]
    assert list(yaml.safe_load_all(kubernetes.describe(plan_of()))) == shipped


def accept(one: dict[str, Any]) -> None:
    """Raises an error for an object that a cluster would refuse, or that is not within the restricted standard."""
    for version in rules.VERSIONS:
        rules.check(one, version)
    assert [*rules.against_the_server(one)] == []
    assert [found for spec in rules.pod_specs(one) for found in rules.against_restricted(spec)] == []


@pytest.mark.parametrize("name", OBJECTS)
def test_a_cluster_takes_every_object(name: str) -> None:
    assert rules.VERSIONS == ["1.33.0", "1.37.0"]
    for one in rules.read(K8S / name):
        accept(one)


ELSEWHERE = (
    "kubernetes.runs_path=s3://a/b",
    "kubernetes.gpus=0",
    "kubernetes.queue=q",
    "kubernetes.service_account=me",
)


def test_a_cluster_takes_all_that_submit_may_render() -> None:
    for plan in (plan_of(seeds=[1, 2], run="a" * 32), select(plan_of(), (), [3]), plan_of(*ELSEWHERE, run="Run_2.0")):
        for one in kubernetes.objects(plan, parallel=2):
            accept(one)


def test_the_claim_stands_in_a_file_of_its_own() -> None:
    """What deletes the objects of another file, or of a kustomization, must not delete the data."""
    kinds = {name: {one["kind"] for one in rules.read(K8S / name)} for name in OBJECTS}
    assert [name for name in kinds if "PersistentVolumeClaim" in kinds[name]] == ["pvc.yaml"]
    assert "pvc.yaml" not in yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]
    assert {one["kind"] for one in yaml.safe_load_all(kubernetes.describe(plan_of()))} == {"Job"}, "of --dry-run"


@pytest.mark.parametrize(
    ("conditions", "code"),
    [("SuccessCriteriaMet Complete", 0), ("FailureTarget Failed", 1), ("Suspended SuccessCriteriaMet Complete", 0)],
)
def test_loops_in_the_docs_end_with_the_job(tmp_path: Path, conditions: str, code: int) -> None:
    """`kubectl wait --for=condition=complete` would wait its whole time for a Job that failed."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$1 $(wc -l < {tmp_path}/calls)" in
    "get 2") echo FailureTarget SuccessCriteriaMet Suspended ;; # pods still run
    get*) echo {conditions} ;;
esac
""")
    kubectl.chmod(0o755)
    text = (K8S.parent / "docs/kubernetes.md").read_text("utf-8")
    (loop,) = re.findall(r"(?ms)^for stage in .*?^done$", text)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = loop.replace("sleep 10", "sleep 0").replace("break", "exit 1")
    assert subprocess.run(["sh", "-c", script], env=environ, timeout=60).returncode == code
    stages = [call.split("-")[1] for call in (tmp_path / "calls").read_text().splitlines() if call.startswith("apply")]
    assert len(stages) == (1 if code else 7)


def test_no_shipped_text_waits_for_one_end_of_a_job() -> None:
    texts = [*K8S.rglob("*.yaml"), K8S.parent / "README.md", *(K8S.parent / "docs").glob("*.md")]
    assert [path.name for path in texts if "--for=condition=complete" in path.read_text("utf-8")] == []


FOLDS, WORKFLOW, TRAINER = "train-folds-job.yaml", "contrib/workflow.yaml", "contrib/trainjob.yaml"
SPOILT = [
    (FOLDS, lambda one: pod_of(one).update(tollerations=[])),
    (WORKFLOW, lambda one: one["spec"]["templates"][1]["retryStrategy"].update(limmit=1)),
    (TRAINER, lambda one: one["spec"].update(limmit=1)),
    (FOLDS, lambda one: pod_of(one)["securityContext"].pop("runAsNonRoot")),
    (FOLDS, lambda one: one["spec"].pop("backoffLimitPerIndex")),
    (FOLDS, lambda one: container_of(one).update(name="other")),
    (FOLDS, lambda one: pod_of(one)["volumes"].pop()),
]


def pod_of(one: dict[str, Any]) -> dict[str, Any]:
    return rules.pod_specs(one)[0]


def container_of(one: dict[str, Any]) -> dict[str, Any]:
    return pod_of(one)["containers"][0]


@pytest.mark.parametrize(("name", "spoil"), SPOILT)
def test_an_object_that_a_cluster_would_refuse_is_found(name: str, spoil: Any) -> None:
    kind = {FOLDS: "Job", WORKFLOW: "Workflow", TRAINER: "TrainingRuntime"}[name]
    one = next(one for one in rules.read(K8S / name) if one["kind"] == kind)
    spoil(one)
    with pytest.raises((ValidationError, AssertionError)):
        accept(one)


def test_every_container_has_a_limit_of_memory_and_the_service_one_of_cpus() -> None:
    for name in OBJECTS:
        for one in rules.read(K8S / name):
            for spec in rules.pod_specs(one) if one["kind"] != "TrainingRuntime" else []:  # the TrainJob has them
                assert spec["containers"][0]["resources"]["limits"]["memory"], name
    *_, train_job = rules.read(K8S / TRAINER)
    assert train_job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"]
    service = next(one for one in rules.read(K8S / "serve-deployment.yaml") if one["kind"] == "Deployment")
    assert container_of(service)["resources"]["limits"]["cpu"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a selector takes an object with these labels."""
    asked = {"Exists": lambda key, _: key in labels, "DoesNotExist": lambda key, _: key not in labels}
    asked["NotIn"] = lambda key, values: labels.get(key) not in values
    expressions = selector.get("matchExpressions", [])
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        asked[each["operator"]](each["key"], each.get("values")) for each in expressions
    )


def test_policies_take_the_pods_that_they_are_of() -> None:
    jobs, serve, hosts = (one["spec"] for one in rules.read(K8S / "network-policy.yaml"))
    service, deployment, budget = rules.read(K8S / "serve-deployment.yaml")
    for task in plan_tasks(plan_of()):
        labels = job_manifest(plan_of(), task)["spec"]["template"]["metadata"]["labels"]
        assert (selects(jobs["podSelector"], labels), selects(serve["podSelector"], labels)) == (True, False)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert (selects(jobs["podSelector"], labels), selects(serve["podSelector"], labels)) == (False, True)
    assert serve["ingress"][0]["ports"][0]["port"] == service["spec"]["ports"][0]["targetPort"]
    assert "ingress" not in jobs
    assert selects(budget["spec"]["selector"], labels)
    (loader,) = rules.read(K8S / "loader-pod.yaml")
    *_, workflow = rules.read(K8S / WORKFLOW)
    of_argo = {
        **workflow["spec"]["templates"][1]["metadata"]["labels"],
        "workflows.argoproj.io/workflow": "fivefold-first",
    }
    assert not any(selects(jobs["podSelector"], labels) for labels in (loader["metadata"]["labels"], of_argo))
    # JobSet, which a TrainJob becomes, says in a label of each pod which one it is of
    runtime, _ = rules.read(K8S / TRAINER)
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    of_trainer = {**node["template"]["spec"]["template"]["metadata"]["labels"], "jobset.sigs.k8s.io/jobset-name": "x"}
    assert [selects(each["podSelector"], of_trainer) for each in (jobs, serve, hosts)] == [False, False, True]
    assert [each["from"] for each in hosts["ingress"]] == [[{"podSelector": hosts["podSelector"]}]]
    assert not any(selects(hosts["podSelector"], each) for each in (labels, loader["metadata"]["labels"], of_argo))


# what a Job does is what the plan says


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs in which the run `first` has what a stage looks for."""
    for place in ("split/output", "ensemble/output", "ensemble-student/output", "distill/model"):
        (tmp_path / "first" / place).mkdir(parents=True)
    return tmp_path


def as_seen(step: Step, variables: dict[str, str], fold: int | None) -> dict[str, str]:
    """The SM_* variables that a stage has in the end, with those that it finds in its run by itself."""
    found = env_for_run(STAGES[step.stage], variables, f"{variables['RUNS']}/{variables['RUN']}", fold)
    return {name: value for name, value in found.items() if name.startswith("SM_") and value}


def test_every_pod_sees_what_its_step_sees(runs: Path) -> None:
    plan = plan_of(f"kubernetes.runs_path={runs}", seeds=[42, 43], runs=str(runs))
    for task in plan_tasks(plan):
        one = job_manifest(plan, task)
        for index, step in enumerate(task.steps):
            variables = {**expanded(one, index), "JOB_COMPLETION_INDEX": str(index)}
            fold = index if task.indexed else None
            assert as_seen(step, variables, fold) == step.environment, step.name
            container = one["spec"]["template"]["spec"]["containers"][0]
            assert [*container["args"], *([f"FOLD={index}"] if task.indexed else [])] == list(step.command)
    assert [task.name for task in plan_tasks(plan)][1:3] == ["train-folds", "train-folds-seed-43"]


def test_runs_at_a_store_are_urls_and_no_folder(runs: Path) -> None:
    plan = plan_of("kubernetes.runs_path=s3://cars/runs/", seeds=[42, 43])
    for task in plan_tasks(plan):
        found = expanded(job_manifest(plan, task), 1)
        assert found["RUNS"] == "s3://cars/runs"
        assert "SM_OUTPUT_DIR" not in found
        own = {value for name, value in found.items() if name.startswith("SM_") and not value.startswith("/data")}
        assert all(value.startswith("s3://cars/runs/first/") for value in own)


def test_folds_are_tried_again_alone_unless_their_exit_code_comes_again() -> None:
    plan = plan_of()
    spec = job_manifest(plan, plan_tasks(plan)[1])["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 5, 5)
    assert [job_manifest(plan, plan_tasks(plan)[1], parallel)["spec"]["parallelism"] for parallel in (2, 9)] == [2, 5]
    assert (spec["backoffLimitPerIndex"], spec["podReplacementPolicy"]) == (2, "Failed")
    assert "maxFailedIndexes" not in spec
    drained, permanent = spec["podFailurePolicy"]["rules"]
    assert (drained["action"], permanent["action"]) == ("Ignore", "FailIndex")
    assert permanent["onExitCodes"]["values"] == NON_RETRYABLE_CODES == [64, 65, 66, 137]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 120


def test_some_folds_are_jobs_of_their_own_and_the_first_ones_are_one() -> None:
    plan = select(plan_of(), (), [1, 3])
    named = {task.name: task for task in plan_tasks(plan)}
    assert list(named) == ["split", "fold-1", "fold-3"]
    one = job_manifest(plan, named["fold-3"])
    assert "completionMode" not in one["spec"]
    assert one["spec"]["podFailurePolicy"]["rules"][1]["action"] == "FailJob"
    assert "FOLD=3" in container_of(one)["args"]
    assert "FOLD" not in expanded(one)
    first = select(plan_of(), (), [0, 1])
    assert job_manifest(first, plan_tasks(first)[1])["spec"]["completions"] == 2


def test_only_training_and_prediction_ask_for_a_gpu() -> None:
    plan = plan_of("kubernetes.gpus=2")
    for task in plan_tasks(plan):
        spec = job_manifest(plan, task)["spec"]["template"]["spec"]
        wanted = {"nvidia.com/gpu": "2"} if task.stage not in ("split", "evaluate") else {}
        assert spec["containers"][0]["resources"]["limits"] == {"memory": "8Gi", **wanted}
        assert ("tolerations" in spec) == bool(wanted)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ("kubernetes.memory=1.5Gi", {"memory": "3Gi"}),
        ('kubernetes.limits={"memory": "9Gi", "cpu": 3.5}', {"memory": "9Gi", "cpu": "3.5"}),
        ('kubernetes.limits={"ephemeral-storage": "20Gi"}', {"memory": "8Gi", "ephemeral-storage": "20Gi"}),
    ],
)
def test_limits_of_a_pod(given: str, limits: dict[str, str]) -> None:
    for one in kubernetes.objects(plan_of(given)):
        accept(one)
        found = container_of(one)["resources"]["limits"]
        assert {name: value for name, value in found.items() if name != "nvidia.com/gpu"} == limits


@pytest.mark.parametrize("text", ["y", "No", "null", "1e3", "12", "", "a: b", "{a}", "2026-01-01", "ö"])
def test_text_stays_text(text: str) -> None:
    written = to_yaml([{"value": text}])
    assert yaml.safe_load(written) == {"value": text}
    assert written != f"value: {text}\n"


def test_text_of_the_user_is_no_variable_of_kubernetes() -> None:
    plan = plan_of(inputs=Inputs("/data/$(HOME)/a$$b"))
    assert expanded(job_manifest(plan, plan_tasks(plan)[0]), HOME="x")["SM_CHANNEL_TRAIN"] == "/data/$(HOME)/a$$b"


# what is refused


@pytest.mark.parametrize("path", ["photos", "/data/../etc", "/database", "gs://bucket/x"])
def test_data_that_no_pod_would_see_and_runs_that_none_could_write(path: str) -> None:
    with pytest.raises(SettingsError, match="runs"):
        check_runs(path)
    with pytest.raises(SettingsError, match="train"):
        check_inputs(Inputs(path), Path("runs/first"))
    inputs = Inputs("/data/train", "s3://cars/eval", unlabeled="/data")
    assert check_inputs(inputs, Path("runs/first")) == replace(inputs, truth_unknown=True)
    known = replace(inputs, ground_truth="s3://cars/gt.csv")
    assert check_inputs(known, Path("runs/first")) == known


def test_names_of_runs_become_names_of_jobs() -> None:
    assert job_name("run_2026.A", "split") == "fivefold-run-2026-a-split"
    check_names(plan_of(run="a" * 37))
    for run, says in (("a" * 43, "37"), ("first-", "run='first-'")):
        with pytest.raises(SettingsError, match=says):
            check_names(plan_of(run=run))


# kustomizations, by the tool itself


def kustomized(folder: Path, component: str, *changes: tuple[str, str]) -> list[dict[str, Any]]:
    """What a copy of `k8s/` in `folder` renders with a component, if any, and with texts in place of others."""
    shutil.copytree(K8S, folder / "k8s")
    file = folder / "k8s" / "kustomization.yaml"
    for old, new in (("components: []", f"components: [{component and f'components/{component}'}]"), *changes):
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    ended = subprocess.run(["kubectl", "kustomize", file.parent], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    objects = list(yaml.safe_load_all(ended.stdout))
    for one in objects:
        accept(one)
    return objects


def by_name(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Jobs by name; what stands in lists by name is sorted, since its order says nothing but for variables."""
    found = {one["metadata"]["name"]: one for one in copy.deepcopy(objects) if one["kind"] == "Job"}
    for one in found.values():
        container_of(one)["env"] = expanded(one, 3, STORE="s3://cars/all")
        container_of(one)["volumeMounts"].sort(key=lambda mount: mount["mountPath"])
    return found


@needs_kubectl
@pytest.mark.parametrize(
    ("component", "override", "at"),
    [
        ("", "kubernetes.gpus=1", "/data"),
        ("cpu", "kubernetes.gpus=0", "/data"),
        ("kueue", "kubernetes.queue=fivefold", "/data"),
        ("s3", "kubernetes.runs_path=s3://cars/all/runs", "s3://cars/all/data"),
    ],
)
def test_a_component_is_what_submit_renders_so(tmp_path: Path, component: str, override: str, at: str) -> None:
    plan = plan_of(override, inputs=Inputs(f"{at}/train", f"{at}/eval", truth_unknown=True))
    assert by_name(kustomized(tmp_path, component)) == by_name(kubernetes.objects(plan))


@needs_kubectl
@pytest.mark.parametrize("component", ["cpu", "s3"])
def test_one_line_names_another_run_image_and_recipe(tmp_path: Path, component: str) -> None:
    changes = [("run=first", "run=second-try"), ("newTag: latest", "newTag: v2\n    newName: here/it")]
    found = by_name(kustomized(tmp_path, component, *changes, ("recipe=small_images", "recipe=plain:smoke")))
    assert set(found) == {job_name("second-try", task.name) for task in plan_tasks(plan_of())}
    for one in found.values():
        assert container_of(one)["image"] == "here/it:v2"
        assert container_of(one)["args"][1] == "recipe=plain:smoke"
        assert container_of(one)["env"]["RUN"] == "second-try"
        assert "/first" not in str(container_of(one)["env"])
        assert one["metadata"]["labels"] == one["spec"]["template"]["metadata"]["labels"]
        assert one["metadata"]["labels"]["app.kubernetes.io/instance"] == "second-try"


# engines


def test_the_workflow_is_the_plan(runs: Path) -> None:
    plan = plan_of(runs=str(runs))
    *_, workflow = rules.read(K8S / "contrib/workflow.yaml")
    given = {
        f"workflow.parameters.{each['name']}": each["value"] for each in workflow["spec"]["arguments"]["parameters"]
    }
    graph, stage = workflow["spec"]["templates"]
    nodes = {node["name"]: node for node in graph["dag"]["tasks"]}
    tasks = {task.name: task for task in plan_tasks(plan)}
    assert {name: tuple(node.get("dependencies", ())) for name, node in nodes.items()} == {
        name: task.needs for name, task in tasks.items()
    }
    for name, task in tasks.items():
        own = [*stage["inputs"]["parameters"], *nodes[name]["arguments"]["parameters"]]
        parameters = {f"inputs.parameters.{each['name']}": each.get("value", "") for each in own}
        for index, step in enumerate(task.steps):
            text = yaml.safe_dump({"container": stage["container"], "patch": stage["podSpecPatch"]})
            for parameter, value in {**parameters, **given, "item": str(index)}.items():
                text = text.replace("{{" + parameter + "}}", value)
            found = yaml.safe_load(text.replace("/runs", str(runs)))
            container, patch = found["container"], yaml.safe_load(found["patch"])
            variables = expanded({"spec": {"template": {"spec": {"containers": [container]}}}})
            assert variables["FOLD"] == ("" if step.fold is None else str(step.fold))
            seen = as_seen(step, variables, step.fold)
            surplus = {f"SM_CHANNEL_{channel}" for channel in ("TRAIN", "EVAL")} - set(step.environment)
            assert {key: value for key, value in seen.items() if key not in surplus} == step.environment, step.name
            given_by_variable = ["evaluate.allow_empty=true"] if variables["EVALUATE__ALLOW_EMPTY"] == "true" else []
            called = [*container["command"], *container["args"], *given_by_variable]
            assert called == ["python", "-m", "jobs", step.stage, *step.arguments]
            wanted = {"nvidia.com/gpu": "0", **container_of(job_manifest(plan, task))["resources"]["limits"]}
            assert container["resources"]["limits"] == {"memory": wanted.pop("memory")}
            assert patch["containers"] == [{"name": "main", "resources": {"limits": wanted}}]
    assert given["workflow.parameters.folds"] == str(len(tasks["train-folds"].steps))
    assert nodes["train-folds"]["withSequence"] == {"count": "{{workflow.parameters.folds}}"}


def test_the_train_job_is_the_fold_of_the_plan(runs: Path) -> None:
    runtime, one = rules.read(K8S / "contrib/trainjob.yaml")
    step = plan_of(runs=str(runs)).step("fold-0")
    trainer = one["spec"]["trainer"]
    assert trainer["args"] == list(step.command)
    found = expanded({"spec": {"template": {"spec": {"containers": [trainer]}}}})
    assert as_seen(step, {**found, "RUNS": str(runs)}, 0) == step.environment
    assert one["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    assert (node["name"], rules.pod_specs(runtime)[0]["containers"][0]["name"]) == ("node", "node")
