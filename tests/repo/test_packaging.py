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
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
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
    """The version of each package of a lock; each entry is one pin with its hashes, or names another lock."""
    versions: dict[str, str] = {}
    for entry in path.read_text(encoding="utf-8").replace(" \\\n", "").splitlines():
        if not entry.startswith(("#", "-r ")):
            match = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)( ; .+?)?(    --hash=sha256:[0-9a-f]{64})+", entry)
            assert match, f"{path.name}: {entry[:200]!r} is not a pin with hashes"
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
    assert not re.search(r"^\s*--(?!hash=)", text, re.MULTILINE)


@pytest.mark.parametrize("path", [USERS, IMAGE, DEVELOPERS], ids=lambda path: path.name)
def test_pip_takes_no_file_but_those_of_the_lock(path: Path, tmp_path: Path) -> None:
    """The first package of a lock, offered by an index of this machine as a file of the same name and version."""
    entry = re.search(r"(?m)^([a-z0-9-]+)==(\S+) \\\n(    --hash.*\n)+", path.read_text(encoding="utf-8"))
    assert entry
    name = f"{entry[1].replace('-', '_')}-{entry[2]}"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {entry[1]}\nVersion: {entry[2]}\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    (tmp_path / "one.txt").write_text(entry[0].rstrip(" \\\n") + "\n", encoding="utf-8")
    options = ["--isolated", "--no-index", "--no-deps", "--find-links", tmp_path, "--target", tmp_path / "site"]
    command = [sys.executable, "-m", "pip", "install", *options, "--require-hashes", "-r", tmp_path / "one.txt"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode, "a file that is another was installed"
    assert "DO NOT MATCH" in ended.stderr


def test_every_install_asks_for_the_hashes() -> None:
    for name in ("Makefile", "docker/Dockerfile"):
        lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
        installs = [line for line in lines if re.search(r"pip install .*-r ", line)]
        assert installs, name
        assert all("--require-hashes" in line for line in installs), name


def test_the_image_parts_the_lock_without_losing_a_line(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"RUN (awk (?:.|\n)*?requirements\.txt)\n", (REPOSITORY / "docker" / "Dockerfile").read_text()
    )
    shutil.copy(IMAGE, tmp_path)
    subprocess.run(command.replace("/pins", str(tmp_path)), shell=True, check=True)
    torch, others = pins(tmp_path / "torch.txt"), pins(tmp_path / "others.txt")
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13"} <= torch.keys()
    assert "numpy" in others
    assert {**torch, **others} == pins(IMAGE)
    assert not torch.keys() & others.keys()


def test_the_public_ci_runs_the_tests_and_the_audit_with_rights_to_read_alone() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    started = workflow[True]  # YAML 1.1 reads `on` as true
    assert {"push", "pull_request", "schedule"} == started.keys()
    steps = {name: job["steps"] for name, job in workflow["jobs"].items()}
    assert [step["run"] for step in steps["run"] if "run" in step][-1] == ".ci/run"
    assert [step["run"] for step in steps["audit"] if "run" in step] == ["make audit"]
    used = [step["uses"] for each in steps.values() for step in each if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) for name in used)


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
    subprocess.run([other, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # by uv, which `make` puts beside this Python: it has most of the packages in its cache
    install = [Path(sys.executable).with_name("uv"), "pip", "install", "--compile-bytecode", "--python", python]
    subprocess.run([*install, "--constraint", REPOSITORY / "requirements.txt", wheel], check=True)
    command = [python.with_name("fivefold"), "demo", "train.epochs=1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "runs/demo/evaluate/output/report.html").is_file()
