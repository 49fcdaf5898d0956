"""What docs/sagemaker.md says can be done as it stands there: policies, the recipe, the commands."""

import json
import re
import shlex
from pathlib import Path

import pytest

from fivefold.settings import read_recipe
from jobs import submit

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "sagemaker.md").read_text(encoding="utf-8")
POLICIES = sorted(DOCS.glob("sagemaker-*-policy.json"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_policies_name_each_action_and_each_resource(path: Path) -> None:
    assert path.name in PAGE
    policy = json.loads(path.read_text())
    assert policy["Version"] == "2012-10-17"
    actions = [action for statement in policy["Statement"] for action in statement["Action"]]
    assert len(set(actions)) == len(actions)
    assert all(re.fullmatch(r"[a-z0-9]+:[A-Z][A-Za-z]+", action) for action in actions)  # no * among them
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        everything = statement.get("Resource") == "*"  # only what AWS knows no resource of
        without_resource = {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "sagemaker:ListPipelines"}
        assert not everything or {*statement["Action"]} <= without_resource
        assert re.search("ACCOUNT|BUCKET", json.dumps(statement)) or everything


def test_the_recipe_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(block.replace("BUCKET/PREFIX", "bucket/prefix"))
    assert read_recipe(str(path))["sagemaker"]["stages"]["split"]["price"] == 0.23
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python -m jobs (submit .*recipe=mine.toml.*)", PAGE)
    assert len(commands) == 2
    for command in commands:
        given = shlex.split(command.replace("BUCKET", "bucket"))[1:]
        assert submit.main([*dict.fromkeys([*given, "--dry-run"])]) == 0


def test_every_key_of_the_page_is_one() -> None:
    fields = submit.Settings.model_fields["sagemaker"].default.__class__.model_fields
    for key in re.findall(r"sagemaker\.([a-z_]+)\b(?!/)", PAGE):
        assert key in fields or key in ("md", "json", "amazonaws"), key
