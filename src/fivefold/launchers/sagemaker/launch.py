"""The platform `sagemaker`: a plan's steps as training jobs, chained by their places in S3.

All is checked before anything starts, offline: the requests, and what they may cost.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from fivefold.launchers.plan import Inputs, Plan
from fivefold.launchers.sagemaker import checks, pipeline
from fivefold.launchers.sagemaker.cost import check_cost, in_words
from fivefold.launchers.sagemaker.fleet import Fleet
from fivefold.launchers.sagemaker.requests import root_of
from fivefold.launchers.sagemaker.service import Service
from fivefold.launchers.sagemaker.trainer import need_sdk
from fivefold.launchers.scheduler import Signals

log = logging.getLogger("fivefold")


def launch(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Runs the plan's steps as training jobs, folds side by side, at most `parallel` at a time (0: all).

    The exit code of the first that failed; 130 or 143 after SIGINT or SIGTERM, which leave the jobs as they are.
    """
    requests = checks.checked_requests(plan)
    with Signals() as signals:
        return Fleet(plan, requests, Service.of_region(checks.region_of(plan, environ)), parallel).work(signals)


def check(plan: Plan, environ: Mapping[str, str] = os.environ) -> None:
    """Raises a SettingsError for a plan that cannot run, or may cost too much; nothing is asked of the service."""
    checks.checked_requests(plan)
    say_cost(plan)
    checks.region_of(plan, environ)
    need_sdk("platform=sagemaker")


def say_cost(plan: Plan) -> None:
    """Tells what the plan may cost; a SettingsError where that is more than it may."""
    log.info("%s", in_words(check_cost(plan), plan.settings.sagemaker.max_cost))


def describe(plan: Plan, parallel: int = 0) -> str:
    """The requests of all steps as JSON, checked as they are before they are sent."""
    requests = checks.checked_requests(plan)
    say_cost(plan)
    return json.dumps(requests, indent=2, ensure_ascii=False)


def describe_pipeline(plan: Plan) -> str:
    """The definition of the plan's Pipeline as JSON, which has no secret and no name of a job in it."""
    definition = pipeline.definition_of(plan)
    say_cost(plan)
    return json.dumps(definition, indent=2, ensure_ascii=False)


def upsert_pipeline(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Creates the plan's Pipeline, or updates it; no execution is started, and boto3 is all that it needs."""
    request = pipeline.pipeline_request(plan, parallel)
    say_cost(plan)
    arn = pipeline.upsert(request, Service.of_region(checks.region_of(plan, environ)))
    print(arn)
    log.info("to run it: aws sagemaker start-pipeline-execution --pipeline-name %s", request["PipelineName"])
    return 0


def check_inputs(inputs: Inputs, _: Path) -> Inputs:
    return checks.check_inputs(inputs)


def results(plan: Plan) -> str:
    """Where what the jobs made lies, and how it comes here."""
    root = root_of(plan)
    return (
        f"results: {root}/\nto have them here: aws s3 cp --recursive {root}/ {plan.folder}/ --exclude 'checkpoints/*'"
    )
