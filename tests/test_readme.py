"""What the papers say exists, does."""

import re
from pathlib import Path

import pytest

from fivefold.contract.stages import STAGES
from fivefold.recipes import shipped_recipes
from fivefold.settings import SECTIONS, normal_key
from fivefold.settings import read_recipe as recipe
from jobs.__main__ import COMMANDS
from jobs.submit import KEYS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_stage_and_recipe_has_its_row():
    for name in [*STAGES, *shipped_recipes()]:
        assert f"\n| `{name}` |" in README, name


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
        assert key in KEYS or key in paths or key == "fold" or key.split(".")[0] in SECTIONS, key


def test_recipes_that_the_papers_name_are_shipped():
    for name in re.findall(r"recipe=(\w+)", README):
        assert recipe(name)


def test_paths_in_the_papers_exist():
    tree = README.split("```\njobs/ ")[1].split("```")[0]
    folder = ROOT
    for line in ("jobs/ " + tree).splitlines():
        names = line.split("  ")[0] if not line.startswith(" ") else line[2:].split("   ")[0]
        if not line.startswith(" "):
            folder = ROOT / names.strip().split(" ")[0]
            assert folder.is_dir(), folder
            continue
        for name in names.split():
            assert list(folder.glob(name)), f"{folder}/{name}"
    for path in re.findall(
        r"`((?:training|data|models|inference|evaluation|contract|launchers)/\w+\.py)`", CONTRIBUTING
    ):
        assert (ROOT / "src" / "fivefold" / path).is_file(), path
    code = "".join(
        file.read_text() for folder in ("src", "jobs", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    )
    for table in re.findall(r"`([A-Z]{4,}S)`", CONTRIBUTING):
        assert re.search(rf"^{table}\b.* = ", code, re.MULTILINE), table


def test_nothing_is_left_to_fill_in_and_linked_files_exist():
    assert "@@" not in README
    for target in re.findall(r"\]\(([^)#:]+)\)", README + CONTRIBUTING):
        assert (ROOT / target).is_file(), target


def test_the_layers_are_those_that_are_checked():
    written = CONTRIBUTING.split("## Who may import whom\n\n```\n")[1].split("```")[0].split("\n")[:-1]
    contract = (ROOT / "pyproject.toml").read_text().split("layers = [")[1].split("]")[0]
    checked = [line.strip(' ",').replace("fivefold.", "") for line in contract.splitlines() if line.strip()]
    assert written == checked
