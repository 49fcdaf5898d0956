"""Architecture rules: import layers, modules that load without torch, start-up time, use of the environment."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import fivefold
from fivefold.contract.stage_specs import STAGES
from jobs.__main__ import COMMANDS

REPOSITORY = Path(__file__).parents[2]

LAZY_IMPORTS = (
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
"""Packages imported only when they are used: timm alone takes as long as torch."""
PACKAGES_THAT_READ_THE_ENVIRONMENT = ("contract", "launchers", "stages")
"""Packages of fivefold that, like jobs, may read the variables of the container contract."""
MODULES = [module.name for module in pkgutil.walk_packages(fivefold.__path__, "fivefold.")]


def run_python(code: str) -> str:
    """Return what a fresh interpreter prints."""
    return subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True)


def loaded_by(modules: Iterable[str], packages: Sequence[str]) -> list[str]:
    """Return which of `packages` a fresh interpreter loads with `modules`."""
    code = f"import json, sys, {', '.join(modules)}\nprint(json.dumps([name for name in {packages!r} if name in sys.modules]))"
    return json.loads(run_python(code))


def test_imports_follow_the_layers() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_pyproject_lists_every_package_and_module() -> None:
    tools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folders = {path.parent for path in REPOSITORY.glob("src/fivefold/**/__init__.py")}
    packages = {".".join(folder.relative_to(REPOSITORY / "src").parts) for folder in folders} | {"fivefold.jobs"}
    assert set(tools["setuptools"]["packages"]) == packages
    layers = tools["importlinter"]["contracts"][0]["layers"]
    listed = {name.strip() for layer in layers for name in re.split(r"[|:]", layer)}
    for name in MODULES:  # the contract lists a package itself or the modules in it
        assert any(f"{a}.".startswith(f"{b}.") for entry in listed for a, b in ((name, entry), (entry, name))), name


def test_launchers_and_reports_import_without_torch() -> None:
    names = [name for name in MODULES if name.startswith("fivefold.launchers")]
    names += [f"jobs{module}" for module, _ in COMMANDS.values()]
    names += [f"jobs.{name}" for name in ("__main__", "split", "evaluate", "compare", "ensemble", "inference")]
    assert loaded_by(names, ("torch", "torchvision", "timm", "tensorboard", "sagemaker")) == []


def test_stage_startup_does_not_import_optional_or_late_packages() -> None:
    assert loaded_by(["jobs.__main__", *(f"jobs{stage.module}" for stage in STAGES.values())], LAZY_IMPORTS) == []


def test_help_takes_less_than_one_second_of_cpu_time() -> None:
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'jobs', '--help'], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    )
    assert float(run_python(code)) < 1.0


def test_layers_below_the_contract_do_not_read_the_environment() -> None:
    reads = []
    for path in REPOSITORY.glob("src/fivefold/**/*.py"):
        if path.relative_to(REPOSITORY / "src/fivefold").parts[0] in PACKAGES_THAT_READ_THE_ENVIRONMENT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                name = next((alias.name for alias in node.names), None)
            if name in ("environ", "environb", "getenv", "putenv"):
                reads.append(f"{path.name}:{node.lineno}")
    assert reads == []
