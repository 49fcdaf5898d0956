"""`python -m benchmarks NAME… [KEY=VALUE…]`: measures what the project claims of its speed.

python -m benchmarks quick                                  the short set, a few minutes: make bench
python -m benchmarks all                                    every row of the README's table; hours
python -m benchmarks train step                             some; make bench BENCH="train step"
python -m benchmarks train cases=resnet18@64 images=photos  one row, on photographs of yours
python -m benchmarks.table                                  the README's table, of benchmarks/results

What is compared runs in fresh processes in turns, and the figure is the median of paired ratios. Leave the machine alone
meanwhile: it warns where it is not quiet. Figures go to stdout as a table and to benchmarks/results/NAME.json, those of
quick to build/benchmarks/results.
"""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import machine, results
from benchmarks.bars import BARS
from benchmarks.options import Options, keys, parse
from fivefold.choose import choose
from fivefold.errors import FivefoldError, SettingsError

log = logging.getLogger("fivefold")
QUICK_RESULTS = "results=build/benchmarks/results"


@dataclass(frozen=True)
class Benchmark:
    """Its module of the same name has `measure(options) -> Iterator[Finding]`; `quick` are its arguments in the short set, None where it has no part in it."""

    summary: str
    minutes: float
    quick: tuple[str, ...] | None = None


def main(arguments: Sequence[str]) -> int:
    """Runs what is named, one after the other; 0, or the exit code of the error that ended it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(overview())
        return 0
    try:
        names = [argument for argument in arguments if "=" not in argument]
        rest = [argument for argument in arguments if "=" in argument]
        for name, options in plan(names, rest):
            run(name, options)
    except FivefoldError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; what was measured before is kept")
        return 130
    return 0


def plan(names: Sequence[str], arguments: Sequence[str]) -> list[tuple[str, Options]]:
    """The benchmarks that `names` stand for, each with its options; all are checked before one runs."""
    if not names:
        raise SettingsError(f"no benchmark: give quick, all, or some of {', '.join(BENCHMARKS)}; see --help")
    found = []
    for name in names:
        if name == "quick":
            short = {each: made.quick for each, made in BENCHMARKS.items() if made.quick is not None}
            found += [(each, parse([QUICK_RESULTS, *own, *arguments])) for each, own in short.items()]
        elif name == "all":
            found += [
                (each, parse(arguments)) for each in BENCHMARKS if each != "gpu" or parse(arguments).device == "cuda"
            ]
        else:
            choose({**BENCHMARKS, "quick": 1, "all": 1}, "benchmark", name)
            found.append((name, parse(arguments)))
    return found


def run(name: str, options: Options) -> None:
    """Measures, keeps the JSON, prints the table."""
    options = replace(options, device="cuda") if name == "gpu" else options
    about = machine.about(options.cores, options.device)
    log.info("%s: about %g min here; %s", name, BENCHMARKS[name].minutes, BENCHMARKS[name].summary)
    module = importlib.import_module(f"benchmarks.{name}")
    findings = []
    for found in module.measure(options):  # each is kept at once: another may fail after an hour
        findings.append(found)
        path = results.keep(name, [found], options, about)
    print(f"{results.table(name, findings, about)}\n    kept: {path}\n", flush=True)


def overview() -> str:
    """The help: every benchmark with its bars, and the keys."""
    lines = [__doc__.strip(), ""]
    for name, made in BENCHMARKS.items():
        lines.append(f"{name}: {made.summary} (about {made.minutes:g} min on 2 cores)")
        lines += [f"  {key:26} {bar.wanted or '-':18} {bar.what}" for key, bar in BARS[name].items()]
    beside = "scripts beside them: benchmarks/checkpoints.py, parts.py and serving.py; each says how it is run"
    return "\n".join([*lines, "", "keys:", keys(), "", beside])


BENCHMARKS = {
    "start": Benchmark("how soon a process is at work", 4, ("pairs=5",)),
    "loader": Benchmark("the loader alone, from the cache, on one core", 2, ()),
    "tables": Benchmark("what is done with tables of a million rows", 5, ("pairs=3", "cases=split,ensemble")),
    "step": Benchmark("mixup, R-Drop, SAM and EMA together against a plain step", 25),
    "train": Benchmark(
        "train-fold from JPEGs against the same model and step on a resident batch",
        45,
        ("cases=resnet18@64", "count=640", "epochs=4"),
    ),
    "peer": Benchmark("train-fold against timm's training loop at its best settings", 75),
    "folds": Benchmark("all folds and their ensemble against timm's loop, everything included", 60),
    "ensemble": Benchmark("the ensemble of 5 models and 3 views against the models alone", 25),
    "gpu": Benchmark("train and peer on a GPU, in bf16", 20),
}
"""In the order in which `all` runs them."""


def _stop(number: int, frame: object) -> None:
    """Ends this process as Ctrl-C does, so that the process that is measured ends too."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(sys.argv[1:]))
