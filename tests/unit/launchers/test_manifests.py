"""The files of `k8s/` and the output of `submit platform=kubernetes`: equal, accepted by a cluster, true to the plan."""

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
    shutil.which("kubectl") is None and not os.environ.get("CI"),
    reason="kubectl is not installed; CI installs it with .ci/kubectl",
)


def make_kubernetes_plan(*overrides: str, inputs: Inputs | None = None, run: str = "first", **options: Any) -> Plan:
    inputs = inputs or Inputs("/data/train", "/data/eval", truth_unknown=True)
    return make_plan(inputs, overrides, run=run, recipe="small_images", **options)


def expand_variables(manifest: dict[str, Any], index: int | None = None, **variables: str) -> dict[str, str]:
    """Return a container's variables as Kubernetes sets them: a variable can refer to earlier ones."""
    expanded = dict(variables)
    for entry in manifest["spec"]["template"]["spec"]["containers"][0]["env"]:
        value = entry.get("value")
        if value is None:
            assert entry["valueFrom"] == {"fieldRef": {"fieldPath": INDEX}}
            value = str(index)
        expanded[entry["name"]] = rules.expand(value, expanded)
    return expanded


def test_shipped_files_equal_the_rendered_ones_and_the_output_of_submit() -> None:
    assert {name: (K8S / name).read_text("utf-8") for name in render_files()} == render_files(), (
        "run `make manifests` to update them"
    )
    names = [f"{task.name}-job.yaml" for task in plan_tasks(make_kubernetes_plan())]
    assert {*names, "pvc.yaml"} == set(render_files())
    shipped = [manifest for name in names for manifest in rules.read(K8S / name)]
    assert rules.parse(kubernetes.describe(make_kubernetes_plan())) == shipped


def check_object(manifest: dict[str, Any]) -> None:
    """Raise an error if a cluster would refuse the object or it violates the restricted pod security standard."""
    for version in rules.VERSIONS:
        rules.check(manifest, version)
    assert [*rules.against_the_server(manifest)] == []
    assert [violation for spec in rules.pod_specs(manifest) for violation in rules.against_restricted(spec)] == []


@pytest.mark.parametrize("name", OBJECTS)
def test_cluster_accepts_every_shipped_object(name: str) -> None:
    assert rules.VERSIONS == ["1.33.0", "1.37.0"]
    for manifest in rules.read(K8S / name):
        check_object(manifest)


OTHER_SETTINGS = (
    "kubernetes.runs_path=s3://a/b",
    "kubernetes.gpus=0",
    "kubernetes.queue=q",
    "kubernetes.service_account=me",
)


def test_cluster_accepts_every_object_that_submit_renders() -> None:
    for plan in (
        make_kubernetes_plan(seeds=[1, 2], run="a" * 32),
        select(make_kubernetes_plan(), (), [3]),
        make_kubernetes_plan(*OTHER_SETTINGS, run="Run_2.0"),
    ):
        for manifest in kubernetes.objects(plan, parallel=2):
            check_object(manifest)


def test_volume_claim_is_in_its_own_file() -> None:
    """Deleting the objects of another file or of a kustomization must not delete the data."""
    kinds = {name: {manifest["kind"] for manifest in rules.read(K8S / name)} for name in OBJECTS}
    assert [name for name in kinds if "PersistentVolumeClaim" in kinds[name]] == ["pvc.yaml"]
    assert "pvc.yaml" not in yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]


@pytest.mark.parametrize(
    ("conditions", "code"),
    [("FailureTarget Failed", 1), ("Suspended SuccessCriteriaMet Complete", 0)],
)
def test_loops_in_the_docs_end_when_the_job_ends(tmp_path: Path, conditions: str, code: int) -> None:
    """`kubectl wait --for=condition=complete` would wait until its timeout for a failed Job."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$1 $(wc -l < {tmp_path}/calls)" in
    "get 2") echo FailureTarget SuccessCriteriaMet Suspended ;; # pods still run
    get*) echo {conditions} ;;
esac
""")
    kubectl.chmod(0o755)
    docs = (K8S.parent / "docs/kubernetes.md").read_text("utf-8")
    (loop,) = re.findall(r"(?ms)^for stage in .*?^done$", docs)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = loop.replace("sleep 10", "sleep 0").replace("break", "exit 1")
    assert subprocess.run(["sh", "-c", script], env=environ, timeout=60).returncode == code
    stages = [call.split("-")[1] for call in (tmp_path / "calls").read_text().splitlines() if call.startswith("apply")]
    assert len(stages) == (1 if code else 7)


def test_no_manifest_or_document_waits_only_for_the_success_of_a_job() -> None:
    paths = [*K8S.rglob("*.yaml"), K8S.parent / "README.md", *(K8S.parent / "docs").glob("*.md")]
    assert [path.name for path in paths if "--for=condition=complete" in path.read_text("utf-8")] == []


WORKFLOW_FILE, TRAINER_FILE = "contrib/workflow.yaml", "contrib/trainjob.yaml"


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return rules.pod_specs(manifest)[0]["containers"][0]


def test_every_container_has_a_memory_limit_and_the_service_has_a_cpu_limit() -> None:
    for name in OBJECTS:
        for manifest in rules.read(K8S / name):
            # The limits of the TrainingRuntime are in the TrainJob.
            for spec in rules.pod_specs(manifest) if manifest["kind"] != "TrainingRuntime" else []:
                assert spec["containers"][0]["resources"]["limits"]["memory"], name
    *_, train_job = rules.read(K8S / TRAINER_FILE)
    assert train_job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"]
    service = next(
        manifest for manifest in rules.read(K8S / "serve-deployment.yaml") if manifest["kind"] == "Deployment"
    )
    assert container_of(service)["resources"]["limits"]["cpu"]


def selector_matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Return whether a selector matches an object with these labels."""
    operators = {"Exists": lambda key, _: key in labels, "DoesNotExist": lambda key, _: key not in labels}
    operators["NotIn"] = lambda key, values: labels.get(key) not in values
    expressions = selector.get("matchExpressions", [])
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        operators[expression["operator"]](expression["key"], expression.get("values")) for expression in expressions
    )


def test_network_policies_select_only_their_pods() -> None:
    policies = [manifest["spec"] for manifest in rules.read(K8S / "network-policy.yaml")]
    jobs, serve, hosts = policies
    service, deployment, budget = rules.read(K8S / "serve-deployment.yaml")
    (loader,) = rules.read(K8S / "loader-pod.yaml")
    *_, workflow = rules.read(K8S / WORKFLOW_FILE)
    runtime, _ = rules.read(K8S / TRAINER_FILE)
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    plan = make_kubernetes_plan()
    job_pods = [job_manifest(plan, task)["spec"]["template"] for task in plan_tasks(plan)]
    argo = workflow["spec"]["templates"][1]["metadata"]["labels"] | {"workflows.argoproj.io/workflow": "fivefold-first"}
    # A TrainJob becomes a JobSet, which labels each of its pods with its name.
    trainer = node["template"]["spec"]["template"]["metadata"]["labels"] | {"jobset.sigs.k8s.io/jobset-name": "x"}
    served = deployment["spec"]["template"]["metadata"]["labels"]
    for labels, expected in (
        *((pod["metadata"]["labels"], [True, False, False]) for pod in job_pods),
        (served, [False, True, False]),
        (trainer, [False, False, True]),
    ):
        assert [selector_matches(policy["podSelector"], labels) for policy in policies] == expected
    for labels in (loader["metadata"]["labels"], argo):
        assert not selector_matches(jobs["podSelector"], labels)
        assert not selector_matches(hosts["podSelector"], labels)
    assert serve["ingress"][0]["ports"][0]["port"] == service["spec"]["ports"][0]["targetPort"]
    assert "ingress" not in jobs
    assert selector_matches(budget["spec"]["selector"], served)
    assert [rule["from"] for rule in hosts["ingress"]] == [[{"podSelector": hosts["podSelector"]}]]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs whose run `first` has the folders that a stage looks for."""
    for place in ("split/output", "ensemble/output", "ensemble-student/output", "distill/model"):
        (tmp_path / "first" / place).mkdir(parents=True)
    return tmp_path


def stage_variables(step: Step, variables: dict[str, str], fold: int | None) -> dict[str, str]:
    """Return the SM_* variables of a stage, including those that it derives from its run."""
    resolved = env_for_run(STAGES[step.stage], variables, f"{variables['RUNS']}/{variables['RUN']}", fold)
    return {name: value for name, value in resolved.items() if name.startswith("SM_") and value}


def test_every_pod_has_the_variables_and_arguments_of_its_step(runs: Path) -> None:
    inputs = Inputs("/data/$(HOME)/a$$b", "/data/eval", truth_unknown=True)
    plan = make_kubernetes_plan(f"kubernetes.runs_path={runs}", inputs=inputs, seeds=[42, 43], runs=str(runs))
    for task in plan_tasks(plan):
        manifest = job_manifest(plan, task)
        for index, step in enumerate(task.steps):
            variables = {**expand_variables(manifest, index, HOME="x"), "JOB_COMPLETION_INDEX": str(index)}
            fold = index if task.indexed else None
            assert stage_variables(step, variables, fold) == step.environment, step.name
            container = manifest["spec"]["template"]["spec"]["containers"][0]
            assert [*container["args"], *([f"FOLD={index}"] if task.indexed else [])] == list(step.command)
    assert [task.name for task in plan_tasks(plan)][1:3] == ["train-folds", "train-folds-seed-43"]


def test_runs_in_a_store_are_urls_without_a_folder() -> None:
    plan = make_kubernetes_plan("kubernetes.runs_path=s3://cars/runs/", seeds=[42, 43])
    for task in plan_tasks(plan):
        variables = expand_variables(job_manifest(plan, task), 1)
        assert variables["RUNS"] == "s3://cars/runs"
        assert "SM_OUTPUT_DIR" not in variables
        places = [value for name, value in variables.items() if name.startswith("SM_")]
        assert all(place.startswith(("/data/", "s3://cars/runs/first/")) for place in places)


def test_folds_are_retried_individually_except_for_permanent_exit_codes() -> None:
    plan = make_kubernetes_plan()
    spec = job_manifest(plan, plan_tasks(plan)[1])["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 5, 5)
    assert [job_manifest(plan, plan_tasks(plan)[1], parallel)["spec"]["parallelism"] for parallel in (2, 9)] == [2, 5]
    assert (spec["backoffLimitPerIndex"], spec["podReplacementPolicy"]) == (2, "Failed")
    assert "maxFailedIndexes" not in spec
    drained, permanent = spec["podFailurePolicy"]["rules"]
    assert (drained["action"], permanent["action"]) == ("Ignore", "FailIndex")
    assert permanent["onExitCodes"]["values"] == NON_RETRYABLE_CODES == [64, 65, 66, 137]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 120


def test_selected_folds_are_separate_jobs_unless_they_are_the_first_ones() -> None:
    plan = select(make_kubernetes_plan(), (), [1, 3])
    tasks = {task.name: task for task in plan_tasks(plan)}
    assert list(tasks) == ["split", "fold-1", "fold-3"]
    manifest = job_manifest(plan, tasks["fold-3"])
    assert "completionMode" not in manifest["spec"]
    assert manifest["spec"]["podFailurePolicy"]["rules"][1]["action"] == "FailJob"
    assert "FOLD=3" in container_of(manifest)["args"]
    assert "FOLD" not in expand_variables(manifest)
    first = select(make_kubernetes_plan(), (), [0, 1])
    assert job_manifest(first, plan_tasks(first)[1])["spec"]["completions"] == 2


def test_only_training_and_prediction_request_a_gpu() -> None:
    plan = make_kubernetes_plan("kubernetes.gpus=2")
    for task in plan_tasks(plan):
        spec = job_manifest(plan, task)["spec"]["template"]["spec"]
        gpu_limit = {"nvidia.com/gpu": "2"} if task.stage not in ("split", "evaluate") else {}
        assert spec["containers"][0]["resources"]["limits"] == {"memory": "8Gi", **gpu_limit}
        assert ("tolerations" in spec) == bool(gpu_limit)


@pytest.mark.parametrize(
    ("setting", "limits"),
    [
        ("kubernetes.memory=1.5Gi", {"memory": "3Gi"}),
        ('kubernetes.limits={"memory": "9Gi", "cpu": 3.5}', {"memory": "9Gi", "cpu": "3.5"}),
        ('kubernetes.limits={"ephemeral-storage": "20Gi"}', {"memory": "8Gi", "ephemeral-storage": "20Gi"}),
    ],
)
def test_limits_of_a_pod_follow_the_settings(setting: str, limits: dict[str, str]) -> None:
    for manifest in kubernetes.objects(make_kubernetes_plan(setting)):
        pod_limits = container_of(manifest)["resources"]["limits"]
        assert {name: value for name, value in pod_limits.items() if name != "nvidia.com/gpu"} == limits


@pytest.mark.parametrize("text", ["y", "No", "null", "1e3", "", "a: b", "2026-01-01"])
def test_to_yaml_keeps_strings_as_strings(text: str) -> None:
    rendered = to_yaml([{"value": text}])
    assert yaml.safe_load(rendered) == {"value": text}
    assert rendered != f"value: {text}\n"


@pytest.mark.parametrize("path", ["photos", "/data/../etc", "/database", "gs://bucket/x"])
def test_paths_that_pods_cannot_read_or_write_raise_errors(path: str) -> None:
    with pytest.raises(SettingsError, match="runs"):
        check_runs(path)
    with pytest.raises(SettingsError, match="train"):
        check_inputs(Inputs(path), Path("runs/first"))
    inputs = Inputs("/data/train", "s3://cars/eval", unlabeled="/data")
    assert check_inputs(inputs, Path("runs/first")) == replace(inputs, truth_unknown=True)
    with_ground_truth = replace(inputs, ground_truth="s3://cars/gt.csv")
    assert check_inputs(with_ground_truth, Path("runs/first")) == with_ground_truth


def test_job_names_are_derived_from_run_names() -> None:
    assert job_name("run_2026.A", "split") == "fivefold-run-2026-a-split"
    check_names(make_kubernetes_plan(run="a" * 37))
    for run, message in (("a" * 43, "37"), ("first-", "run='first-'")):
        with pytest.raises(SettingsError, match=message):
            check_names(make_kubernetes_plan(run=run))


def run_kustomize(folder: Path, component: str, *changes: tuple[str, str]) -> list[dict[str, Any]]:
    """Copy `k8s/` to `folder`, apply the component, if any, and the text changes, and return the rendered objects."""
    shutil.copytree(K8S, folder / "k8s")
    file = folder / "k8s" / "kustomization.yaml"
    for old, new in (("components: []", f"components: [{component and f'components/{component}'}]"), *changes):
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    result = subprocess.run(["kubectl", "kustomize", file.parent], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    objects = rules.parse(result.stdout)
    for manifest in objects:
        check_object(manifest)
    return objects


def jobs_by_name(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return Jobs by name with lists of named items sorted: their order matters only for variables."""
    jobs = {manifest["metadata"]["name"]: manifest for manifest in copy.deepcopy(objects) if manifest["kind"] == "Job"}
    for manifest in jobs.values():
        container_of(manifest)["env"] = expand_variables(manifest, 3, STORE="s3://cars/all")
        container_of(manifest)["volumeMounts"].sort(key=lambda mount: mount["mountPath"])
    return jobs


@needs_kubectl
@pytest.mark.parametrize(
    ("component", "override", "data_url"),
    [
        ("", "kubernetes.gpus=1", "/data"),
        ("cpu", "kubernetes.gpus=0", "/data"),
        ("kueue", "kubernetes.queue=fivefold", "/data"),
        ("s3", "kubernetes.runs_path=s3://cars/all/runs", "s3://cars/all/data"),
    ],
)
def test_component_renders_the_same_jobs_as_submit(tmp_path, component, override, data_url):
    plan = make_kubernetes_plan(override, inputs=Inputs(f"{data_url}/train", f"{data_url}/eval", truth_unknown=True))
    assert jobs_by_name(run_kustomize(tmp_path, component)) == jobs_by_name(kubernetes.objects(plan))


@needs_kubectl
def test_one_changed_line_sets_the_run_image_or_recipe_of_every_job(tmp_path: Path) -> None:
    changes = [("run=first", "run=second-try"), ("newTag: latest", "newTag: v2\n    newName: here/it")]
    jobs = jobs_by_name(run_kustomize(tmp_path, "s3", *changes, ("recipe=small_images", "recipe=plain:smoke")))
    assert set(jobs) == {job_name("second-try", task.name) for task in plan_tasks(make_kubernetes_plan())}
    for manifest in jobs.values():
        assert container_of(manifest)["image"] == "here/it:v2"
        assert container_of(manifest)["args"][1] == "recipe=plain:smoke"
        assert container_of(manifest)["env"]["RUN"] == "second-try"
        assert "/first" not in str(container_of(manifest)["env"])
        assert manifest["metadata"]["labels"] == manifest["spec"]["template"]["metadata"]["labels"]
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "second-try"


def test_workflow_runs_the_steps_of_the_plan(runs: Path) -> None:
    plan = make_kubernetes_plan(runs=str(runs))
    *_, workflow = rules.read(K8S / "contrib/workflow.yaml")
    workflow_parameters = {
        f"workflow.parameters.{entry['name']}": entry["value"] for entry in workflow["spec"]["arguments"]["parameters"]
    }
    graph, stage = workflow["spec"]["templates"]
    nodes = {node["name"]: node for node in graph["dag"]["tasks"]}
    tasks = {task.name: task for task in plan_tasks(plan)}
    assert {name: tuple(node.get("dependencies", ())) for name, node in nodes.items()} == {
        name: task.needs for name, task in tasks.items()
    }
    for name, task in tasks.items():
        parameter_list = [*stage["inputs"]["parameters"], *nodes[name]["arguments"]["parameters"]]
        parameters = {f"inputs.parameters.{entry['name']}": entry.get("value", "") for entry in parameter_list}
        for index, step in enumerate(task.steps):
            text = yaml.safe_dump({"container": stage["container"], "patch": stage["podSpecPatch"]})
            for parameter, value in {**parameters, **workflow_parameters, "item": str(index)}.items():
                text = text.replace("{{" + parameter + "}}", value)
            rendered = yaml.safe_load(text.replace("/runs", str(runs)))
            container, patch = rendered["container"], yaml.safe_load(rendered["patch"])
            variables = expand_variables({"spec": {"template": {"spec": {"containers": [container]}}}})
            assert variables["FOLD"] == ("" if step.fold is None else str(step.fold))
            actual = stage_variables(step, variables, step.fold)
            surplus = {f"SM_CHANNEL_{channel}" for channel in ("TRAIN", "EVAL")} - set(step.environment)
            assert {key: value for key, value in actual.items() if key not in surplus} == step.environment, step.name
            variable_arguments = ["evaluate.allow_empty=true"] if variables["EVALUATE__ALLOW_EMPTY"] == "true" else []
            command = [*container["command"], *container["args"], *variable_arguments]
            assert command == ["python", "-m", "jobs", step.stage, *step.arguments]
            limits = {"nvidia.com/gpu": "0", **container_of(job_manifest(plan, task))["resources"]["limits"]}
            assert container["resources"]["limits"] == {"memory": limits.pop("memory")}
            assert patch["containers"] == [{"name": "main", "resources": {"limits": limits}}]
    assert workflow_parameters["workflow.parameters.folds"] == str(len(tasks["train-folds"].steps))
    assert nodes["train-folds"]["withSequence"] == {"count": "{{workflow.parameters.folds}}"}


def test_train_job_runs_the_fold_of_the_plan(runs: Path) -> None:
    runtime, manifest = rules.read(K8S / "contrib/trainjob.yaml")
    step = make_kubernetes_plan(runs=str(runs)).step("fold-0")
    trainer = manifest["spec"]["trainer"]
    assert trainer["args"] == list(step.command)
    variables = expand_variables({"spec": {"template": {"spec": {"containers": [trainer]}}}})
    assert stage_variables(step, {**variables, "RUNS": str(runs)}, 0) == step.environment
    assert manifest["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    assert (node["name"], rules.pod_specs(runtime)[0]["containers"][0]["name"]) == ("node", "node")
