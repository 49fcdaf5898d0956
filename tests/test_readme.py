"""What the papers say exists, does."""

import re
from pathlib import Path

import pytest

from fivefold.contract.stages import STAGES
from fivefold.recipes import shipped_recipes
from fivefold.settings import SECTIONS, normal_key
from fivefold.settings import read_recipe as recipe
from jobs.__main__ import COMMANDS
from jobs.submit import Keys

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_stage_and_recipe_has_its_row():
    for name in [*STAGES, *shipped_recipes()]:
        assert f"\n| `{name}` |" in README, name
    assert all(recipe(name) for name in re.findall(r"recipe=(\w+)", README))


@pytest.mark.parametrize("line", sorted(set(re.findall(r"python (?:-m jobs|jobs/).*", README))))
def test_every_command_names_a_stage_and_known_keys(line):
    command, *rest = re.findall(r"(?:-m jobs|jobs/)\s*([\w-]+)(.*)", line)[0]
    name = command.removesuffix(".py").replace("_", "-")
    if name == "STAGE":
        return
    assert name in {*STAGES, *COMMANDS, "train"} or line.startswith("python -m jobs --help")
    stage = STAGES.get(name)
    paths = {*stage.channels, *stage.optional, "output"} if stage and stage.by_argument else set()
    for key, _ in re.findall(r"([A-Za-z_.]+)=(\S+)", rest[0]):
        key = normal_key(key)
        assert key in Keys.model_fields or key in paths or key == "fold" or key.split(".")[0] in SECTIONS, key


def test_nothing_is_left_to_fill_in_and_linked_files_exist():
    assert "@@" not in README
    for target in re.findall(r"\]\(([^)#:]+)\)", README + CONTRIBUTING):
        assert (ROOT / target).is_file(), target
