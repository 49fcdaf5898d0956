"""What pip installs: the locks, the wheel, and an environment that has PyTorch already."""

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
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[1]
USERS, IMAGE, DEVELOPERS = (
    REPOSITORY / name for name in ("requirements.txt", "docker/requirements.txt", "requirements-dev.txt")
)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def other_pythons() -> list[str]:
    """The newest later Python that is on this machine, or with FIVEFOLD_PYTHONS=all each; pyenv's wherever they lie."""
    found = []
    for version in ("3.12", "3.13", "3.14"):
        installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
        for path in (shutil.which(f"python{version}"), *map(str, sorted(installed))):
            # a name on the PATH may be pyenv's shim of a version that is not chosen here: it exits with 127
            if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
                found.append(path)
                break
    return found if os.environ.get("FIVEFOLD_PYTHONS") == "all" else found[-1:]


def pins(path: Path) -> dict[str, str]:
    """The version of each package of a lock; each line is one pin, or names another lock."""
    versions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(("#", "-r ")):
            match = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)( ; .+)?", line)
            assert match, f"{path.name}: {line!r} is not a pin"
            assert match[1] not in versions, f"{path.name}: duplicate {match[1]}"
            versions[match[1]] = match[2]
    return versions


def requirements(*extras: str) -> list[Requirement]:
    """The dependencies that pyproject.toml names, with those of the extras."""
    named = [text for extra in extras for text in EXTRAS[extra]]
    return [Requirement(text) for text in (*PROJECT["dependencies"], *named)]


def environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one, but not this project; its interpreter."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str | Path) -> str:
    """Run pip with this environment; its output, or an error with what pip printed."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that no build folder is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "jobs"):
        shutil.copytree(
            REPOSITORY / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source" / name)
    pip(
        Path(sys.executable),
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        folder / "source",
    )
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize(
    ("lock", "extras"),
    [(IMAGE, ()), (USERS, ("launch",)), (DEVELOPERS, ("launch", "export", "heif", "test", "trackers"))],
    ids=["image", "users", "developers"],
)
def test_lock_pins_every_dependency_within_its_range(lock: Path, extras: tuple[str, ...]) -> None:
    versions = pins(lock) | (pins(USERS) if lock == DEVELOPERS else {})
    for requirement in requirements(*extras):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_locks_of_users_have_no_tools_of_developers() -> None:
    developers = {Requirement(text).name for extra in ("export", "test") for text in EXTRAS[extra]} | {"wandb"}
    assert not developers & pins(USERS).keys()
    assert not {*developers, "sagemaker", "mlflow"} & pins(IMAGE).keys()
    assert pins(IMAGE).items() <= pins(USERS).items()
    assert not pins(USERS).keys() & pins(DEVELOPERS).keys()


def test_build_tool_is_pinned_within_its_range() -> None:
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert Requirement(build[0]).specifier.contains(pins(IMAGE)["setuptools"])


@pytest.mark.parametrize("path", [USERS, IMAGE, DEVELOPERS], ids=lambda path: path.name)
def test_lock_names_no_index(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*--", text, re.MULTILINE)


def test_wheel_has_one_top_level_package_and_all_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fivefold"}
    sources = {path.relative_to(REPOSITORY / "src").as_posix() for path in REPOSITORY.glob("src/fivefold/**/*.*")}
    sources |= {f"fivefold/{path.relative_to(REPOSITORY).as_posix()}" for path in REPOSITORY.glob("jobs/*.py")}
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in sources if "__pycache__" not in name
    }


def test_install_leaves_another_pytorch_alone(wheel: Path, tmp_path: Path) -> None:
    """pip sees torch, torchvision and timm of earlier versions, by their metadata, and installs without an index."""
    python = environment(tmp_path / "venv")
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    earlier = {"torch": "2.9.0", "torchvision": "0.24.0", "timm": "1.0.22"}
    for name, version in earlier.items():
        metadata = distribution(name).read_text("METADATA")
        assert metadata
        metadata = re.sub(r"(?m)^Version: .*$", f"Version: {version}", metadata)
        metadata = re.sub(r"(?m)^Requires-Dist: torch .*$", "Requires-Dist: torch", metadata)
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(metadata, encoding="utf-8")
    pip(python, "install", "--no-index", wheel)
    listed = pip(python, "list", "--format=freeze").splitlines()
    assert {f"{name}=={version}" for name, version in earlier.items()} <= set(listed)
    assert {path.name.split("-")[0] for path in site.glob("*.dist-info")} == {*earlier, "fivefold"}


def test_console_command_is_the_door_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    pip(python, "install", "--no-index", "--no-deps", wheel)
    clean = {"PATH": os.environ["PATH"]}
    command = [python.with_name("fivefold"), "train-fold", "--help"]
    installed = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path)
    command = [sys.executable, "-m", "jobs", "train-fold", "--help"]
    checkout = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=REPOSITORY)
    assert installed.returncode == checkout.returncode == 0, installed.stderr
    assert installed.stdout == checkout.stdout
    code = "import fivefold.jobs, importlib.util as u; assert u.find_spec('jobs') is None"
    subprocess.run([python, "-c", code], check=True, env=clean, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("other", other_pythons())
def test_demo_runs_from_the_wheel_under_another_python(wheel: Path, tmp_path: Path, other: str) -> None:
    subprocess.run([other, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip(python, "install", "-q", wheel)
    command = [python.with_name("fivefold"), "demo", "train.epochs=1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "runs/demo/evaluate/output/report.html").is_file()
