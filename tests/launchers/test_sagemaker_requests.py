"""A plan as requests to SageMaker, checked with no region, no credentials and no network."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator

from fivefold import logline
from fivefold.contract.stages import STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, Plan, make_plan
from fivefold.launchers.sagemaker import checks, cost, launch, pipeline, requests
from fivefold.launchers.sagemaker.checks import check_request, checked_requests
from fivefold.recipe import OF_A_STAGE, STAGES_OF_A_RUN, SageMaker, Settings
from fivefold.settings import arguments_layer, load
from jobs import submit

REPOSITORY = Path(__file__).parents[2]
ROLE = "arn:aws:iam::123456789012:role/fivefold"
GIVEN = (
    "sagemaker.image=123456789012.dkr.ecr.eu-central-1.amazonaws.com/fivefold:1",
    f"sagemaker.role={ROLE}",
    "sagemaker.output=s3://bucket/runs",
    "sagemaker.instance_type=ml.g5.xlarge",
)
INPUTS = Inputs("s3://bucket/train", "s3://bucket/eval", "s3://bucket/eval/gt.csv", "s3://bucket/more/")


def plan_of(*overrides: str, run: str = "first", recipe: str = "demo", inputs: Inputs = INPUTS, **more: Any) -> Plan:
    return make_plan(inputs, [*GIVEN, *overrides], run, "runs", recipe, **more)


def fold_request(*overrides: str) -> dict[str, Any]:
    return checked_requests(plan_of(*overrides))["fold-2"]


def test_every_step_is_a_request_that_the_services_own_model_accepts() -> None:
    plan = plan_of("train.epochs=3")
    found = checked_requests(plan)
    assert list(found) == [step.name for step in plan.steps]
    shape = botocore.session.Session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    for request in found.values():
        assert not ParamValidator().validate(request, shape).has_errors()
        assert json.loads(json.dumps(request)) == request


def test_a_fold_is_asked_for_in_full() -> None:
    request = fold_request("train.epochs=3", "sagemaker.tags={team='vision'}", "sagemaker.max_hours=1.5")
    assert re.fullmatch(r"fivefold-first-fold-2-\d{14}", request.pop("TrainingJobName"))
    metrics = request["AlgorithmSpecification"].pop("MetricDefinitions")
    assert [metric["Name"] for metric in metrics] == list(logline.METRICS)
    request["InputDataConfig"].sort(key=lambda channel: channel["ChannelName"])
    assert request == {
        "RoleArn": ROLE,
        "AlgorithmSpecification": {
            "TrainingImage": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/fivefold:1",
            "TrainingInputMode": "File",
        },
        "HyperParameters": {"recipe": "demo", "train__epochs": "3"},
        "Environment": {
            "STAGE": "train-fold",
            "FOLD": "2",
            "FIVEFOLD_IMAGE": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/fivefold:1",
        },
        "InputDataConfig": [prefix("folds", "s3://bucket/runs/first/split/"), prefix("train", "s3://bucket/train/")],
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/runs/first/folds/fold-2", "CompressionType": "GZIP"},
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
        "StoppingCondition": {"MaxRuntimeInSeconds": 5400},
        "CheckpointConfig": {
            "S3Uri": "s3://bucket/runs/first/checkpoints/fold-2",
            "LocalPath": "/opt/ml/checkpoints",
        },
        "Tags": [{"Key": "team", "Value": "vision"}],
    }


def prefix(name: str, url: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def test_stages_are_chained_by_prefixes() -> None:
    plan = plan_of()
    places = {
        name: {each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"] for each in request["InputDataConfig"]}
        for name, request in checked_requests(plan).items()
    }
    run = "s3://bucket/runs/first"
    assert places["split"] == {"train": "s3://bucket/train/"}
    assert places["ensemble"] == {"model": f"{run}/folds/", "eval": "s3://bucket/eval/", "folds": f"{run}/split/"}
    assert places["evaluate"]["predictions"] == f"{run}/ensemble/"
    assert places["evaluate"]["ground_truth"] == "s3://bucket/eval/gt.csv"
    assert places["distill"]["model"] == f"{run}/folds/"
    assert places["distill"]["unlabeled"] == "s3://bucket/more/"
    assert places["ensemble-student"]["model"] == f"{run}/distill/"
    assert places["evaluate-student"]["predictions"] == f"{run}/ensemble-student/"
    # no channel of a stage reads another's checkpoints, and what it reads is what the stage knows
    for step in plan.steps:
        assert set(places[step.name]) <= {*STAGES[step.stage].channels, *STAGES[step.stage].optional}
        assert not any("checkpoints" in url for url in places[step.name].values())


def test_no_prefix_of_a_channel_takes_in_another_steps_outputs() -> None:
    found = checked_requests(plan_of(seeds=[1, 2]))
    outputs = {name: f"{request['OutputDataConfig']['S3OutputPath']}/" for name, request in found.items()}
    assert len(set(outputs.values())) == len(found)
    for request in found.values():
        for channel in request["InputDataConfig"]:
            url = channel["DataSource"]["S3DataSource"]["S3Uri"]
            taken = {name for name, output in outputs.items() if output.startswith(url)}
            assert len(taken) <= 1 or (url.endswith("/folds/") and all(name.startswith("fold-") for name in taken))


def test_each_stage_has_its_own_instance_price_and_limits() -> None:
    plan = plan_of(
        "sagemaker.spot=true",
        "sagemaker.stages.ensemble.instance_type=ml.c6i.xlarge",
        "SAGEMAKER__STAGES__ENSEMBLE__SPOT=no",
        "sagemaker.stages.train-fold.max_wait_hours=30",
        "sagemaker.stages.split.tags={phase='data'}",
    )
    found = checked_requests(plan)
    assert found["ensemble"]["ResourceConfig"]["InstanceType"] == "ml.c6i.xlarge"
    assert "EnableManagedSpotTraining" not in found["ensemble"]
    assert found["fold-0"]["EnableManagedSpotTraining"] is True
    assert found["fold-0"]["StoppingCondition"]["MaxWaitTimeInSeconds"] == 30 * 3600
    assert found["distill"]["StoppingCondition"]["MaxWaitTimeInSeconds"] == 48 * 3600
    assert found["split"]["Tags"] == [{"Key": "phase", "Value": "data"}]
    assert "Tags" not in found["fold-0"]


def test_vpc_keys_pool_isolation_and_mode() -> None:
    inputs = Inputs("s3://bucket/train")
    given = (
        "sagemaker.subnets=subnet-1,subnet-2",
        "sagemaker.security_groups=sg-1",
        "sagemaker.kms_key=alias/out",
        "sagemaker.volume_kms_key=1234",
        "sagemaker.keep_alive_minutes=10",
        "sagemaker.isolate=true",
        "sagemaker.input_mode=FastFile",
        "sagemaker.compress=false",
        "sagemaker.environment={OMP_NUM_THREADS=4}",
    )
    request = checked_requests(plan_of(*given, inputs=inputs))["fold-2"]
    assert request["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    assert request["OutputDataConfig"]["KmsKeyId"] == "alias/out"
    assert request["OutputDataConfig"]["CompressionType"] == "NONE"
    assert request["ResourceConfig"]["VolumeKmsKeyId"] == "1234"
    assert request["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert request["EnableNetworkIsolation"] is True
    assert request["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    assert request["Environment"]["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("name", ["demo", "small_images", "mask_profile:age,smoke"])
def test_a_container_reads_the_settings_that_the_request_was_made_of(name: str) -> None:
    plan = plan_of("train.epochs=3", "distill.train.lr=0.01", "seed=7", recipe=name)
    for step in plan.steps:
        read = from_hyperparameters(requests.hyperparameters(plan, step))
        assert sections_of(read, step.stage) == sections_of(plan.settings, step.stage), step.name


def test_a_recipe_that_the_image_lacks_is_written_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[model]\nbackbone = "fivefold/small_net"\noptions = { widths = [8, 16], stem = 8 }\n'
        '[augment]\ntrain = [{ name = "random_crop", padding = 2 }, "horizontal_flip"]\n'
        '[train]\nlr = 5e-5\nmonitor = "acc"\n[predict]\nviews = ["plain", "flip"]\n'
        "[distill]\ntrain = { lr = 0.01 }\n[sagemaker]\nspot = true\nstages = { ensemble = { spot = false } }\n"
    )
    plan = plan_of("train.epochs=3", recipe=str(path))
    found = checked_requests(plan)
    given = found["fold-1"]["HyperParameters"]
    assert "recipe" not in given
    assert given["system"] == "mine"
    assert given["train__lr"] == "5e-05"
    assert all(re.fullmatch("[a-z0-9_]+", key) for key in given)
    assert not any("sagemaker" in key for request in found.values() for key in request["HyperParameters"])
    assert found["fold-1"]["EnableManagedSpotTraining"] is True
    for step in plan.steps:
        read = from_hyperparameters(requests.hyperparameters(plan, step))
        assert sections_of(read, step.stage) == sections_of(plan.settings, step.stage), step.name


def from_hyperparameters(given: dict[str, str]) -> Settings:
    """As `jobs` reads hyperparameters.json, whose values are texts."""
    return load([arguments_layer([f"{name}={value}" for name, value in given.items()])])


def sections_of(settings: Settings, stage: str) -> dict[str, Any]:
    tree = settings.model_dump()
    return {name: requests.tree_at(tree, name) for name in STAGES[stage].sections if name != "fold"}


@pytest.mark.parametrize("row", [{}, {"val_loss": float("nan")}, {"train_loss": 12.5, "val_f1_macro": 1.0}])
def test_the_regexes_read_what_the_log_says(row: dict[str, float]) -> None:
    full = {"epoch": 3, **dict.fromkeys(logline.METRICS, 0.25), "lr": 0.1, **row}
    line = f"2026-01-01 {logline.metric_line(2, full)}"
    metrics = fold_request()["AlgorithmSpecification"]["MetricDefinitions"]
    for metric in metrics:
        found = re.search(metric["Regex"], line)
        assert found is not None
        assert len(found.groups()) == 1
        assert float(found[1]) == pytest.approx(full[metric["Name"]], nan_ok=True)
        assert re.search(metric["Regex"], logline.metric_line(None, {"epoch": 1})) is None


@pytest.mark.parametrize(
    "run", ["first", "run_20261122_005101_0a1b2c3d", "a" * 200, "x.y_z", "Ünïcode-less", "9" * 30 + "-"]
)
def test_names_of_jobs_are_short_enough_and_told_apart(run: str) -> None:
    run = re.sub("[^A-Za-z0-9._-]", "u", run)
    plans = [plan_of(run=name, seeds=[42, 123456]) for name in (run, f"{run}0")]
    names = [request["TrainingJobName"] for plan in plans for request in checked_requests(plan).values()]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 63


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a role of another kind": (lambda r: r.update(RoleArn="arn:aws:iam::123456789012:user/me"), r"RoleArn=.*role/NAME"),
    "a role's name alone": (lambda r: r.update(RoleArn="fivefold-sagemaker-role"), "RoleArn=.*is not of the form"),
    "no role": (lambda r: r.pop("RoleArn"), 'Missing required parameter in input: "RoleArn"'),
    "101 hyperparameters": (
        lambda r: r["HyperParameters"].update({f"h{n}": "1" for n in range(101 - len(r["HyperParameters"]))}),
        "HyperParameters has 101 entries, and at most 100 are allowed",
    ),
    "a hyperparameter that is too long": (lambda r: r["HyperParameters"].update(x="y" * 2501), "2501 characters"),
    "a hyperparameter that is no text": (lambda r: r["HyperParameters"].update(x=3), "Invalid type for parameter"),
    "a job name of 64": (lambda r: r.update(TrainingJobName="j" * 64), "TrainingJobName=.*64 characters.*shorter run="),
    "a job name with a dot": (lambda r: r.update(TrainingJobName="a.b"), "is not of the form"),
    "spot with a warm pool": (
        lambda r: (
            r.update(EnableManagedSpotTraining=True),
            r["StoppingCondition"].update(MaxWaitTimeInSeconds=10**6),
            r["ResourceConfig"].update(KeepAlivePeriodInSeconds=60),
        ),
        "spot instances have no warm pool",
    ),
    "spot that waits less than it runs": (
        lambda r: (r.update(EnableManagedSpotTraining=True), r["StoppingCondition"].update(MaxWaitTimeInSeconds=5)),
        "MaxWaitTimeInSeconds=5 of spot instances contains",
    ),
    "a wait without spot": (
        lambda r: r["StoppingCondition"].update(MaxWaitTimeInSeconds=10**6),
        "spot instances alone",
    ),
    "21 channels": (
        lambda r: r.update(InputDataConfig=[prefix(f"c{n}", "s3://b/c/") for n in range(21)]),
        "InputDataConfig has 21 entries, and at most 20",
    ),
    "one channel twice": (
        lambda r: r["InputDataConfig"].append(prefix("train", "s3://b/c/")),
        "two channels are called",
    ),
    "a channel's name with a blank": (lambda r: r["InputDataConfig"][0].update(ChannelName="my data"), "ChannelName="),
    "101 variables": (
        lambda r: r["Environment"].update({f"V{n}": "1" for n in range(101 - len(r["Environment"]))}),
        "Environment has 101 entries",
    ),
    "a variable that is too long": (lambda r: r["Environment"].update(X="y" * 513), "513 characters"),
    "41 metrics": (
        lambda r: r["AlgorithmSpecification"].update(
            MetricDefinitions=[{"Name": f"m{n}", "Regex": "x"} for n in range(41)]
        ),
        "41 entries, and at most 40",
    ),
    "a regex of 501": (
        lambda r: r["AlgorithmSpecification"]["MetricDefinitions"][0].update(Regex="x" * 501),
        "501 characters, and at most 500",
    ),
    "a mistyped instance": (
        lambda r: r["ResourceConfig"].update(InstanceType="ml.g5.xlrage"),
        r"InstanceType='ml.g5.xlrage' is none that is known here; did you mean 'ml.g5.xlarge'",
    ),
    "an instance without ml.": (lambda r: r["ResourceConfig"].update(InstanceType="g5.xlarge"), "with ml. before it"),
    "a pool that is too long": (
        lambda r: r["ResourceConfig"].update(KeepAlivePeriodInSeconds=21601),
        "KeepAlivePeriodInSeconds=21601 is not from 0 to 21600",
    ),
    "another store": (lambda r: r["OutputDataConfig"].update(S3OutputPath="gs://b/x"), "S3OutputPath="),
    "a typo in a name": (lambda r: r.update(StopingCondition={}), "StopingCondition"),
    "51 tags": (lambda r: r.update(Tags=[{"Key": f"k{n}", "Value": ""} for n in range(51)]), "Tags has 51 entries"),
    "a tag with a bracket": (lambda r: r.update(Tags=[{"Key": "k", "Value": "a[b"}]), "see sagemaker.tags"),
    "six security groups": (
        lambda r: r.update(VpcConfig={"SecurityGroupIds": ["sg-1"] * 6, "Subnets": ["s-1"]}),
        "SecurityGroupIds has 6 entries",
    ),
    "a compression that there is not": (
        lambda r: r["OutputDataConfig"].update(CompressionType="ZIP"),
        "none that is known",
    ),
}


@pytest.mark.parametrize(("spoil", "says"), BAD.values(), ids=BAD)
def test_a_bad_request_is_told(spoil: Callable[[dict[str, Any]], object], says: str) -> None:
    request = copy.deepcopy(fold_request())
    check_request("fold-2", request)
    spoil(request)
    with pytest.raises(SettingsError, match=says) as error:
        check_request("fold-2", request)
    assert "CreateTrainingJob of fold-2" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sagemaker.role="], "sagemaker.role is not given for split"),
        (["sagemaker.role=admin-of-everything"], "RoleArn.*arn:aws:iam::ACCOUNT:role/NAME"),
        (["sagemaker.image="], "sagemaker.image is not given"),
        (["sagemaker.instance_type="], "sagemaker.instance_type is not given"),
        (["sagemaker.output="], "sagemaker.output is not given"),
        (["sagemaker.output=bucket/runs"], "is no URL"),
        (["sagemaker.output=gs://bucket/runs"], "only s3://"),
        (["sagemaker.stages.split.instance_count=2"], "split runs on one instance"),
        (["sagemaker.input_mode=FastFile"], "gt.csv is one file"),
        (["sagemaker.environment={STAGE='split'}"], "sets STAGE"),
        (["sagemaker.stages.evaluate.instance_type=ml.g5.large"], "CreateTrainingJob of evaluate.*none that is known"),
        (["sagemaker.max_cost=10"], "needs the price of ml.g5.xlarge for split"),
        (["sagemaker.max_cost=10", "sagemaker.price=1"], r"may cost up to 264\.00, above sagemaker.max_cost=10"),
    ],
)
def test_a_plan_that_cannot_run_is_told_before_anything_is_written(
    overrides: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["platform=sagemaker", "recipe=demo", "run=r", "sagemaker.region=eu-central-1"]
    given += [f"{name}={value}" for name, value in vars(INPUTS).items() if value]
    for dry in ([], ["--dry-run"], ["--dry-run", "--pipeline"]):
        with pytest.raises(SettingsError, match=says):
            submit.main([*given, *GIVEN, *overrides, *dry])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sagemaker.spot=true", "sagemaker.keep_alive_minutes=5"], "spot and keep_alive_minutes exclude each other"),
        (
            ["sagemaker.stages.distill.keep_alive_minutes=5", "sagemaker.spot=yes"],
            "stages.distill: spot and keep_alive",
        ),
        (["sagemaker.max_wait_hours=5"], "is of spot instances"),
        (["sagemaker.spot=true", "sagemaker.max_wait_hours=5"], "is less than max_hours=24"),
        (["sagemaker.subnets=subnet-1"], "go together"),
        (["sagemaker.keep_alive_minutes=400"], "at most 360"),
        (["sagemaker.instnce_type=x"], "did you mean 'sagemaker.instance_type'"),
        (["sagemaker.stages.ensemble.instnce_type=x"], "did you mean 'sagemaker.stages.ensemble.instance_type'"),
        (["sagemaker.stages.ensmble.spot=true"], "did you mean 'sagemaker.stages.ensemble.spot'"),
        (["sagemaker.stages.ensemble.max_hours=soon"], "a number is needed"),
        (["sagemaker.stages.ensemble.max_cost=3"], "unknown key"),
        (["sagemaker.stages={ensemble={output='s3://b'}}"], "stages.ensemble.output is nothing that a stage has"),
        (["sagemaker.stages={ensemble={max_hours=-1}}"], "stages.ensemble.max_hours"),
        (["sagemaker.stages={nothing={}}"], "the stages are split, train_fold"),
        (["sagemaker.tags={a=true}"], "tags.a=True is no text"),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        plan_of(*overrides)


def test_inputs_of_this_machine_are_told_how_they_get_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=rf"aws s3 sync {tmp_path} s3://BUCKET/train"):
        submit.main(["platform=sagemaker", f"train={tmp_path}", *GIVEN, "--dry-run"])


def test_a_region_is_needed_to_run_and_not_for_a_dry_run(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "jobs",
        "submit",
        "platform=sagemaker",
        "recipe=demo",
        "train=s3://b/train",
        *GIVEN,
    ]
    command += [f"runs={tmp_path / 'runs'}"]
    settings = {"cwd": REPOSITORY, "env": clean | nowhere, "capture_output": True, "text": True, "timeout": 60}
    ended = subprocess.run(command, check=False, **settings)
    assert ended.returncode == SettingsError.exit_code
    assert "no region for SageMaker: give sagemaker.region=" in ended.stderr
    assert not (tmp_path / "runs").exists()
    for flags in (["--dry-run"], ["--dry-run", "--pipeline"]):
        dry = subprocess.run([*command, *flags], check=True, **settings)
        assert json.loads(dry.stdout)
    ended = subprocess.run([*command, "sagemaker.region=nowhere"], check=False, **settings)
    assert "'nowhere' is no region" in ended.stderr


def test_cost_is_price_times_longest_runtime_of_every_job() -> None:
    plan = plan_of(
        "split.folds=3",
        "sagemaker.price=2",
        "sagemaker.max_hours=3",
        "sagemaker.stages.train_fold.instance_count=2",
        "sagemaker.stages.train_fold.keep_alive_minutes=30",
        "sagemaker.stages.evaluate.price=0.5",
        "sagemaker.stages.evaluate.max_hours=1",
    )
    by_step = {each.step: each.cost for each in cost.ceilings(plan)}
    assert by_step["split"] == 2 * 3
    assert by_step["fold-1"] == 2 * 2 * 3.5
    assert by_step["evaluate"] == 0.5
    assert sum(by_step.values()) == pytest.approx(6 + 3 * 14 + 6 + 0.5 + 6 + 6 + 0.5)
    assert "of 100 allowed" in cost.in_words(cost.check_cost(plan), 100)
    assert "not known" in cost.in_words(cost.ceilings(plan_of()), 0)


def test_the_stages_that_have_settings_of_their_own_are_those_of_a_plan() -> None:
    assert {step.stage.replace("-", "_") for step in plan_of().steps} == set(STAGES_OF_A_RUN)
    assert set(SageMaker.model_fields) > OF_A_STAGE


def test_a_pipeline_is_the_same_requests_in_the_same_order() -> None:
    plan = plan_of()
    definition = json.loads(launch.describe_pipeline(plan))
    assert definition["Version"] == "2020-12-01"
    by_name = {step["Name"]: step for step in definition["Steps"]}
    assert list(by_name) == [step.name for step in plan.steps]
    for step in plan.steps:
        found = by_name[step.name]
        assert found["Type"] == "Training"
        assert found.get("DependsOn", []) == list(step.needs)
        assert re.fullmatch(r"[A-Za-z0-9\-_]{1,64}", step.name)
        arguments = executed(found["Arguments"], "ab12cd34")
        moved = json.loads(
            json.dumps(requests.request_of(plan, step, "0")).replace("/runs/first/", "/runs/first/ab12cd34/")
        )
        assert {"TrainingJobName": moved["TrainingJobName"], **arguments} == moved
        check_request(step.name, {"TrainingJobName": "pipelines-ab12cd34-fold", **arguments})


def executed(value: Any, execution: str) -> Any:
    """What the service makes of a definition's expressions."""
    if isinstance(value, list):
        return [executed(part, execution) for part in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"Std:Join"}:
        return value["Std:Join"]["On"].join(executed(part, execution) for part in value["Std:Join"]["Values"])
    if set(value) == {"Get"}:
        assert value["Get"] == "Execution.PipelineExecutionId"
        return execution
    return {name: executed(part, execution) for name, part in value.items()}


def test_every_step_of_a_pipeline_depends_on_earlier_ones_alone() -> None:
    steps = pipeline.definition_of(plan_of(seeds=[1, 2]))["Steps"]
    seen: set[str] = set()
    for step in steps:
        assert set(step.get("DependsOn", [])) <= seen
        seen.add(step["Name"])


def test_what_botocore_knows_is_what_is_checked() -> None:
    model = botocore.session.Session().get_service_model("sagemaker")
    shape = model.operation_model("CreateTrainingJob").input_shape
    assert set(fold_request()) <= set(shape.members)
    assert checks._fits(r"([\p{L}\p{Z}\p{N}_.:/=+\-@]*)", "Größe 3")
    assert not checks._fits(r"([\p{L}\p{Z}\p{N}_.:/=+\-@]*)", "a[b")
