"""`python tests/e2e/run_systems.py [NAME...]`: run the reference systems end to end, at a small size, on generated images.

Every step runs in its own process, as users start it. The program fails if a step fails or a file is missing or wrong.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from expected_files import problems
from fivefold.lookup import choose
from reference_systems import SYSTEMS, Command, System

REPOSITORY = Path(__file__).parents[2]
LOG_LINES_ON_FAILURE = 25


def main(names: Sequence[str]) -> int:
    """Run the named systems, or all; return 1 if anything failed."""
    failed = False
    with tempfile.TemporaryDirectory(prefix="systems-") as folder:
        for name in names or SYSTEMS:
            print(f"{name} …", flush=True)
            system, root, start = choose(SYSTEMS, "system", name), Path(folder) / name, time.monotonic()
            wrong = run_system(system, root)
            stages, seconds = len(list(root.rglob("stage.json"))), time.monotonic() - start
            failed = failed or bool(wrong)
            for line in wrong or [f"{stages} stages, {seconds:.0f} s, {len(system.files)} files as expected"]:
                print(f"  {line}", flush=True)
    return int(failed)


def run_system(system: System, root: Path) -> list[str]:
    """Draw the data, run the commands until one fails, and check the files; return the problems."""
    root.mkdir(parents=True)
    system.draw(root)
    for command in system.commands(root):
        if failure := run_command(command, root):
            return [failure]
    return problems(root, system.files)


def run_command(command: Command, root: Path) -> str:
    """Run the command in `root`; return its last lines if it fails, else an empty string."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    call = [sys.executable, "-W", "error::UserWarning:fivefold", *command.program, *command.arguments]
    result = subprocess.run(call, cwd=root, env={**environment, **command.variables}, capture_output=True, text=True)
    if command.printed:
        (root / command.printed).write_text(result.stdout, encoding="utf-8")
    if not result.returncode:
        return ""
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    return "\n    ".join([f"{' '.join(command.arguments)}: exit {result.returncode}", *lines[-LOG_LINES_ON_FAILURE:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
