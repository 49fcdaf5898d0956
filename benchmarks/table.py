"""The README's table of speed, of the JSON that lies in benchmarks/results: `python -m benchmarks.table [FOLDER]`.

Every bar has its row; a dash stands where nothing was measured yet. Rows may come from several machines: a letter says
which, and the lines below the table what that is.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from benchmarks.bars import BARS, Bar
from benchmarks.machine import core_kind
from benchmarks.options import Options
from fivefold.contract.files import read_json

WEIGHTY = ("photo", "count", "epochs", "size", "batch", "rows")
"""Options that make a figure another one: the table names them where they were not the benchmark's own."""
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    print(text(Path(arguments[0] if arguments else Options().results)))
    return 0


def text(folder: Path) -> str:
    """The table in Markdown: what, bar, figure with its quartiles, number of pairs or runs, machine, command; the machines."""
    machines: list[str] = []
    lines = ["| | bar | figure | n | on | `python -m benchmarks` |", "|---|---|---|---|---|---|"]
    for name, bars in BARS.items():
        path = folder / f"{name}.json"
        rows = read_json(path)["rows"] if path.is_file() else {}
        for key, bar in bars.items():
            cells = _cells(rows[key], bar, machines) if key in rows else ["–"] * 3
            lines.append(f"| {' | '.join([bar.what, bar.wanted or '–', *cells])} | `{name}` |")
    known = [f"{letter}: {machine}" for letter, machine in zip(ascii_uppercase, machines, strict=False)]
    return "\n".join([*lines, *([f"\n{'; '.join(known)}."] if known else [])])


def _cells(row: Row, bar: Bar, machines: list[str]) -> list[str]:
    """Figure, n and the machine's letter; a machine that was not met before joins `machines`."""
    machine = core_kind(row["machine"])
    if machine not in machines:
        machines.append(machine)
    return [_figure(row, bar), str(row["figure"]["n"]), ascii_uppercase[machines.index(machine)]]


def _figure(row: Row, bar: Bar) -> str:
    found = row["figure"]
    spread = "" if found["n"] == 1 else f" [{bar.number(found['q1'])}, {bar.number(found['q3'])}]"
    missed = ", missed" if bar.verdict(found["median"]) == "missed" else ""
    other = [f"{option}={value}" for option, value in row["options"].items() if option in WEIGHTY]
    return bar.shown(found["median"]) + spread + missed + (f" ({' '.join(other)})" if other else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
