"""`python tests/e2e/run_systems.py [NAME...]`: run the reference systems end to end, at a small size, on generated images.

Every step runs in its own process, as users start it. Prints a table, and fails if a step fails or a file is missing or wrong.
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
from fivefold.lookup import choose
from reference_systems import SYSTEMS, Command, System

REPOSITORY = Path(__file__).parents[2]
LOG = "log.txt"
LOG_LINES_ON_FAILURE = 25


@dataclass
class Result:
    """Outcome of one system: number of stages, wall-clock seconds and problems."""

    steps: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def main(names: Sequence[str]) -> int:
    """Run the named systems, or all; return 1 if anything failed."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="systems-") as folder:
        for name in names or SYSTEMS:
            print(f"{name} …", flush=True)
            results[name] = run_system(choose(SYSTEMS, "system", name), Path(folder) / name)
            for line in results[name].wrong:
                print(f"  {line}", flush=True)
    print(format_results(results))
    return int(any(result.wrong for result in results.values()))


def run_system(system: System, root: Path) -> Result:
    """Draw the data, run the commands until one fails, and check the files."""
    result, start = Result(), time.monotonic()
    root.mkdir(parents=True)
    system.draw(root)
    for command in system.commands(root):
        if failure := run_command(command, root):
            result.wrong.append(failure)
            break
    else:
        result.wrong = problems(root, system.files)
    result.steps = len(list(root.rglob("stage.json")))
    result.seconds = time.monotonic() - start
    return result


def run_command(command: Command, root: Path) -> str:
    """Run the command in `root`; return its last lines if it fails, else an empty string."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    call = [sys.executable, "-W", "error::UserWarning:fivefold", *command.program, *command.arguments]
    result = subprocess.run(call, cwd=root, env={**environment, **command.variables}, capture_output=True, text=True)
    if command.printed:
        (root / command.printed).write_text(result.stdout, encoding="utf-8")
    with open(root / LOG, "a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command.arguments)}\n{result.stdout}{result.stderr}\n")
    if not result.returncode:
        return ""
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    return "\n    ".join([f"{' '.join(command.arguments)}: exit {result.returncode}", *lines[-LOG_LINES_ON_FAILURE:]])


def format_results(results: dict[str, Result]) -> str:
    rows = [("system", "stages", "seconds", "files")]
    for name, result in results.items():
        files = f"{len(SYSTEMS[name].files)} as expected" if not result.wrong else f"{len(result.wrong)} problems"
        rows.append((name, str(result.steps), f"{result.seconds:.0f}", files))
    return format_table(rows, numbers=(1, 2))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
