"""The README and the pages in docs/ match the code: stages, recipes, commands, keys, settings and links."""

import re
from pathlib import Path

from fivefold.config.loading import SECTIONS, normalize_key, reference
from fivefold.config.loading import read_recipe as recipe
from fivefold.config.recipes import shipped_recipes
from fivefold.config.schema import Settings
from fivefold.contract.stage_specs import STAGES
from jobs.__main__ import COMMANDS
from jobs.submit import AUTO, Keys

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FILES = (README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
PAGES = {path: path.read_text(encoding="utf-8") for path in FILES}
COMMAND = re.compile(r"python (?:-m jobs |jobs/)[\w-].*")


def test_every_stage_and_recipe_has_a_table_row():
    for page, names in (("stages.md", STAGES), ("recipes.md", shipped_recipes())):
        for name in names:
            assert f"\n| `{name}` |" in PAGES[ROOT / "docs" / page], name


def test_every_recipe_named_in_the_docs_exists():
    for text in PAGES.values():
        assert all(name == AUTO or recipe(name) for name in re.findall(r"recipe=([a-z]\w*)(?![\w./])", text))


def test_every_command_uses_a_known_stage_and_known_keys():
    for line in {line for text in PAGES.values() for line in COMMAND.findall(text)}:
        command, arguments = re.findall(r"(?:-m jobs|jobs/)\s*([\w-]+)(.*)", line)[0]
        name = command.removesuffix(".py").replace("_", "-")
        if name == "STAGE":
            continue
        assert name in {*STAGES, *COMMANDS, "train"} or line.startswith("python -m jobs --help")
        stage = STAGES.get(name)
        paths = {*stage.channels, *stage.optional, "output"} if stage and stage.path_arguments else set()
        keys = map(normalize_key, re.findall(r"(?<![\w\"{])([A-Za-z_.]+)=\S+", arguments.partition(" #")[0]))
        known = {*Keys.model_fields, *Settings.model_fields, *paths}
        assert [key for key in keys if key not in known and key.split(".")[0] not in SECTIONS] == [], line


def test_settings_page_is_up_to_date():
    assert PAGES[ROOT / "docs" / "settings.md"] == reference(), "run make docs"


def test_linked_files_exist_and_the_readme_links_every_page():
    links = {
        path: [(path.parent / target).resolve() for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
        for path, text in PAGES.items()
    }
    assert [target for targets in links.values() for target in targets if not target.is_file()] == []
    assert PAGES.keys() - {README} <= set(links[README])
