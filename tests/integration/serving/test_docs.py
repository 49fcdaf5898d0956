"""docs/serving.md names existing settings, and its code creates an endpoint on a server of SageMaker's protocol."""

import re
from pathlib import Path

import boto3

from fivefold.config.loading import environment_layer
from fivefold.config.schema import Serve
from fivefold.serving.protocol import CSV, JSON

DOCS = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_documented_code_creates_the_sagemaker_endpoint(s3_endpoint, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    exec(re.search("```python\n(.+?)```", DOCS, re.DOTALL)[1], {})
    endpoint = boto3.client("sagemaker").describe_endpoint(EndpointName="cars")
    assert endpoint["ProductionVariants"][0]["VariantName"] == "all"
    container = boto3.client("sagemaker").describe_model(ModelName="cars")["PrimaryContainer"]
    assert environment_layer(container["Environment"]).values == {"serve.batch_size": "64"}


def test_every_limit_named_in_the_docs_is_a_setting():
    documented = {name.lower() for name in re.findall(r"(?:`serve\.|SERVE__)(\w+)", DOCS)}
    named = {"max_queue", "max_body_mb", "max_megapixels", "timeout_s", "drain_s"}
    assert named <= documented <= set(Serve.model_fields)
    assert all(f"`Accept: {content_type}`" in DOCS for content_type in (JSON, CSV))
