"""`python -m benchmarks NAME… [KEY=VALUE…]`: measure what the project claims of its speed.

python -m benchmarks loader pairs=3                         a short one, a few minutes: make bench
python -m benchmarks all                                    every row of the table in docs/performance.md; hours
python -m benchmarks train cases=resnet18@64 images=photos  one row, on your photographs
python -m benchmarks.results                                that table, from benchmarks/results

Both sides of a comparison run in fresh processes in turns; the figure is the median of paired ratios. Stop other processes
first. Figures go to stdout and to benchmarks/results/NAME.json.
"""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import Options, describe_keys, parse
from benchmarks.results import TARGETS, describe_machine, markdown_table, save
from fivefold.choose import choose
from fivefold.errors import FivefoldError, SettingsError

log = logging.getLogger("fivefold")
MODULES = {name: ("training", f"measure_{name}") for name in ("train", "peer")}
"""Where a benchmark is, if not at `measure` of the module of its name."""


def main(arguments: Sequence[str]) -> int:
    """Run what is named; return 0, or the exit code of the error that ended it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(overview())
        return 0
    try:
        names = [argument for argument in arguments if "=" not in argument]
        for name, options in plan(names, [argument for argument in arguments if "=" in argument]):
            run_benchmark(name, options)
    except FivefoldError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; rows that were measured are saved")
        return 130
    return 0


def plan(names: Sequence[str], arguments: Sequence[str]) -> list[tuple[str, Options]]:
    """Return the benchmarks that `names` select, each with its options; all are checked before one runs."""
    if not names:
        raise SettingsError(f"no benchmark: give all, or some of {', '.join(TARGETS)}; see --help")
    for name in names:
        choose({**TARGETS, "all": 1}, "benchmark", name)
    return [(name, parse(arguments)) for name in (TARGETS if "all" in names else names)]


def run_benchmark(name: str, options: Options) -> None:
    """Measure, save each row as soon as it is there, print the table."""
    facts = describe_machine(options.cores, options.device)
    module, function = MODULES.get(name, (name, "measure"))
    for finding in getattr(importlib.import_module(f"benchmarks.{module}"), function)(options):
        save(name, finding, options, facts)
    print(markdown_table(Path(options.results), [name]), flush=True)


def overview() -> str:
    """Return the help: every benchmark with its targets, and the keys."""
    rows = [f"  {name:10} {target!s:18} {target.text}" for name, rows in TARGETS.items() for target in rows.values()]
    return "\n".join([__doc__.strip(), "", *rows, "", "keys:", describe_keys()])


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # as Ctrl-C, so that the measured process ends too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(sys.argv[1:]))
