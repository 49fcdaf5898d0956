"""`python -m benchmarks NAME… [KEY=VALUE…]`: measure the speed of Fivefold.

python -m benchmarks loader pairs=3                         a short benchmark, a few minutes (make bench)
python -m benchmarks all                                    every row of the table in docs/performance.md; takes hours
python -m benchmarks train cases=resnet18@64 images=photos  one row, on your own images
python -m benchmarks.results                                prints that table from benchmarks/results

Both sides of a comparison run in fresh processes that alternate. The figure is the median of paired ratios. Stop other
processes first. Figures go to stdout and to benchmarks/results/NAME.json.
"""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import Options, describe_keys, parse
from benchmarks.results import TARGETS, describe_machine, markdown_table, save_row
from fivefold.errors import FivefoldError, SettingsError
from fivefold.lookup import choose

log = logging.getLogger("fivefold")
MODULES = {name: ("training", f"measure_{name}") for name in ("train", "peer")}
"""Module and function of the benchmarks that are not `measure` of the module of their name."""


def main(arguments: Sequence[str]) -> int:
    """Run the named benchmarks; return 0, or the exit code of the error that ended the run."""
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
    """Return the benchmarks that `names` select, each with its options. Check all of them before any runs."""
    if not names:
        raise SettingsError(f"no benchmark: give all, or some of {', '.join(TARGETS)}; see --help")
    for name in names:
        choose({**TARGETS, "all": 1}, "benchmark", name)
    return [(name, parse(arguments)) for name in (TARGETS if "all" in names else names)]


def run_benchmark(name: str, options: Options) -> None:
    """Measure, save each row as soon as it is measured, and print the table."""
    facts = describe_machine(options.cores, options.device)
    module, function = MODULES.get(name, (name, "measure"))
    for finding in getattr(importlib.import_module(f"benchmarks.{module}"), function)(options):
        save_row(name, finding, options, facts)
    print(markdown_table(Path(options.results), [name]), flush=True)


def overview() -> str:
    """Return the help: every benchmark with its targets, and the keys."""
    rows = [f"  {name:10} {target!s:18} {target.text}" for name, rows in TARGETS.items() for target in rows.values()]
    return "\n".join([__doc__.strip(), "", *rows, "", "keys:", describe_keys()])


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # unwinds like Ctrl-C, so that the measured process ends too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(sys.argv[1:]))
