"""The architecture, measured: who may import whom, what loads without torch, how long things are."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fivefold
from fivefold.contract.stage_specs import STAGES, Stage
from jobs.__main__ import COMMANDS

REPOSITORY = Path(__file__).parents[2]

WITHOUT_TORCH = (
    "config",
    "contract",
    "csv_tables",
    "data.class_aliases",
    "data.image_io",
    "data.readers",
    "data.split",
    "distributed.rank_launcher",
    "distributed.ranks",
    "evaluation",
    "inference.blending",
    "inference.ensemble_spec",
    "inference.submission",
    "inference.submission_reader",
    "inference.systems",
    "launchers",
    "predictions",
)
LATE = (
    "boto3",
    "matplotlib",
    "onnx",
    "psutil",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboard",
    "timm",
    "torch._dynamo",
    "torchvision",
)
"""What is imported when it is used, if it is: timm alone takes as long as torch."""
READERS_OF_THE_ENVIRONMENT = ("contract", "launchers", "stages")
"""The packages below fivefold, beside jobs, that know the container contract."""


def modules() -> list[str]:
    """All modules of the package, by their full names."""
    return [found.name for found in pkgutil.walk_packages(fivefold.__path__, "fivefold.")]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout


def test_imports_point_down() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_every_module_stands_in_the_import_contract() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip() for layer in layers for name in re.split(r"[|:]", layer)}
    # a package stands there itself, or the modules in it do
    assert [
        name
        for name in modules()
        if not any(f"{a}.".startswith(f"{b}.") for n in named for a, b in ((name, n), (n, name)))
    ] == []


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent for path in REPOSITORY.glob("src/fivefold/**/__init__.py")}
    packages = {".".join(folder.relative_to(REPOSITORY / "src").parts) for folder in folders} | {"fivefold.jobs"}
    assert set(settings["tool"]["setuptools"]["packages"]) == packages


def test_launching_and_reporting_load_without_torch() -> None:
    wanted = [f"fivefold.{name}" for name in WITHOUT_TORCH]
    names = [name for name in modules() if any(name == one or name.startswith(one + ".") for one in wanted)]
    names += [f"jobs{module}" for module, _ in COMMANDS.values()]
    names += [f"jobs.{name}" for name in ("__main__", "split", "evaluate", "compare", "ensemble", "inference")]
    heavy = ("torch", "torchvision", "timm", "tensorboard", "sagemaker")
    code = (
        f"import importlib, json, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    )
    assert json.loads(python(code)) == []


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_starts_without_what_only_some_recipes_or_its_end_need(stage: Stage) -> None:
    code = (
        f"import json, sys\nimport jobs.__main__, jobs{stage.module}\n"
        f"print(json.dumps([name for name in {LATE!r} if name in sys.modules]))"
    )
    assert json.loads(python(code)) == []


def test_help_comes_at_once() -> None:
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'jobs', '--help'], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    )
    assert float(python(code)) < 1.0


def test_nothing_below_the_contract_reads_the_environment() -> None:
    found = []
    for path in REPOSITORY.glob("src/fivefold/**/*.py"):
        if path.relative_to(REPOSITORY / "src/fivefold").parts[0] in READERS_OF_THE_ENVIRONMENT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                name = next((alias.name for alias in node.names), None)
            if name in ("environ", "environb", "getenv", "putenv"):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []
