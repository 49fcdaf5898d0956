"""The locks agree with their one source, pyproject.toml, and with each other."""

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ALL = REPOSITORY / "requirements.txt"
RUNS = REPOSITORY / "docker" / "requirements.txt"
EXTRAS = ("export", "launch", "test", "trackers")


def pins(path: Path) -> dict[str, str]:
    """Versions by package; every line of a lock is one pin."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)( ; .+)?", line)
            assert match, f"{path.name}: {line!r} is no pin"
            assert match[1] not in found, f"{path.name}: {match[1]} stands twice"
            found[match[1]] = match[2]
    return found


def direct(*extras: str) -> dict[str, str]:
    """What pyproject.toml itself names, of the dependencies or of the extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [text for extra in extras for text in project["optional-dependencies"][extra]] or project["dependencies"]
    return dict(re.sub(r"\[.*\]", "", text).split("==") for text in named)


def test_everything_that_is_named_is_pinned_as_named() -> None:
    assert direct().items() <= pins(RUNS).items()
    assert (direct() | direct(*EXTRAS)).items() <= pins(ALL).items()


def test_what_runs_is_a_part_of_everything() -> None:
    assert pins(RUNS).items() <= pins(ALL).items()


def test_what_runs_holds_nothing_of_the_extras() -> None:
    assert not direct(*EXTRAS).keys() & pins(RUNS).keys()
    assert not {name for name in pins(RUNS) if name.startswith(("sagemaker", "mlflow", "onnx", "pytest", "wandb"))}


def test_the_build_tool_is_pinned_since_the_package_is_installed_with_it() -> None:
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    least = int(re.fullmatch(r"setuptools>=(\d+)", build[0])[1])
    assert int(pins(RUNS)["setuptools"].split(".")[0]) >= least


@pytest.mark.parametrize("path", [ALL, RUNS], ids=["everything", "runs"])
def test_no_place_to_fetch_from_is_prescribed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*--", text, re.MULTILINE)
