"""`python tests/e2e/run_systems.py [NAME...]`: the reference systems end to end, each made small, on drawn images.

Every step is a process of its own, as users start it. Prints a table, and fails if a step or a file does.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expected_files import problems
from fivefold.launchers.status import format_table
from reference_systems import SYSTEMS, Command, System

REPOSITORY = Path(__file__).parents[2]
LOG = "log.txt"
LINES_OF_A_FAILURE = 25


@dataclass
class Result:
    """How a system went: its processes, seconds on the clock, and what is wrong."""

    steps: int = 0
    seconds: float = 0.0
    scores: str = ""
    wrong: list[str] = field(default_factory=list)


def main(names: Sequence[str]) -> int:
    """Runs the systems named, or all; 1 if anything is missing."""
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        print(f"unknown system {unknown[0]!r}; known: {', '.join(SYSTEMS)}")
        return 64
    results = {}
    with tempfile.TemporaryDirectory(prefix="systems-") as folder:
        for name in names or SYSTEMS:
            print(f"{name} …", flush=True)
            results[name] = run(SYSTEMS[name], Path(folder) / name)
            for line in results[name].wrong:
                print(f"  {line}", flush=True)
    print(as_table(results))
    return int(any(result.wrong for result in results.values()))


def run(system: System, root: Path) -> Result:
    """Draws the data, runs the commands until one fails, and looks at what lies there."""
    result, start = Result(), time.monotonic()
    root.mkdir(parents=True)
    system.draw(root)
    for command in system.commands(root):
        if ended := failure(command, root):
            result.wrong.append(ended)
            break
    else:
        result.wrong = problems(root, system.files)
        result.scores = "" if result.wrong else system.scores(root)
    result.steps = len(list(root.rglob("stage.json")))
    result.seconds = time.monotonic() - start
    return result


def failure(command: Command, root: Path) -> str:
    """Runs the command in `root`; its last lines if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    call = [sys.executable, "-W", "error::UserWarning:fivefold", *command.program, *command.arguments]
    ended = subprocess.run(call, cwd=root, env={**environment, **command.variables}, capture_output=True, text=True)
    if command.printed:
        (root / command.printed).write_text(ended.stdout, encoding="utf-8")
    with open(root / LOG, "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command.arguments)}\n{ended.stdout}{ended.stderr}\n")
    if not ended.returncode:
        return ""
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
    return "\n    ".join([f"{' '.join(command.arguments)}: exit {ended.returncode}", *lines[-LINES_OF_A_FAILURE:]])


def as_table(results: dict[str, Result]) -> str:
    rows = [("system", "stages", "seconds", "files", "scores")]
    for name, found in results.items():
        files = f"{len(SYSTEMS[name].files)} as wanted" if not found.wrong else f"{len(found.wrong)} problems"
        rows.append((name, str(found.steps), f"{found.seconds:.0f}", files, found.scores))
    return format_table(rows, numbers=(1, 2))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
