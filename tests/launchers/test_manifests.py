"""The files of `k8s/` and what `submit platform=kubernetes` renders: the same, what a cluster takes, what the plan says."""

import copy
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

import kubernetes_rules as rules
from fivefold.contract.layout import in_run
from fivefold.contract.stages import STAGES
from fivefold.errors import SettingsError
from fivefold.launchers import kubernetes, shipped
from fivefold.launchers.manifests import INDEX, PERMANENT, Pods, job, literal
from fivefold.launchers.plan import Inputs, Plan, Step, make_plan, select
from fivefold.launchers.tasks import check_inputs, check_names, check_runs, job_name, tasks_of
from fivefold.launchers.yaml_text import as_yaml

K8S = Path(__file__).parents[2] / "k8s"
FILES = sorted(path.relative_to(K8S).as_posix() for path in K8S.rglob("*.yaml"))
OBJECTS = [name for name in FILES if not name.endswith("kustomization.yaml")]
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None and not os.environ.get("CI"), reason="kubectl is not here; CI has it by .ci/kubectl"
)


def plan_of(*overrides: str, inputs: Inputs | None = None, run: str = "first", **more: Any) -> Plan:
    inputs = inputs or Inputs("/data/train", "/data/eval")
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


@pytest.mark.parametrize("name", sorted(shipped.files()))
def test_a_shipped_file_is_what_is_rendered(name: str) -> None:
    assert (K8S / name).read_text("utf-8") == shipped.files()[name], "make manifests writes it anew"


def test_every_file_is_rendered_or_written_by_hand() -> None:
    kustomizations = {f"{folder}kustomization.yaml" for folder in ("", "base/", "overlays/cpu/", "overlays/kueue/")}
    assert set(FILES) - set(shipped.files()) == {*kustomizations, "serve-deployment.yaml"}


def test_submit_renders_the_shipped_run() -> None:
    rendered = list(yaml.safe_load_all(kubernetes.describe(plan_of())))
    assert rendered == rules.read(K8S / "base/run.yaml")
    jobs = {one["metadata"]["name"]: one for one in rendered if one["kind"] == "Job"}
    for stage in shipped.ON_ITS_OWN:
        claim, alone = rules.read(K8S / f"{stage}-job.yaml")
        assert alone == jobs[f"fivefold-first-{stage}"]
        assert claim == rendered[0] == rules.read(K8S / "pvc.yaml")[0]


@pytest.mark.parametrize("version", rules.VERSIONS)
@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_is_known_to_the_field(name: str, version: str) -> None:
    for one in rules.read(K8S / name):
        rules.check(one, version)


def test_the_versions_are_1_33_and_the_newest_at_hand() -> None:
    assert rules.VERSIONS == ["1.33.0", "1.37.0"]


@pytest.mark.parametrize("name", OBJECTS)
def test_every_pod_is_within_the_restricted_standard(name: str) -> None:
    for one in rules.read(K8S / name):
        for spec in rules.pod_specs(one):
            assert list(rules.against_restricted(spec)) == []


@pytest.mark.parametrize("name", OBJECTS)
def test_fields_of_an_object_fit_one_another(name: str) -> None:
    for one in rules.read(K8S / name):
        assert list(rules.against_the_server(one)) == []


def test_all_that_submit_may_render_fits() -> None:
    for plan in (plan_of(seeds=[1, 2], run="a" * 32), select(plan_of(), (), [3]), plan_of(run="Run_2.0")):
        for pods in (Pods(), Pods(runs="s3://a/b", gpus=0, queue="q", service_account="me", parallel=2)):
            for one in kubernetes.objects(plan, pods):
                rules.check(one, rules.OLDEST)
                assert list(rules.against_the_server(one)) == []
                assert [found for spec in rules.pod_specs(one) for found in rules.against_restricted(spec)] == []


def test_a_claim_stands_in_each_file_whose_pods_want_it() -> None:
    for name in OBJECTS:
        found = rules.read(K8S / name)
        wanted = {
            volume["persistentVolumeClaim"]["claimName"]
            for one in found
            for spec in rules.pod_specs(one)
            for volume in spec["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert wanted <= {one["metadata"]["name"] for one in found if one["kind"] == "PersistentVolumeClaim"}, name


SPOILT = {
    "a field that is none": lambda spec: spec.update(tollerations=[]),
    "a field of another place": lambda spec: spec["containers"][0].update(terminationGracePeriodSeconds=3),
    "a number for text": lambda spec: spec["containers"][0]["env"][-1].update(value=3),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("name", ["train-folds-job.yaml", "argo/workflow.yaml", "trainer/trainjob.yaml"])
def test_a_spoilt_object_is_found(name: str, spoil: Any) -> None:
    objects = copy.deepcopy(rules.read(K8S / name))
    specs = [spec for one in objects for spec in rules.pod_specs(one)]
    for spec in specs:
        spec["containers"][0].setdefault("env", [{"name": "A", "value": "b"}])
        spoil(spec)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": spec}
        with pytest.raises(ValidationError):
            rules.of_kubernetes(pod, rules.OLDEST)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("argo/workflow.yaml", ["spec", "templates", 1, "retryStrategy"]),
        ("argo/workflow.yaml", ["spec", "templates", 0, "dag"]),
        ("trainer/trainjob.yaml", ["spec", "trainer"]),
        ("trainer/trainjob.yaml", ["spec"]),
    ],
)
def test_a_field_that_an_engine_does_not_know_is_found(name: str, path: list[Any]) -> None:
    one = rules.read(K8S / name)[-1]
    place = one
    for key in path:
        place = place[key]
    place["limmit"] = 1
    with pytest.raises(AssertionError):
        rules.check(one, rules.OLDEST)


INSECURE = {
    "runAsNonRoot": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "capabilities": lambda spec: spec["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    "allowPrivilegeEscalation": lambda spec: spec["containers"][0].pop("securityContext"),
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "volume": lambda spec: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
}


@pytest.mark.parametrize(("word", "spoil"), INSECURE.items(), ids=INSECURE)
def test_a_pod_outside_the_standard_is_found(word: str, spoil: Any) -> None:
    spec = copy.deepcopy(rules.pod_specs(rules.read(K8S / "split-job.yaml")[1])[0])
    spoil(spec)
    assert any(word in found for found in rules.against_restricted(spec))


MISFITS = {
    "FailIndex": lambda spec: spec.pop("backoffLimitPerIndex"),
    "restarts": lambda spec: spec["template"]["spec"].update(restartPolicy="OnFailure"),
    "early": lambda spec: spec.update(podReplacementPolicy="TerminatingOrFailed"),
    "order": lambda spec: spec["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[66, 64]),
    "no container": lambda spec: spec["podFailurePolicy"]["rules"][1]["onExitCodes"].update(containerName="other"),
    "no volume": lambda spec: spec["template"]["spec"]["volumes"].pop(),
    "twice": lambda spec: spec["template"]["spec"]["containers"][0]["env"].append({"name": "RUN", "value": "b"}),
    "no name": lambda spec: spec.update(completions=10**40),
}


@pytest.mark.parametrize(("word", "spoil"), MISFITS.items(), ids=MISFITS)
def test_fields_that_do_not_fit_are_found(word: str, spoil: Any) -> None:
    one = copy.deepcopy(rules.read(K8S / "train-folds-job.yaml")[1])
    spoil(one["spec"])
    assert any(word in found for found in rules.against_the_server(one))


# what a Job does is what the plan says


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs in which the run `first` has what a stage looks for."""
    for place in ("split/output", "ensemble/output", "ensemble-student/output", "distill/model"):
        (tmp_path / "first" / place).mkdir(parents=True)
    return tmp_path


def as_seen(step: Step, variables: dict[str, str], fold: int | None) -> dict[str, str]:
    """The SM_* variables that a stage has in the end, with those that it finds in its run by itself."""
    found = in_run(STAGES[step.stage], variables, f"{variables['RUNS']}/{variables['RUN']}", fold)
    return {name: value for name, value in found.items() if name.startswith("SM_") and value}


def test_every_pod_sees_what_its_step_sees(runs: Path) -> None:
    plan = plan_of(seeds=[42, 43], runs=str(runs))
    for task in tasks_of(plan):
        one = job(plan, task, Pods(runs=str(runs)))
        for index, step in enumerate(task.steps):
            variables = {**expanded(one, index), "JOB_COMPLETION_INDEX": str(index)}
            fold = index if task.indexed else None
            assert as_seen(step, variables, fold) == step.environment, step.name
            container = one["spec"]["template"]["spec"]["containers"][0]
            fold_told = [f"FOLD={index}"] if task.indexed else []
            assert [*container["args"], *fold_told] == list(step.command)
            assert container["args"][0] == step.stage
            assert variables.get("FOLD", str(index)) == str(index)
    assert [task.name for task in tasks_of(plan)][1:3] == ["train-folds", "train-folds-seed-43"]


def test_runs_at_a_store_are_urls_and_no_folder(runs: Path) -> None:
    plan = plan_of(seeds=[42, 43])
    for task in tasks_of(plan):
        found = expanded(job(plan, task, Pods(runs="s3://cars/runs/")), 1)
        assert found["RUNS"] == "s3://cars/runs"
        assert "SM_OUTPUT_DIR" not in found
        own = {value for name, value in found.items() if name.startswith("SM_") and not value.startswith("/data")}
        assert all(value.startswith("s3://cars/runs/first/") for value in own)
    assert expanded(job(plan, tasks_of(plan)[2], Pods()), 1)["SM_MODEL_DIR"] == "/runs/first/fold-1-seed-43/model"


def test_folds_are_tried_again_alone_unless_their_exit_code_comes_again() -> None:
    plan = plan_of()
    spec = job(plan, tasks_of(plan)[1], Pods())["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 5, 5)
    assert spec["backoffLimitPerIndex"] == 2
    assert "maxFailedIndexes" not in spec
    assert spec["podReplacementPolicy"] == "Failed"
    drained, permanent = spec["podFailurePolicy"]["rules"]
    assert (drained["action"], permanent["action"]) == ("Ignore", "FailIndex")
    assert permanent["onExitCodes"]["values"] == PERMANENT == [64, 65, 66]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 120
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_some_folds_are_jobs_of_their_own() -> None:
    plan = select(plan_of(), (), [1, 3])
    named = {task.name: task for task in tasks_of(plan)}
    assert list(named) == ["split", "fold-1", "fold-3"]
    one = job(plan, named["fold-3"], Pods())
    assert "completionMode" not in one["spec"]
    assert one["spec"]["podFailurePolicy"]["rules"][1]["action"] == "FailJob"
    assert "FOLD=3" in one["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "FOLD" not in expanded(one)


def test_the_first_folds_are_one_job() -> None:
    plan = select(plan_of(), (), [0, 1])
    assert job(plan, tasks_of(plan)[1], Pods())["spec"]["completions"] == 2


def test_parallel_says_how_many_folds_at_once() -> None:
    plan = plan_of()
    assert job(plan, tasks_of(plan)[1], Pods(parallel=2))["spec"]["parallelism"] == 2
    assert job(plan, tasks_of(plan)[1], Pods(parallel=9))["spec"]["parallelism"] == 5


def test_only_training_and_prediction_ask_for_a_gpu() -> None:
    plan = plan_of()
    for task in tasks_of(plan):
        spec = job(plan, task, Pods(gpus=2))["spec"]["template"]["spec"]
        wanted = {"nvidia.com/gpu": "2"} if task.stage not in ("split", "evaluate") else None
        assert spec["containers"][0]["resources"].get("limits") == wanted
        assert ("tolerations" in spec) == (wanted is not None)


def test_text_of_the_user_is_no_variable_of_kubernetes() -> None:
    plan = plan_of(inputs=Inputs("/data/$(HOME)/a$$b"))
    one = job(plan, tasks_of(plan)[0], Pods())
    assert expanded(one, HOME="x")["SM_CHANNEL_TRAIN"] == "/data/$(HOME)/a$$b"
    assert literal("$(A)") == "$$(A)"


@pytest.mark.parametrize("text", ["y", "No", "null", "1e3", "0x1f", "12", "~", "", "a: b", "a #b", "{a}", "*x", "2026-01-01", "ö", "a\tb"])  # fmt: skip
def test_text_stays_text(text: str) -> None:
    written = as_yaml([{"value": text}])
    assert yaml.safe_load(written) == {"value": text}
    assert written != f"value: {text}\n"


# what is refused


@pytest.mark.parametrize(
    "path", ["photos", "/photos", "/data/../etc", "/database", "gs://bucket/x"], ids=lambda path: path
)
def test_data_that_no_pod_would_see(path: str) -> None:
    with pytest.raises(SettingsError, match="train"):
        check_inputs(Inputs(path), Path("runs/first"))


def test_data_in_the_claim_or_a_bucket_are_taken_as_they_are() -> None:
    inputs = Inputs("/data/train", "s3://cars/eval", unlabeled="/data")
    assert check_inputs(inputs, Path("runs/first")) == inputs


@pytest.mark.parametrize("runs", ["runs", "/data/runs", "http://x/y"])
def test_runs_that_no_pod_could_write(runs: str) -> None:
    with pytest.raises(SettingsError, match="runs"):
        check_runs(runs)


@pytest.mark.parametrize(("run", "says"), [("a" * 43, "37 are left"), ("first-", "ends in")])
def test_a_run_whose_pods_could_not_be_named(run: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        check_names(plan_of(run=run))


def test_names_of_runs_become_names_of_jobs() -> None:
    assert job_name("run_2026.A", "split") == "fivefold-run-2026-a-split"
    check_names(plan_of(run="a" * 37))


# kustomizations, by the tool itself


def kustomized(folder: Path) -> list[dict[str, Any]]:
    ended = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


def by_name(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Objects by kind and name; what stands in lists by name is sorted, since its order says nothing but for variables."""
    found = {f"{one['kind']}/{one['metadata']['name']}": one for one in copy.deepcopy(objects)}
    for one in found.values():
        for spec in rules.pod_specs(one):
            spec["containers"][0]["env"] = expanded(one, 3, STORE="s3://cars/all")
            spec["containers"][0]["volumeMounts"].sort(key=lambda mount: mount["mountPath"])
    return found


def rendered(pods: Pods, inputs: Inputs | None = None, run: str = "first") -> dict[str, dict[str, Any]]:
    return by_name(kubernetes.objects(plan_of(inputs=inputs, run=run), pods))


@needs_kubectl
@pytest.mark.parametrize("folder", ["", "base", "overlays/cpu", "overlays/s3", "overlays/kueue"])
def test_a_kustomization_is_known_to_the_field(folder: str) -> None:
    for one in kustomized(K8S / folder):
        for version in rules.VERSIONS:
            rules.check(one, version)
        assert [found for spec in rules.pod_specs(one) for found in rules.against_restricted(spec)] == []


@needs_kubectl
@pytest.mark.parametrize(
    ("folder", "pods"),
    [("", Pods()), ("overlays/cpu", Pods(gpus=0)), ("overlays/kueue", Pods(queue="fivefold"))],
)
def test_an_overlay_is_what_submit_renders_so(folder: str, pods: Pods) -> None:
    assert by_name(kustomized(K8S / folder)) == rendered(pods)


@needs_kubectl
def test_the_overlay_s3_is_what_submit_renders_for_a_bucket() -> None:
    found = kustomized(K8S / "overlays/s3")
    assert [one["data"]["STORE"] for one in found if one["kind"] == "ConfigMap"] == ["s3://my-bucket/fivefold"]
    jobs = by_name([one for one in found if one["kind"] != "ConfigMap"])
    at = "s3://cars/all/data"
    wanted = rendered(Pods(runs="s3://cars/all/runs"), Inputs(f"{at}/train", f"{at}/eval"))
    for one in wanted.values():
        one["spec"]["template"]["spec"]["containers"][0]["env"]["STORE"] = "s3://cars/all"
    assert jobs == wanted


@needs_kubectl
@pytest.mark.parametrize("overlay", ["", "overlays/cpu", "overlays/s3"])
def test_one_line_names_another_run_and_another_image(tmp_path: Path, overlay: str) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "base" / "kustomization.yaml"
    text = file.read_text().replace("run=first", "run=second-try").replace("newTag: latest", "newTag: v2")
    file.write_text(text.replace("- name: fivefold\n    newTag", "- name: fivefold\n    newName: here/it\n    newTag"))
    found = [one for one in kustomized(tmp_path / "k8s" / overlay) if one["kind"] == "Job"]
    assert {one["metadata"]["name"] for one in found} == {
        job_name("second-try", task.name) for task in tasks_of(plan_of())
    }
    for one in found:
        container = one["spec"]["template"]["spec"]["containers"][0]
        assert container["image"] == "here/it:v2"
        said = expanded(one, 2, STORE="s3://a")
        assert "/first" not in str(said)
        assert said["RUN"] == "second-try"
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["metadata"]["labels"] == labels
        assert labels["app.kubernetes.io/instance"] == "second-try"


# engines


def test_the_workflow_is_the_plan(runs: Path) -> None:
    plan = plan_of(runs=str(runs))
    *_, whole = rules.read(K8S / "argo/workflow.yaml")
    given = {f"workflow.parameters.{each['name']}": each["value"] for each in whole["spec"]["arguments"]["parameters"]}
    templates = {each["name"]: each for each in whole["spec"]["templates"]}
    nodes = {each["name"]: each for each in templates["run"]["dag"]["tasks"]}
    tasks = {task.name: task for task in tasks_of(plan)}
    assert {name: tuple(node.get("dependencies", ())) for name, node in nodes.items()} == {
        name: task.needs for name, task in tasks.items()
    }
    for name, task in tasks.items():
        for index, step in enumerate(task.steps):
            text = yaml.safe_dump(templates[nodes[name]["template"]]["container"])
            for parameter, value in {**given, "inputs.parameters.fold": str(index), "item": str(index)}.items():
                text = text.replace("{{" + parameter + "}}", value)
            container = yaml.safe_load(text.replace("value: /runs\n", f"value: {runs}\n"))
            found = expanded({"spec": {"template": {"spec": {"containers": [container]}}}})
            fold = int(found["FOLD"]) if task.indexed else None
            assert as_seen(step, found, fold) == step.environment
            assert fold == (index if task.indexed else None)
            more = ["split.folds=5"] if name == "split" else []
            less = [f"FOLD={index}"] if task.indexed else []
            assert container["args"] == [step.stage, *(each for each in step.arguments if each not in less), *more]
            assert container["command"] == ["python", "-m", "jobs"]
    assert given["workflow.parameters.folds"] == str(len(tasks["train-folds"].steps))
    assert nodes["train-folds"]["withSequence"] == {"count": "{{workflow.parameters.folds}}"}


def test_the_train_job_is_the_fold_of_the_plan(runs: Path) -> None:
    _, runtime, one = rules.read(K8S / "trainer/trainjob.yaml")
    step = plan_of(runs=str(runs)).step("fold-0")
    trainer = one["spec"]["trainer"]
    assert trainer["args"] == list(step.command)
    found = expanded({"spec": {"template": {"spec": {"containers": [trainer]}}}})
    assert as_seen(step, {**found, "RUNS": str(runs)}, 0) == step.environment
    assert one["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    assert (node["name"], rules.pod_specs(runtime)[0]["containers"][0]["name"]) == ("node", "node")
