"""What docs/serving.md shows, done: the requests to SageMaker by botocore's own checks, on a server of its protocol."""

import re
from pathlib import Path

import boto3
import pytest

from fivefold.config.loading import environment_layer
from fivefold.config.schema import Settings
from fivefold.serving.protocol import RENDERERS

DOCS = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_model_on_sagemaker_is_made_as_written(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    exec(re.search("```python\n(.+?)```", DOCS, re.DOTALL)[1], {})
    made = boto3.client("sagemaker").describe_endpoint(EndpointName="cars")
    assert made["ProductionVariants"][0]["VariantName"] == "all"
    container = boto3.client("sagemaker").describe_model(ModelName="cars")["PrimaryContainer"]
    assert environment_layer(container["Environment"]).values == {"serve.batch_size": "64"}


def test_every_limit_that_the_docs_name_is_a_key() -> None:
    named = set(re.findall(r"`serve\.(\w+)`", DOCS)) | {name.lower() for name in re.findall(r"SERVE__(\w+)", DOCS)}
    assert named <= set(type(Settings().serve).model_fields)
    assert {"max_queue", "max_body_mb", "max_megapixels", "timeout_s", "drain_s"} <= named
    assert [form for form in RENDERERS if f"`Accept: {form}`" not in DOCS.replace(" (default)", "")] == []
