"""SageMaker requests of a plan, checked without region, credentials and network, and the contents of docs/sagemaker.md."""

import json
import os
import re
import shlex
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from fivefold.config.loading import arguments_layer, flatten, in_sections, load, read_recipe
from fivefold.config.schema import RUN_STAGES, SageMaker, Settings
from fivefold.contract.s3.urls import parse
from fivefold.contract.stage_specs import LOGGED_METRICS, STAGES
from fivefold.errors import SettingsError
from fivefold.launchers.plan import Inputs, Plan, make_plan
from fivefold.launchers.sagemaker import launch
from fivefold.launchers.sagemaker.requests import build_requests
from fivefold.launchers.sagemaker.validation import check_cost, check_request, validate_requests
from fivefold.training.loggers import stdout_logger
from iam_policy import Policy
from jobs import submit
from reference_run import REPOSITORY
from sagemaker_service import IMAGE, ROLE

DOCS = (REPOSITORY / "docs" / "sagemaker.md").read_text(encoding="utf-8")
REQUIRED_SETTINGS = (
    f"sagemaker.image={IMAGE}",
    f"sagemaker.role={ROLE}",
    "sagemaker.output=s3://bucket/runs",
    "sagemaker.instance_type=ml.g5.xlarge",
)
INPUTS = Inputs("s3://bucket/train", "s3://bucket/eval", "s3://bucket/eval/gt.csv", "s3://bucket/more/")


def make_sagemaker_plan(
    *overrides: str, run: str = "first", recipe: str = "demo", inputs: Inputs = INPUTS, **options: Any
) -> Plan:
    return make_plan(inputs, [*REQUIRED_SETTINGS, *overrides], run, "runs", recipe, **options)


def make_channel(name: str, url: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def test_request_of_a_fold_is_complete() -> None:
    """Check the minimal request, then one with every setting."""
    request = validate_requests(make_sagemaker_plan("train.epochs=3", "sagemaker.max_hours=1.5"))["fold-2"]
    assert json.loads(json.dumps(request)) == request
    assert re.fullmatch(r"fivefold-first-fold-2-\d{14}", request.pop("TrainingJobName"))
    metrics = request["AlgorithmSpecification"].pop("MetricDefinitions")
    assert [metric["Name"] for metric in metrics] == list(LOGGED_METRICS)
    request["InputDataConfig"].sort(key=lambda channel: channel["ChannelName"])
    assert request == {
        "RoleArn": ROLE,
        "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File"},
        "HyperParameters": {"recipe": "demo", "train__epochs": "3"},
        "Environment": {"STAGE": "train-fold", "FOLD": "2", "FIVEFOLD_IMAGE": IMAGE},
        "InputDataConfig": [
            make_channel("folds", "s3://bucket/runs/first/split/"),
            make_channel("train", "s3://bucket/train/"),
        ],
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/runs/first/folds/fold-2", "CompressionType": "GZIP"},
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
        "EnableNetworkIsolation": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": 5400},
        "CheckpointConfig": {
            "S3Uri": "s3://bucket/runs/first/checkpoints/fold-2",
            "LocalPath": "/opt/ml/checkpoints",
        },
    }
    settings = """subnets=subnet-1,subnet-2 security_groups=sg-1 kms_key=alias/out volume_kms_key=1234
        keep_alive_minutes=10 input_mode=FastFile compress_outputs=false environment={OMP_NUM_THREADS=4} tags={team='vision'}"""
    overrides = [f"sagemaker.{setting}" for setting in settings.split()]
    full = validate_requests(make_sagemaker_plan("train.epochs=3", *overrides, inputs=Inputs("s3://bucket/train")))[
        "fold-2"
    ]
    assert full["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    for name in ("TrainingJobName", "AlgorithmSpecification", "StoppingCondition"):
        del full[name]
    assert {name: part for name, part in full.items() if part != request.get(name)} == {
        "Environment": {**request["Environment"], "OMP_NUM_THREADS": "4"},
        "OutputDataConfig": {**request["OutputDataConfig"], "CompressionType": "NONE", "KmsKeyId": "alias/out"},
        "ResourceConfig": {**request["ResourceConfig"], "VolumeKmsKeyId": "1234", "KeepAlivePeriodInSeconds": 600},
        "VpcConfig": {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]},
        "Tags": [{"Key": "team", "Value": "vision"}],
    }


@pytest.mark.parametrize(
    ("overrides", "connected_stages"),
    [
        ([], set()),
        (["train.loggers="], set()),
        (["model.pretrained=true"], {"train-fold", "distill"}),
        (["model.pretrained=auto"], {"train-fold", "distill"}),
        (["model.pretrained=auto", "offline=true"], set()),
        (["model.pretrained=auto", "model.weights=net.pth"], set()),
        (["distill.model.pretrained=true"], {"distill"}),
        (["train.loggers=tensorboard,mlflow"], {"train-fold", "distill"}),
        (["model.pretrained=true", "sagemaker.network_isolation=true"], set()),
        (["sagemaker.network_isolation=false", "sagemaker.stages.split.network_isolation=true"], {*STAGES} - {"split"}),
    ],
)
def test_container_has_network_access_only_if_the_stage_downloads_something(overrides, connected_stages):
    plan = make_sagemaker_plan("distill.model={backbone='fivefold/small_net'}", *overrides)
    for name, request in validate_requests(plan).items():
        assert request.get("EnableNetworkIsolation", False) is (plan.step(name).stage not in connected_stages), name


def test_input_channels_use_the_output_prefixes_of_earlier_stages() -> None:
    plan = make_sagemaker_plan()
    channels = {
        name: {
            channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
            for channel in request["InputDataConfig"]
        }
        for name, request in validate_requests(plan).items()
    }
    run = "s3://bucket/runs/first"
    assert channels["split"] == {"train": "s3://bucket/train/", "eval": "s3://bucket/eval/"}
    assert channels["ensemble"] == {"model": f"{run}/folds/", "eval": "s3://bucket/eval/", "folds": f"{run}/split/"}
    assert channels["evaluate"]["predictions"] == f"{run}/ensemble/"
    assert channels["evaluate"]["ground_truth"] == "s3://bucket/eval/gt.csv"
    assert channels["distill"]["model"] == f"{run}/folds/"
    assert channels["distill"]["unlabeled"] == "s3://bucket/more/"
    assert channels["ensemble-student"]["model"] == f"{run}/distill/"
    assert channels["evaluate-student"]["predictions"] == f"{run}/ensemble-student/"
    # No channel contains checkpoints, or the outputs of several steps that are not folds.
    requests = validate_requests(make_sagemaker_plan(seeds=[1, 2]))
    outputs = {name: f"{request['OutputDataConfig']['S3OutputPath']}/" for name, request in requests.items()}
    assert len(set(outputs.values())) == len(requests)
    for url in {url for urls in channels.values() for url in urls.values()}:
        assert "checkpoints" not in url
        producers = [name for name, output in outputs.items() if output.startswith(url)]
        assert len(producers) <= 1 or (url.endswith("/folds/") and all(name.startswith("fold-") for name in producers))


def test_each_stage_has_its_own_instance_price_and_limits() -> None:
    plan = make_sagemaker_plan(
        "sagemaker.spot=true",
        "sagemaker.stages.ensemble.instance_type=ml.c6i.xlarge",
        "SAGEMAKER__STAGES__ENSEMBLE__SPOT=no",
        "sagemaker.stages.train-fold.max_wait_hours=30",
        "sagemaker.stages.split.tags={phase='data'}",
    )
    requests = validate_requests(plan)
    assert requests["ensemble"]["ResourceConfig"]["InstanceType"] == "ml.c6i.xlarge"
    assert "EnableManagedSpotTraining" not in requests["ensemble"]
    assert requests["fold-0"]["EnableManagedSpotTraining"] is True
    assert requests["fold-0"]["StoppingCondition"]["MaxWaitTimeInSeconds"] == 30 * 3600
    assert requests["distill"]["StoppingCondition"]["MaxWaitTimeInSeconds"] == 48 * 3600
    assert requests["split"]["Tags"] == [{"Key": "phase", "Value": "data"}]
    assert {step.stage.replace("-", "_") for step in plan.steps} == set(RUN_STAGES)


USER_RECIPE = """
[model]
backbone = "fivefold/small_net"
backbone_kwargs = { widths = [8, 16], stem = 8 }
[augment]
train = [{ name = "random_crop", padding = 2 }, "horizontal_flip"]
[train]
lr = 5e-5
monitor = "acc"
[predict]
tta = ["plain", "flip"]
[distill]
train = { lr = 0.01 }
[sagemaker]
spot = true
stages = { ensemble = { spot = false } }
"""


@pytest.mark.parametrize("recipe", ["demo", "mask_profile:age,smoke", "mine.toml"])
def test_container_reads_the_settings_of_the_plan_from_the_request(recipe, tmp_path, monkeypatch):
    """Read the settings as `jobs` reads hyperparameters.json, from strings. A recipe that is not in the image is written out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(USER_RECIPE)
    plan = make_sagemaker_plan("train.epochs=3", "distill.train.lr=0.01", "seed=7", recipe=recipe)
    for name, request in validate_requests(plan).items():
        values = request["HyperParameters"]
        assert all(re.fullmatch("[a-z0-9_]+", key) and "sagemaker" not in key for key in values)
        assert ("recipe" in values) == (recipe != "mine.toml")
        settings = load([arguments_layer([f"{key}={value}" for key, value in values.items()])])
        stage = plan.step(name).stage
        assert settings_of_stage(settings, stage) == settings_of_stage(plan.settings, stage), name
    assert recipe != "mine.toml" or request["EnableManagedSpotTraining"] is True


def settings_of_stage(settings: Settings, stage: str) -> dict[str, Any]:
    return {key: value for key, value in flatten(settings).items() if in_sections(key, STAGES[stage].sections)}


def test_metric_regexes_match_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "epoch": 3,
        **dict.fromkeys(LOGGED_METRICS, 0.25),
        "lr": 0.1,
        "val_loss": float("nan"),
        "val_acc": 1.0,
    }
    stdout_logger(2)(metrics)
    stdout_logger(None)({"epoch": 1})
    line, line_without_metrics = (f"2026-01-01 {line}" for line in capsys.readouterr().out.splitlines())
    assert line_without_metrics.split()[1:3] == ["metric", "fold=student"]
    for metric in build_requests(make_sagemaker_plan())["fold-2"]["AlgorithmSpecification"]["MetricDefinitions"]:
        match = re.search(metric["Regex"], line)
        assert float(match[1]) == pytest.approx(metrics[metric["Name"]], nan_ok=True)
        assert re.search(metric["Regex"], line_without_metrics) is None


@pytest.mark.parametrize("run", ["run_20261122_005101_0a1b2c3d", "a" * 149, "9" * 30 + "-"])
def test_job_names_are_short_enough_and_unique(run: str) -> None:
    plans = [make_sagemaker_plan(run=name, seeds=[42, 123456]) for name in (run, f"{run}0")]
    names = [request["TrainingJobName"] for plan in plans for request in validate_requests(plan).values()]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 63


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("RoleArn", None, "role/NAME"),
        ("HyperParameters", dict.fromkeys(map(str, range(101)), "1"), "101"),
        ("HyperParameters.x", "y" * 2501, "2501"),
        ("HyperParameters.x", 3, "Invalid type"),
        ("TrainingJobName", "j" * 64, "shorter run="),
        ("InputDataConfig", [make_channel(f"c{n}", "s3://b/c/") for n in range(21)], "21"),
        ("InputDataConfig", [make_channel("my data", "s3://b/c/")], "'my data'"),
        ("ResourceConfig.InstanceType", "ml.g5.xlrage", "'ml.g5.xlarge'"),
        ("ResourceConfig.KeepAlivePeriodInSeconds", 21601, "21600"),
        ("StopingCondition", {}, "StopingCondition"),
        ("Tags", [{"Key": "k", "Value": "a[b"}], "'a[b'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_requests_that_sagemaker_would_refuse_raise_an_error_that_names_the_value(path, value, expected):
    request = validate_requests(make_sagemaker_plan("sagemaker.tags={'größe'='3 m'}"))["fold-2"]
    *parents, last = path.split(".")
    part = reduce(dict.__getitem__, parents, request)
    part[last] = value
    if value is None:
        del part[last]
    with pytest.raises(SettingsError) as error:
        check_request("fold-2", request)
    assert all(text in str(error.value) for text in ("CreateTrainingJob of fold-2", last, expected))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image=", "sagemaker.image"),
        ("instance_type=", "InstanceType"),
        ("output=", "sagemaker.output"),
        ("stages.split.instance_count=2", "sagemaker.instance_count=2"),
        ("input_mode=FastFile", "gt.csv"),
        ("environment={STAGE='split'}", "STAGE"),
        ("stages.evaluate.instance_type=ml.g5.large", "CreateTrainingJob of evaluate.*'ml.g5.large'"),
        ("max_cost=10", "max_cost=10 .*price.* of split"),
        ("max_cost=10 hourly_price=1", r"up to 264\.00, above sagemaker.max_cost=10"),
        ("spot=true keep_alive_minutes=5", "spot and keep_alive_minutes"),
        ("spot=true max_wait_hours=5", "max_hours=24"),
        ("subnets=subnet-1", "security_groups"),
        ("stages.ensemble.instnce_type=x", "'sagemaker.stages.ensemble.instance_type'"),
        ("stages={ensemble={output='s3://b'}}", "stages.ensemble.output"),
    ],
)
def test_invalid_settings_raise_errors_before_any_file_is_written(override, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["platform=sagemaker", "recipe=demo", "run=r", "sagemaker.region=eu-central-1", *REQUIRED_SETTINGS]
    args += [f"{name}={value}" for name, value in vars(INPUTS).items() if value]
    args += [f"sagemaker.{setting}" for setting in override.split(" ")]
    with pytest.raises(SettingsError, match=message):
        submit.main(args)
    assert list(tmp_path.iterdir()) == []


def test_region_is_required_except_for_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=rf"aws s3 sync {tmp_path} s3://BUCKET/train"):
        submit.main(["platform=sagemaker", f"train={tmp_path}", *REQUIRED_SETTINGS, "--dry-run"])
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.chdir(tmp_path)
    args = ["platform=sagemaker", "train=s3://b/train", *REQUIRED_SETTINGS, "check=false"]
    for region in ([], ["sagemaker.region=nowhere"]):
        with pytest.raises(SettingsError, match=r"sagemaker\.region="):
            submit.main([*args, *region])
    assert submit.main([*args, "--dry-run"]) == submit.main([*args, "--pipeline"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_cost_is_price_times_maximum_runtime_of_every_job() -> None:
    overrides = ["split.folds=3", "sagemaker.hourly_price=2", "sagemaker.max_hours=3"]
    overrides += ["sagemaker.stages.train_fold.instance_count=2", "sagemaker.stages.train_fold.keep_alive_minutes=30"]
    plan = make_sagemaker_plan(
        *overrides, "sagemaker.stages.evaluate.hourly_price=0.5", "sagemaker.stages.evaluate.max_hours=1"
    )
    # split, three folds on two instances with half an hour of a warm pool, ensemble, evaluate, distill and the student's
    assert f"{6 + 3 * 2 * 2 * 3.5 + 6 + 0.5 + 6 + 6 + 0.5:.2f}" in check_cost(plan)


def test_encrypted_traffic_applies_only_to_folds_with_several_hosts() -> None:
    overrides = ["sagemaker.encrypt_traffic=true", "sagemaker.stages.train_fold.instance_count=2"]
    for name, request in build_requests(make_sagemaker_plan(*overrides)).items():
        check_request(name, request)
        assert request.get("EnableInterContainerTrafficEncryption", False) == name.startswith("fold-")


def test_pipeline_has_the_same_requests_in_the_same_order() -> None:
    plan = make_sagemaker_plan(seeds=[1, 2])
    definition = json.loads(launch.describe_pipeline(plan), object_hook=resolve_expression)
    assert definition["Version"] == "2020-12-01"
    assert [step["Name"] for step in definition["Steps"]] == [step.name for step in plan.steps]
    requests = json.dumps(build_requests(plan)).replace("/runs/first/", f"/runs/first/{EXECUTION_ID}/")
    for step, pipeline_step in zip(plan.steps, definition["Steps"], strict=True):
        assert pipeline_step["Type"] == "Training"
        assert pipeline_step.get("DependsOn", []) == list(step.needs)
        assert re.fullmatch(r"[A-Za-z0-9\-_]{1,64}", step.name)
        name = {"TrainingJobName": f"pipelines-{EXECUTION_ID}-fold"}
        assert pipeline_step["Arguments"] | name == json.loads(requests)[step.name] | name
        check_request(step.name, pipeline_step["Arguments"] | name)


def test_printed_plans_contain_names_of_variables_and_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["recipe=demo", "run=r", *REQUIRED_SETTINGS, "check=false", "--dry-run"]
    settings.append("sagemaker.environment={API_TOKEN='canary', TOKENS='canaries'}")
    settings.append("sagemaker.stages.split.environment={OTHER='canary-of-split'}")
    for arguments in (
        ["platform=sagemaker", "train=s3://bucket/train"],
        ["platform=sagemaker", "train=s3://bucket/train", "--pipeline"],
        ["platform=sagemaker-local", f"train={REPOSITORY / 'docs'}"],
    ):
        assert submit.main([*arguments, *settings]) == 0
        output = "".join(capsys.readouterr())
        assert all(name in output for name in ("API_TOKEN", "OTHER", "STAGE"))
        assert "canar" not in output


def test_pipeline_has_a_parameter_for_each_variable() -> None:
    definition = json.loads(
        launch.describe_pipeline(make_sagemaker_plan("sagemaker.environment={API_TOKEN='canary', N=4}"))
    )
    assert definition["Parameters"] == [{"Name": "API_TOKEN", "Type": "String"}, {"Name": "N", "Type": "String"}]
    for step in definition["Steps"]:
        variables = step["Arguments"]["Environment"]
        assert (variables["API_TOKEN"], variables["N"]) == ({"Get": "Parameters.API_TOKEN"}, {"Get": "Parameters.N"})
        assert variables["STAGE"] in STAGES
    conflicting_plan = make_sagemaker_plan(
        "sagemaker.environment={N=4}", "sagemaker.stages.split.environment={N=55555}"
    )
    with pytest.raises(SettingsError, match="sets N to") as caught:
        launch.describe_pipeline(conflicting_plan)
    assert "55555" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "sagemaker.environment={API_TOKEN='canary'",
        "sagemaker.environment={API_TOKEN=['canary']}",
        "sagemaker.environment.API_TOKEN=canary",
        "sagemaker.stages.split.environment=canary",
        "sagemaker.stages={split={environment={A=['canary']}}}",
        f"sagemaker.environment={{API_TOKEN='canary{'y' * 600}'}}",
        "sagemaker.environment={'API TOKEN'='canary'}",
        "sagemaker.environment={STAGE='canary'}",
    ],
)
def test_error_about_a_variable_does_not_contain_its_value(setting: str) -> None:
    with pytest.raises(SettingsError) as caught:
        validate_requests(make_sagemaker_plan(setting))
    assert "canary" not in str(caught.value)
    assert "sagemaker" in str(caught.value).lower()


EXECUTION_ID = "ab12cd34"


def resolve_expression(table: dict[str, Any]) -> Any:
    """Resolve an expression of a pipeline definition as the service does."""
    if "Std:Join" in table:
        return table["Std:Join"]["On"].join(table["Std:Join"]["Values"])
    return EXECUTION_ID if table == {"Get": "Execution.PipelineExecutionId"} else table


def test_role_reads_the_data_and_writes_only_below_the_prefix() -> None:
    role = Policy("sagemaker-role-policy.json")
    inputs = Inputs(
        "s3://bucket/data/train", "s3://bucket/data/eval", "s3://bucket/data/gt.csv", "s3://bucket/data/more/"
    )
    for request in validate_requests(make_sagemaker_plan(inputs=inputs)).values():
        for channel in request["InputDataConfig"]:
            url = parse(channel["DataSource"]["S3DataSource"]["S3Uri"], "channel")
            assert role.lists(url.bucket, url.key), url
            assert "Get" in role.of_objects(url.bucket, f"{url.key}/x"), url
        checkpoints = request.get("CheckpointConfig", {}).get("S3Uri")
        for output_url in (request["OutputDataConfig"]["S3OutputPath"], *filter(None, [checkpoints])):
            url = parse(output_url, "output")
            assert role.of_objects(url.bucket, f"{url.key}/job/output/model.tar.gz") == {"Get", "Put", "Delete"}
            assert role.allows("s3:AbortMultipartUpload", f"arn:aws:s3:::{url.bucket}/{url.key}/x")
    check_no_other_access(role)
    assert role.of_objects("bucket", "data/train/a.png") == {"Get"}
    assert not role.allows("ecr:BatchGetImage", "arn:aws:ecr:eu-central-1:123456789012:repository/other")


def test_caller_lists_and_deletes_only_below_the_prefix() -> None:
    caller = Policy("sagemaker-caller-policy.json")
    for request in validate_requests(make_sagemaker_plan()).values():
        url = parse(request["OutputDataConfig"]["S3OutputPath"], "output")
        assert caller.lists(url.bucket, f"{url.key}/"), "Store.below lists this prefix"
        assert caller.of_objects(url.bucket, f"{url.key}/job/x") == {"Delete"}
        job = f"arn:aws:sagemaker:eu-central-1:123456789012:training-job/{request['TrainingJobName']}"
        for action in ("CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob", "AddTags"):
            assert caller.allows(f"sagemaker:{action}", job)
        assert caller.allows("iam:PassRole", request["RoleArn"], PassedToService="sagemaker.amazonaws.com")
        assert not caller.allows("iam:PassRole", request["RoleArn"], PassedToService="ec2.amazonaws.com")
        assert not caller.allows(
            "iam:PassRole", f"{request['RoleArn']}-admin", PassedToService="sagemaker.amazonaws.com"
        )
    assert not caller.allows("sagemaker:StopTrainingJob", job.replace("/fivefold-", "/other-"))
    check_no_other_access(caller)
    assert caller.of_objects("bucket", "data/train/a.png") == set()


def check_no_other_access(policy: Policy) -> None:
    for key in ("secret", "other/x", "runs", "runs2/x", "database/x", "x/runs/y"):
        assert policy.of_objects("bucket", key) == set(), key
    assert policy.of_objects("bucket2", "runs/x") == set()
    for prefix in ("", "r", "run", "runs2/", "other/", "dat", "data2/"):
        assert not policy.lists("bucket", prefix), prefix
    assert not policy.allows("s3:ListBucket", "arn:aws:s3:::bucket"), "without a prefix this lists the whole bucket"


def test_role_trusts_sagemaker_only_for_this_account() -> None:
    trust = Policy("sagemaker-trust-policy.json")
    account, job = "123456789012", "arn:aws:sagemaker:eu-central-1:{}:training-job/x"
    assert trust.allows("sts:AssumeRole", SourceAccount=account)
    assert trust.allows("sts:AssumeRole", SourceAccount=account, SourceArn=job.format(account))
    assert not trust.allows("sts:AssumeRole")
    assert not trust.allows("sts:AssumeRole", SourceAccount="999999999999")
    assert not trust.allows("sts:AssumeRole", SourceAccount=account, SourceArn=job.format("999999999999"))
    assert trust.statements[0]["Principal"] == {"Service": "sagemaker.amazonaws.com"}


def test_recipe_and_commands_in_the_docs_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(block.replace("BUCKET/PREFIX", "bucket/prefix"))
    assert read_recipe(str(path))["sagemaker"]["stages"]["split"]["hourly_price"] == 0.23
    prose = re.sub(r"```python\n.*?```", "", DOCS, flags=re.DOTALL)
    keys = set(re.findall(r"sagemaker\.([a-z_]+)\b(?!/)", prose))
    assert keys <= {*SageMaker.model_fields, "md", "json", "amazonaws"}
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python -m jobs (submit [^>\n]*recipe=mine.toml[^>\n]*)", DOCS)
    assert len(commands) == 3
    for command in commands:
        args = shlex.split(command.replace("BUCKET", "bucket"))[1:]
        assert submit.main([*dict.fromkeys([*args, "--dry-run", "check=false"])]) == 0
