"""What pip installs: the lock files, the wheel, and the wheel in an environment that already has PyTorch."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
USERS, IMAGE, DEVELOPERS = (
    REPOSITORY / name for name in ("requirements.txt", "docker/requirements.txt", "requirements-dev.txt")
)
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, BUILD = PYPROJECT["project"], PYPROJECT["build-system"]
EXTRAS = PROJECT["optional-dependencies"]


def find_other_pythons() -> list[str]:
    """Return the newest later Python on the PATH or in pyenv, or none."""
    for version in ("3.14", "3.13", "3.12"):
        installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
        for path in (shutil.which(f"python{version}"), *map(str, sorted(installed))):
            # a name on the PATH may be pyenv's shim of a version that is not active here: it exits with 127
            if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
                return [path]
    return []


def read_pins(path: Path) -> dict[str, str]:
    """Return the pinned version of each package in a lock; every entry must be a pin with hashes or `-r` another lock."""
    versions: dict[str, str] = {}
    for entry in path.read_text(encoding="utf-8").replace(" \\\n", "").splitlines():
        if not entry.startswith(("#", "-r ")):
            match = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)( ; .+?)?(    --hash=sha256:[0-9a-f]{64})+", entry)
            assert match, f"{path.name}: {entry[:200]!r} is not a pin with hashes"
            assert match[1] not in versions, f"{path.name}: duplicate {match[1]}"
            versions[match[1]] = match[2]
    return versions


def run_pip(python: Path, *arguments: str | Path) -> str:
    """Run pip with the interpreter `python` and return its output; a failure shows what pip printed."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that no build folder stays behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source, ignored = folder / "source", shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "jobs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    run_pip(Path(sys.executable), "wheel", *options, source)
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize(
    ("lock", "extras"),
    [(IMAGE, ()), (USERS, ("launch",)), (DEVELOPERS, ("launch", "export", "heif", "test", "trackers"))],
    ids=["image", "users", "developers"],
)
def test_lock_pins_every_dependency_within_its_range(lock: Path, extras: tuple[str, ...]) -> None:
    versions = read_pins(lock) | (read_pins(USERS) if lock == DEVELOPERS else {})
    texts = [*PROJECT["dependencies"], *BUILD["requires"], *(text for extra in extras for text in EXTRAS[extra])]
    for requirement in map(Requirement, texts):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_user_and_image_locks_exclude_developer_tools() -> None:
    developers = {Requirement(text).name for extra in ("export", "test") for text in EXTRAS[extra]} | {"wandb"}
    assert not developers & read_pins(USERS).keys()
    assert not {*developers, "sagemaker", "mlflow"} & read_pins(IMAGE).keys()
    assert read_pins(IMAGE).items() <= read_pins(USERS).items()
    assert not read_pins(USERS).keys() & read_pins(DEVELOPERS).keys()


def test_pip_rejects_a_file_whose_hash_is_not_in_the_lock(tmp_path: Path) -> None:
    """A local folder offers another file with the name and version of the lock's first package."""
    entry = re.search(r"(?m)^([a-z0-9-]+)==(\S+) \\\n(    --hash.*\n)+", IMAGE.read_text(encoding="utf-8"))
    assert entry
    name = f"{entry[1].replace('-', '_')}-{entry[2]}"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {entry[1]}\nVersion: {entry[2]}\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    (tmp_path / "one.txt").write_text(entry[0].rstrip(" \\\n") + "\n", encoding="utf-8")
    options = ["--isolated", "--no-index", "--no-deps", "--find-links", tmp_path, "--target", tmp_path / "site"]
    command = [sys.executable, "-m", "pip", "install", *options, "--require-hashes", "-r", tmp_path / "one.txt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode, "pip installed a file with another hash"
    assert "DO NOT MATCH" in result.stderr


def test_makefile_and_dockerfile_install_with_require_hashes() -> None:
    for name in ("Makefile", "docker/Dockerfile"):
        lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
        installs = [line for line in lines if re.search(r"pip install .*-r ", line)]
        assert installs, name
        assert all("--require-hashes" in line for line in installs), name


def test_dockerfile_splits_the_lock_without_losing_a_pin(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"RUN (awk (?:.|\n)*?requirements\.txt)\n", (REPOSITORY / "docker" / "Dockerfile").read_text()
    )
    shutil.copy(IMAGE, tmp_path)
    subprocess.run(command.replace("/pins", str(tmp_path)), shell=True, check=True)
    torch, others = read_pins(tmp_path / "torch.txt"), read_pins(tmp_path / "others.txt")
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13"} <= torch.keys()
    assert "numpy" in others
    assert {**torch, **others} == read_pins(IMAGE)
    assert not torch.keys() & others.keys()


def test_public_ci_runs_tests_and_audit_with_read_only_permissions() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    triggers = workflow[True]  # YAML 1.1 reads `on` as true
    assert {"push", "pull_request", "schedule"} == triggers.keys()
    steps = {name: job["steps"] for name, job in workflow["jobs"].items()}
    assert [step["run"] for step in steps["run"] if "run" in step][-1] == ".ci/run"
    assert [step["run"] for step in steps["audit"] if "run" in step] == ["make audit"]
    actions = [step["uses"] for job_steps in steps.values() for step in job_steps if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) for name in actions)


def test_wheel_has_one_top_level_package_and_all_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fivefold"}
    sources = {path.relative_to(REPOSITORY / "src").as_posix() for path in REPOSITORY.glob("src/fivefold/**/*.*")}
    sources |= {f"fivefold/{path.relative_to(REPOSITORY).as_posix()}" for path in REPOSITORY.glob("jobs/*.py")}
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in sources if "__pycache__" not in name
    }


@pytest.mark.slow
def test_wheel_keeps_an_installed_earlier_pytorch_and_prints_the_help_of_the_checkout(wheel, tmp_path):
    """The environment shares this one's packages, but not this project, and has metadata of earlier torch and timm."""
    venv.create(tmp_path / "venv", with_pip=False)
    python, site = tmp_path / "venv" / "bin" / "python", next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    earlier = {"torch": "2.9.0", "torchvision": "0.24.0", "timm": "1.0.22"}
    for name, version in earlier.items():
        metadata = distribution(name).read_text("METADATA")
        assert metadata
        metadata = re.sub(r"(?m)^Version: .*$", f"Version: {version}", metadata)
        metadata = re.sub(r"(?m)^Requires-Dist: torch .*$", "Requires-Dist: torch", metadata)
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(metadata, encoding="utf-8")
    run_pip(python, "install", "--no-index", wheel)
    assert {path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info")} == {
        f"fivefold-{PROJECT['version']}", *(f"{name}-{version}" for name, version in earlier.items())
    }  # fmt: skip
    environ = {"PATH": os.environ["PATH"]}
    commands = {tmp_path: [python.with_name("fivefold")], REPOSITORY: [sys.executable, "-m", "jobs"]}
    helps = {
        subprocess.check_output([*command, "train-fold", "--help"], cwd=folder, env=environ)
        for folder, command in commands.items()
    }
    assert len(helps) == 1
    code = "import fivefold.jobs, importlib.util as u; assert u.find_spec('jobs') is None"
    subprocess.run([python, "-c", code], check=True, env=environ, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("other", find_other_pythons())
def test_demo_runs_from_the_wheel_on_another_python(wheel: Path, tmp_path: Path, other: str) -> None:
    subprocess.run([other, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # uv, which `make` installs next to this Python, has most of the packages in its cache
    install = [Path(sys.executable).with_name("uv"), "pip", "install", "--compile-bytecode", "--python", python]
    subprocess.run([*install, "--constraint", REPOSITORY / "requirements.txt", wheel], check=True)
    command = [python.with_name("fivefold"), "demo", "train.epochs=1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs/demo/evaluate/output/report.html").is_file()
