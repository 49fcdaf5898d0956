"""Architecture rules: import layers, modules that load without torch, start-up time, use of the environment."""

import pkgutil
import re
import subprocess
import sys
import tomllib
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


def test_launchers_import_without_torch_and_stages_without_late_packages() -> None:
    light = [name for name in MODULES if name.startswith("fivefold.launchers")]
    light += [
        "fivefold.planning.forecast",
        "fivefold.planning.rules",
        *(f"jobs{module}" for module, _ in COMMANDS.values()),
    ]
    light += [f"jobs.{name}" for name in ("__main__", "split", "evaluate", "compare", "ensemble", "inference")]
    stages = [f"jobs{stage.module}" for stage in STAGES.values()]
    code = "import sys\n"
    for modules, packages in ((light, ("torch", "sagemaker", *LAZY_IMPORTS)), (stages, LAZY_IMPORTS)):
        code += f"import {', '.join(modules)}\nprint(*{{*{packages!r}}} & {{*sys.modules}})\n"
    assert run_python(code).split() == []


def test_help_takes_less_than_one_second_of_cpu_time() -> None:
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'jobs', '--help'], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    )
    assert float(run_python(code)) < 1.0


def test_layers_below_the_contract_do_not_read_the_environment() -> None:
    readers = [
        path.name
        for path in REPOSITORY.glob("src/fivefold/**/*.py")
        if path.relative_to(REPOSITORY / "src/fivefold").parts[0] not in PACKAGES_THAT_READ_THE_ENVIRONMENT
        and re.search(r"\bos\.(environb?|getenv|putenv)\b|from os import", path.read_text(encoding="utf-8"))
    ]
    assert readers == []
